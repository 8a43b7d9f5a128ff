"""Bounded dynamic programme: the best plan among those whose deviations sum to at most delta.

At the dual optimum every plan's loss is ``dual + sum of deviations + prices @ unused room`` (see `dual` and
`configurations`), all terms non-negative: plans of loss below ``dual + delta`` consist of configurations whose
deviations sum to at most delta. Only groups with several such configurations matter. Those of few are bundled (see
`partial_plans`), and the bundles are walked in a fixed order, listing partial plans of the groups so far (prefixes);
going backwards, partial plans of the groups to come were listed before (suffixes). A falling threshold decides where
the two meet: after a share s of the groups, prefixes that deviate by more than (1 - s) delta are joined with the
suffixes there and done with; those need not deviate by more than s delta. As the number of partial plans grows
exponentially with the root of (groups x deviation), this lists the root of what two halves, each within delta, would
(Horowitz & Sahni 1974), and more.

Partial plans are dropped when they

- have no continuation within delta that keeps one of the resources exactly (see `completion`);
- deviate by too much at any of several other prices: with prices mu, dual value theta(mu) and deviations d_mu, a
  plan below ``dual + delta`` has ``theta(mu) + sum d_mu <= dual + delta``;
- are beaten by another partial plan of the same groups in loss and in every resource.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .alternatives import SLACK, Alternatives
from .clock import Clock
from .completion import Completion, Staircase
from .configurations import Configurations
from .dominance import undominated
from .join import best_pair
from .partial_plans import Partial, Prices
from .structure import Floats, Integers, distinct

BLOCKS, FEW_BLOCKS = 10, 5
"""Most places where prefixes and suffixes meet, in large programmes and in small ones: joining costs time too.
Between them prefixes may deviate by delta."""
MOST_GROUPS = 1000
"""Groups up to which continuations are bounded with one resource kept exactly."""
SMALL = 20.0
"""Logarithm of the number of plans within delta up to which a programme is small."""


@dataclass(frozen=True, eq=False)
class Found:
    """The outcome of one search.

    Attributes:
        columns: best plan within delta that meets the caps, ascending; None if there is none.
        complete: nothing was left out, so no plan of loss below ``dual + delta`` is better.
        least: up to delta, every plan that meets the caps has at least this much loss above the dual; an estimate of
            it beyond delta.
        states: partial plans listed.
        pairs: pairs looked at.
        above: loss of the plan above the dual, inf without one.
    """

    columns: Integers | None
    complete: bool
    least: float
    states: int
    pairs: int
    above: float = math.inf


class Programme:
    """One programme, to be run with any number of partial plans."""

    def __init__(
        self,
        configurations: Configurations,
        groups: int,
        room: Floats,
        multipliers: Floats,
        delta: float,
        resources: Integers,
    ) -> None:
        """Set it up.

        Args:
            configurations: all of deviation up to delta; when it isn't complete, nor is the answer.
            groups: number of groups.
            room: (resources,) most that a plan may use, rounding included.
            multipliers: (resources,) prices that the deviations belong to.
            delta: see the module; finite.
            resources: those that are kept within their room.
        """
        self.configurations = configurations
        self.alternatives = Alternatives.build(configurations, groups, resources, delta)
        order = self.alternatives.order
        self.room = (room - configurations.usage[:, self.alternatives.base].sum(axis=1))[order]
        self.multipliers = multipliers[order]
        self.prices = Prices.build(self.alternatives, self.room, self.multipliers, delta)
        self.most = delta * (1 + SLACK)
        self.completion = self._completion()
        self.least = 0.0 if self.completion is None else max(0.0, self.completion.least)
        self.states = self.limit = 0
        self.blocks = self._blocks(delta)

    def run(self, limit: int, clock: Clock) -> Found:
        """Suffixes backwards, then prefixes forwards, joined after every block.

        Args:
            limit: most partial plans of the same groups; of more, those of least deviation stay.
            clock: the search gives up when its limit has passed.
        """
        self.states, self.limit = 0, limit
        if self.least > self.most:
            return Found(None, self.configurations.complete, self.least, 0, 0)
        start = Partial.empty(self.room.size, self.prices.slack.size)
        suffixes = [start]
        for position in range(len(self.blocks) - 1, 0, -1):
            suffix = suffixes[-1].within(self.most * self.blocks[position - 1][1])
            for group in reversed(self.blocks[position][0]):
                if clock.over:
                    return Found(None, False, self.least, self.states, 0)
                rest = None if self.completion is None else self.completion.before[group]
                suffix = self._extended(suffix, group, self.most * self.blocks[position - 1][1], rest)
            suffixes.append(suffix)
        suffixes.reverse()
        prefix, delta, pairs, above = start, self.most, 0, np.inf
        chosen: tuple[Partial, int, Partial, int] | None = None
        complete = self.configurations.complete
        for (groups, share), suffix in zip(self.blocks, suffixes, strict=True):
            for group in groups:
                if clock.over:
                    return Found(self._columns(chosen), False, self.least, self.states, pairs, above)
                rest = None if self.completion is None else self.completion.behind[group + 1]
                prefix = self._extended(prefix, group, delta, rest)
            last = suffix is suffixes[-1]
            kept = 0 if last else prefix.within(self.most * (1 - share)).states
            done = prefix.part(kept, prefix.states)
            pair = best_pair(done, suffix, self.room, self.multipliers, delta, clock)
            pairs += pair.pairs
            complete &= pair.complete and prefix.complete and suffix.complete
            if pair.first >= 0:
                loss = float(done.loss[pair.first] + suffix.loss[pair.second])
                # what a plan deviates by, unused room included, is its change of loss and the priced room
                deviation = loss + float(self.multipliers @ self.room)
                if deviation < above:
                    above, chosen = deviation, (done, pair.first, suffix, pair.second)
                    delta = min(delta, above * (1 + SLACK))
            prefix = prefix.part(0, kept)
        return Found(self._columns(chosen), complete, self.least, self.states, pairs, above)

    def _blocks(self, delta: float) -> list[tuple[list[int], float]]:
        """Consecutive open groups, and the share of delta left to the suffixes behind each block's end.

        The share is where prefixes and suffixes are expected to be equally many. Of groups with deviations d, about
        exp(min over beta of beta D + sum over groups of log sum exp(-beta d)) partial plans deviate by up to D.
        """
        bundles = self.alternatives.bundles
        if not bundles or delta <= 0:
            return [(list(range(bundles)), 1.0)]
        betas = np.geomspace(0.1, 1e4, 48)
        weights = np.exp(-betas[:, None] * (self.alternatives.deviation / delta))
        before = np.cumsum(np.log(np.add.reduceat(weights, self.alternatives.start[:-1], axis=1)), axis=1)
        behind = before[:, -1:] - before
        plans = betas + before[:, -1]
        usual = int(np.argmin(plans))
        blocks = BLOCKS if plans[usual] > SMALL and self.room.size > 1 else FEW_BLOCKS
        done = before[usual] / max(float(before[usual, -1]), np.finfo(np.float64).tiny)
        ends = distinct(np.searchsorted(done, np.arange(1, blocks + 1) / blocks - 1e-9))
        ends = np.append(ends[ends < bundles - 1], bundles - 1)
        shares = np.linspace(0.0, 1.0, 65)
        spent = betas[:, None] * shares
        share = []
        for end in ends.tolist():
            prefixes = (spent[:, ::-1] + before[:, end, None]).min(axis=0)
            suffixes = (spent + behind[:, end, None]).min(axis=0)
            share.append(float(shares[int(np.argmin(np.abs(prefixes - suffixes)))]))
        share[-1] = 1.0
        share = np.maximum.accumulate(share).tolist()
        starts = [0, *(ends[:-1] + 1).tolist()]
        return [
            (list(range(first, last + 1)), each) for first, last, each in zip(starts, ends.tolist(), share, strict=True)
        ]

    def _completion(self) -> Completion | None:
        """Bounds on continuations that keep the priced resource of fewest different values exactly.

        That is the one whose price says least; the stairs of another, such as latency, are many and hardly better than
        its price. None where one resource alone has a price, since dominance leaves a staircase there anyway, and for
        very many groups, among which even large steps of a resource add up to almost anything.
        """
        priced = np.flatnonzero(self.multipliers > 0)
        if priced.size < 2 or self.alternatives.bundles > MOST_GROUPS:
            return None
        members = [slice(first, last) for first, last in pairwise(self.alternatives.start.tolist())]
        loss, usage = self.alternatives.loss, self.alternatives.usage
        return Completion(int(priced[0]), members, loss, usage, self.room, self.multipliers, self.most)

    def _extended(self, partial: Partial, group: int, most: float, rest: Staircase | None) -> Partial:
        """The partial plans with one more group, as far as they deviate by at most `most`.

        Args:
            rest: what the completion knows of the groups that are still open.
        """
        alternatives, deviation = self.alternatives, self.alternatives.deviation
        members = np.arange(alternatives.start[group], alternatives.start[group + 1])
        counts = np.searchsorted(partial.deviation, most - deviation[members], side="right")
        complete = partial.complete
        if counts.sum() > 2 * self.limit:
            sums = np.concatenate([partial.deviation[:n] + deviation[c] for n, c in zip(counts, members, strict=True)])
            most = float(np.partition(sums, 2 * self.limit)[2 * self.limit])
            counts = np.searchsorted(partial.deviation, most - deviation[members], side="right")
            complete = False
        parents = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        choices = np.repeat(members, counts)
        loss = partial.loss[parents] + alternatives.loss[choices]
        usage = partial.usage[:, parents] + alternatives.usage[:, choices]
        total = partial.deviation[parents] + deviation[choices]
        spent = partial.spent + self.prices.least[:, group]
        kept = self.prices.within(loss, usage, spent) if self.prices.slack.size else np.arange(loss.size)
        if self.completion is not None and rest is not None:
            kept = kept[self.completion.within(loss[kept], usage[:, kept], rest)]
        kept = kept[undominated(loss[kept], usage[:, kept])]
        kept = kept[np.argsort(total[kept], kind="stable")]
        if kept.size > self.limit:
            kept = kept[: self.limit]
            complete = False
        self.states += kept.size
        return Partial(
            total[kept],
            loss[kept],
            usage[:, kept],
            spent,
            partial,
            parents[kept],
            choices[kept].astype(np.int32),
            complete,
        )

    def _columns(self, chosen: tuple[Partial, int, Partial, int] | None) -> Integers | None:
        """The plan of a prefix and a suffix."""
        if chosen is None:
            return None
        prefix, one, suffix, two = chosen
        plan = self.alternatives.base.copy()
        for partial, state in ((prefix, one), (suffix, two)):
            for alternative in partial.choices_of(state):
                parts = self.alternatives.parts[alternative]
                parts = parts[parts >= 0]
                plan[self.configurations.group[parts]] = parts
        return self.configurations.columns_of(plan)
