"""What the bounded programme works on: partial plans, and prices to cut them off by.

See `programme` for how they come together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .alternatives import SLACK, Alternatives
from .structure import Floats, Integers

Indices = npt.NDArray[np.int32]

STEPS = 0.5 ** np.arange(1, 25)
"""Relative changes of a price that are tried, the largest first."""


@dataclass(frozen=True, eq=False)
class Partial:
    """Partial plans of some groups, sorted by deviation, relative to the best configurations.

    Attributes:
        deviation: (states,) sum of deviations at the dual's prices.
        loss: (states,) change of loss.
        usage: (resources, states) change of use.
        spent: (prices,) least priced change of loss of these groups, see `Prices`.
        previous: partial plans that these extend by one bundle; None for the empty one.
        parents, choices: (states,) the state in `previous`, and the alternative added to it.
        complete: no partial plan was left out for want of space.
    """

    deviation: Floats
    loss: Floats
    usage: Floats
    spent: Floats
    previous: Partial | None
    parents: Indices
    choices: Indices
    complete: bool = True

    @classmethod
    def empty(cls, resources: int, prices: int) -> Partial:
        """The one partial plan of no groups."""
        nothing = np.zeros(1, dtype=np.int32)
        return cls(np.zeros(1), np.zeros(1), np.zeros((resources, 1)), np.zeros(prices), None, nothing, nothing)

    @property
    def states(self) -> int:
        """Number of partial plans."""
        return int(self.deviation.size)

    def part(self, first: int, last: int) -> Partial:
        """The states [first, last)."""
        kept = slice(first, last)
        return Partial(
            self.deviation[kept],
            self.loss[kept],
            self.usage[:, kept],
            self.spent,
            self.previous,
            self.parents[kept],
            self.choices[kept],
            self.complete,
        )

    def within(self, most: float) -> Partial:
        """The states that deviate by at most `most`."""
        return self.part(0, int(np.searchsorted(self.deviation, most, side="right")))

    def choices_of(self, state: int) -> Iterator[int]:
        """The alternatives of one partial plan."""
        level = self
        while level.previous is not None:
            yield int(level.choices[state])
            state = int(level.parents[state])
            level = level.previous


@dataclass(frozen=True, eq=False)
class Prices:
    """Other prices, by which partial plans are cut off too.

    Attributes:
        prices: (prices, resources).
        least: (prices, bundles) least priced change of loss in each bundle.
        slack: (prices,) what the deviations of a plan below ``dual + delta`` may sum to.
    """

    prices: Floats
    least: Floats
    slack: Floats

    @classmethod
    def build(cls, alternatives: Alternatives, room: Floats, multipliers: Floats, delta: float) -> Prices:
        """Prices around the dual's, each as far away as costs about delta of the dual value.

        Args:
            alternatives: open groups.
            room: (resources,) room left by the base configurations.
            multipliers: (resources,) the dual's prices, both in the order of the alternatives.
            delta: see the module.
        """
        found, least, slack = [], [], []
        # with one resource a partial plan is hardly ever cut off by its price: dominance leaves a staircase
        several = multipliers.size > 1 and alternatives.bundles > 0
        for resource in np.flatnonzero(multipliers > 0).tolist() if several else []:
            for step in (STEPS, -STEPS):
                prices = np.tile(multipliers, (step.size, 1))
                prices[:, resource] *= 1 + step
                cost = alternatives.loss + prices @ alternatives.usage
                each = np.minimum.reduceat(cost, alternatives.start[:-1], axis=1)
                # theta(prices) - theta(multipliers)
                theta = each.sum(axis=1) - (prices - multipliers) @ room
                near = np.flatnonzero(theta >= -delta)
                one = int(near[0]) if near.size else step.size - 1
                found.append(prices[one])
                least.append(each[one])
                slack.append(delta * (1 + SLACK) - theta[one])
        shape = (len(found), multipliers.size)
        return cls(np.reshape(found, shape), np.reshape(least, (len(found), alternatives.bundles)), np.array(slack))

    def within(self, loss: Floats, usage: Floats, spent: Floats) -> Integers:
        """Which partial plans don't deviate too much at any price, ascending; arguments as in `Partial`."""
        kept = np.ones(loss.size, dtype=bool)
        for prices, slack in zip(self.prices, self.slack + spent, strict=True):
            kept &= loss + prices @ usage <= slack
        return np.flatnonzero(kept)
