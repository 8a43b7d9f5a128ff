"""The best pair of partial plans, one from each of two lists, that together meet the caps.

Least is ``deviation + deviation + prices @ unused room``. With one resource the second list is a staircase,
and the best partner of every partial plan is the last one that fits. With several, partners are looked up
where they must lie: with delta to spend, a pair leaves at most (delta - deviations) / price unused of every
resource. The second list is cut into layers of similar deviation, because most partial plans deviate nearly
by delta and can only be joined to the few that hardly deviate; and each layer is sorted by cells of one
resource and inside them by another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .clock import Clock
from .structure import Floats, Integers, distinct, ranges

LAYERS = 12
DIRECT = 1 << 15
"""Pairs that are all looked at rather than sorted out."""
HAIR = 1e-9
"""Relative width added to windows."""
CHUNK = 1 << 21
"""Pairs looked at in one step."""


class Side(Protocol):
    """What `best_pair` needs of a list of partial plans, by rising deviation."""

    @property
    def deviation(self) -> Floats:
        """(states,)"""

    @property
    def loss(self) -> Floats:
        """(states,)"""

    @property
    def usage(self) -> Floats:
        """(resources, states)"""


@dataclass(frozen=True)
class Pair:
    """Positions of the best pair, -1 if none fits; whether all pairs were considered; how many were looked at."""

    first: int
    second: int
    complete: bool
    pairs: int


def best_pair(first: Side, second: Side, room: Floats, prices: Floats, delta: float, clock: Clock) -> Pair:
    """Join two lists.

    Args:
        first, second: partial plans; with one resource none of `second` beats another.
        room: (resources,) most that a pair may use together.
        prices: (resources,) >= 0.
        delta: only pairs whose deviations and priced unused room sum to at most this are of interest.
        clock: when its limit passes, the best pair so far is the answer.
    """
    if not first.deviation.size or not second.deviation.size:
        return Pair(-1, -1, True, 0)
    if room.size == 1:
        return _staircase(first, second, float(room[0]))
    return _Windows(first, second, room, prices, delta).run(clock)


def _staircase(first: Side, second: Side, room: float) -> Pair:
    order = np.argsort(second.usage[0], kind="stable")
    partner = np.searchsorted(second.usage[0][order], room - first.usage[0], side="right") - 1
    fits = np.flatnonzero(partner >= 0)
    if not fits.size:
        return Pair(-1, -1, True, first.deviation.size)
    partner = order[partner[fits]]
    best = int(np.argmin(first.loss[fits] + second.loss[partner]))
    return Pair(int(fits[best]), int(partner[best]), True, first.deviation.size)


class _Windows:
    """Join with several resources."""

    def __init__(self, first: Side, second: Side, room: Floats, prices: Floats, delta: float) -> None:
        self.first, self.second = first, second
        self.room, self.prices = room, prices
        self.delta = delta
        spread = prices * np.ptp(second.usage, axis=1)
        by_spread = np.argsort(-spread, kind="stable")
        self.line, self.cell = int(by_spread[0]), int(by_spread[1])
        self.best = np.inf
        self.pair = (-1, -1)
        self.pairs = 0

    def run(self, clock: Clock) -> Pair:
        """All layers, those that hardly deviate first."""
        size = self.second.deviation.size
        count = self.first.deviation.size
        if size * count <= DIRECT:
            self._look(np.repeat(np.arange(count), size), np.tile(np.arange(size), count))
            return Pair(*self.pair, True, self.pairs)
        edges = distinct(np.concatenate(([0], np.geomspace(1, size, LAYERS).astype(np.int64))))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if not self._layer(np.arange(low, high), clock):
                return Pair(*self.pair, False, self.pairs)
        return Pair(*self.pair, True, self.pairs)

    def _layer(self, states: Integers, clock: Clock) -> bool:
        """Pairs with a layer of the second list; False if time is over."""
        least = float(self.second.deviation[states[0]])
        partners = int(np.searchsorted(self.first.deviation, self.delta - least, side="right"))
        if not partners:
            return True
        usage = self.second.usage[:, states]
        width, cells, origin = self._grid(usage[self.cell], least)
        low, extent = float(usage[self.line].min()), float(np.ptp(usage[self.line]))

        def place(use: Floats) -> Floats:
            """Where a use lies on the line, in [0, 0.5] for this layer's; below or above that for others."""
            return (
                np.clip((use - low) * (0.5 / extent), -0.25, 0.75)
                if extent > np.finfo(np.float64).tiny
                else np.zeros(use.size)
            )

        # cell and place on the line in one number
        cell = np.minimum(np.floor((usage[self.cell] - origin) / width), cells - 1)
        key = cell + place(usage[self.line])
        order = np.argsort(key, kind="stable")
        key, states = key[order], states[order]

        chosen = np.arange(partners)
        spare = self.delta - least - self.first.deviation[chosen]
        top = self.room[:, None] - self.first.usage[:, chosen]
        bottom = self._bottom(top, spare)
        # windows are a hair wider than they need be, against rounding; `_look` is exact
        from_cell = np.clip(np.floor((bottom[self.cell] - origin) / width - HAIR), 0, cells - 1)
        to_cell = np.clip(np.floor((top[self.cell] - origin) / width + HAIR), -1, cells - 1)
        from_place = np.maximum(place(bottom[self.line]) - HAIR, 0.0)
        to_place = place(top[self.line]) + HAIR
        steps = np.maximum(to_cell - from_cell + 1, 0).astype(np.int64)
        steps[from_place > to_place] = 0
        rows = np.repeat(chosen, steps)
        where = from_cell[rows] + (np.arange(rows.size) - np.repeat(np.cumsum(steps) - steps, steps))
        start = np.searchsorted(key, where + from_place[rows], side="left")
        lengths = np.maximum(np.searchsorted(key, where + to_place[rows], side="right") - start, 0)
        return self._chunks(rows, start, lengths, states, clock)

    def _grid(self, usage: Floats, least: float) -> tuple[float, int, float]:
        """(width of a cell, number of cells, where the first begins) on the second resource."""
        low, extent = float(usage.min()), float(np.ptp(usage))
        price = float(self.prices[self.cell])
        width = (self.delta - least) / price if price > 0 else np.inf
        if not 0 < width < np.inf or extent <= 0:
            return max(extent, 1.0) * 2, 1, low
        cells = int(min(max(np.ceil(extent / width), 1), 1 << 16))
        return max(width, extent / cells * (1 + 1e-9)), cells, low

    def _bottom(self, top: Floats, spare: Floats) -> Floats:
        """Least use that leaves not too much unused; (resources, partial plans)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            unused = np.where(self.prices[:, None] > 0, np.maximum(spare, 0.0) / self.prices[:, None], np.inf)
        return np.asarray(top - unused)

    def _chunks(self, rows: Integers, start: Integers, lengths: Integers, states: Integers, clock: Clock) -> bool:
        """Look at the pairs of row i with the places [start, start + length) of `states`."""
        used = np.flatnonzero(lengths)
        rows, start, lengths = rows[used], start[used], lengths[used]
        ends = np.cumsum(lengths)
        position = 0
        while position < rows.size:
            if clock.over:
                return False
            before = int(ends[position - 1]) if position else 0
            stop = max(int(np.searchsorted(ends, before + CHUNK, side="right")), position + 1)
            part = slice(position, stop)
            one = np.repeat(rows[part], lengths[part])
            two = states[ranges(start[part], lengths[part])]
            self._look(one, two)
            position = stop
        return True

    def _look(self, one: Integers, two: Integers) -> None:
        self.pairs += one.size
        total = self.first.loss[one] + self.second.loss[two]
        better = np.flatnonzero(total < self.best)
        for r in range(self.room.size):
            use = self.first.usage[r, one[better]] + self.second.usage[r, two[better]]
            better = better[use <= self.room[r]]
        if better.size:
            winner = better[int(np.argmin(total[better]))]
            self.best = float(total[winner])
            self.pair = int(one[winner]), int(two[winner])
            # loss + prices @ room is deviation + priced unused room: nothing above the best is of interest
            self.delta = min(self.delta, self.best + float(self.prices @ self.room))
