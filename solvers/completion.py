"""Bounds on how partial plans go on: one resource kept exactly, the others at their price.

Prices alone bound the rest of a plan as if its columns could be split. Where a resource comes in few large steps, as
memory does, that bound is weak. Here the cheapest continuations under a cap on one resource are listed, a staircase
of (use, cost) for the groups to come, cost being the loss and the priced use of all other resources. A partial plan
whose own cost and the stair below its room for that resource exceed delta can't lead to a plan within delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .dominance import staircase
from .structure import Floats, Integers


@dataclass(frozen=True, eq=False)
class Staircase:
    """Continuations that no other beats in both: `usage` rises, `cost` falls; (stairs,) each."""

    usage: Floats
    cost: Floats

    def least_cost(self, room: Floats) -> Floats:
        """Least cost of a continuation that uses at most `room` (states,); inf where none does."""
        if not self.usage.size:
            return np.full(room.size, np.inf)
        stair = np.searchsorted(self.usage, room, side="right") - 1
        return np.where(stair >= 0, self.cost[stair], np.inf)

    def extended(self, usage: Floats, cost: Floats, price: float, most: float) -> Staircase:
        """Continuations with one more group, without those of ``cost + price * usage`` above `most`."""
        use = (usage[:, None] + self.usage).ravel()  # one rising run after the other: quick to sort
        costs = (cost[:, None] + self.cost).ravel()
        kept = np.flatnonzero(costs + price * use <= most)
        order = kept[staircase(costs[kept], use[kept])]
        return Staircase(use[order], costs[order])


MOST_STAIRS = 2_000_000
"""Of all groups together; 16 bytes each."""
UNKNOWN = Staircase(np.array([-np.inf]), np.array([-np.inf]))
"""Says nothing: any continuation may cost anything."""


class Completion:
    """Staircases of one resource, for the groups before and behind every place in their order.

    Attributes:
        behind: (groups + 1,) `behind[i]` continues over the groups from place i on.
        least: up to delta, what every plan that meets the caps deviates by at least, unused room included; an estimate
            of that beyond delta.
    """

    def __init__(
        self,
        resource: int,
        members: Sequence[slice] | Sequence[Integers],
        loss: Floats,
        usage: Floats,
        room: Floats,
        multipliers: Floats,
        delta: float,
    ) -> None:
        """List the stairs.

        Args:
            resource: the one that is kept exactly.
            members: configurations of each group, in the order in which partial plans grow.
            loss: (configurations,) relative to the group's first.
            usage: (resources, configurations) likewise.
            room: (resources,) left by the first configurations.
            multipliers: (resources,) the dual's prices.
            delta: most that a plan may deviate.
        """
        self.resource = resource
        self.others = np.where(np.arange(room.size) == resource, 0.0, multipliers)
        self.room = float(room[resource])
        price = float(multipliers[resource])
        self._most = delta - price * self.room
        cost = loss + self.others @ usage
        self._steps = [(usage[resource, part], cost[part]) for part in members]
        self._price, self._delta = price, delta
        self.behind = self._continued(reversed(self._steps))
        self.behind.reverse()
        rest = float(self.behind[0].least_cost(np.array([self.room]))[0])
        self.least = min(rest + price * self.room, 2 * delta)

    @cached_property
    def before(self) -> list[Staircase]:
        """(groups + 1,) `before[i]` continues over the groups in front of place i."""
        return self._continued(self._steps)

    def _continued(self, steps: Iterable[tuple[Floats, Floats]]) -> list[Staircase]:
        """Nothing is known after the first place where there are too many stairs."""
        stairs = [Staircase(np.zeros(1), np.zeros(1))]
        total = 0
        for usage, cost in steps:
            known = total <= MOST_STAIRS
            stairs.append(stairs[-1].extended(usage, cost, self._price, self._delta) if known else UNKNOWN)
            total += stairs[-1].cost.size
        return stairs

    def within(self, loss: Floats, usage: Floats, rest: Staircase) -> Integers:
        """Which partial plans may lead to a plan within delta, ascending.

        A plan that meets the caps has ``loss + multipliers @ room <= delta`` if it is of interest, and doesn't use
        more of the other resources than there is room.

        Args:
            loss, usage: of partial plans, (states,) and (resources, states).
            rest: of the groups that they leave open.
        """
        cost = loss + self.others @ usage
        return np.flatnonzero(cost + rest.least_cost(self.room - usage[self.resource]) <= self._most)
