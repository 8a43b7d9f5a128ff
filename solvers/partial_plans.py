"""What the bounded programme works on: partial plans, the configurations to extend them by, and prices to cut them off.

See `programme` for how they come together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .configurations import Configurations
from .dominance import undominated
from .structure import Floats, Integers

Indices = npt.NDArray[np.int32]

BUNDLED = 8
"""Most alternatives of several groups taken together."""
SLACK = 1e-9
"""Deviations up to this much above delta, relative, are kept, so that rounding loses no plan."""


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
class _Bundle:
    """Alternatives of some groups taken together, by rising deviation: one configuration of each.

    Attributes:
        deviation, loss: (alternatives,) sums; the loss relative to the groups' first configurations.
        usage: (resources, alternatives) likewise.
        parts: (alternatives, groups) the configurations.
    """

    deviation: Floats
    loss: Floats
    usage: Floats
    parts: Integers

    def joined(self, other: _Bundle, most: float) -> _Bundle:
        """With more groups: what deviates by at most `most` and isn't beaten."""
        one, two = np.nonzero(self.deviation[:, None] + other.deviation <= most)
        loss, usage = self.loss[one] + other.loss[two], self.usage[:, one] + other.usage[:, two]
        kept = undominated(loss, usage)
        deviation = self.deviation[one[kept]] + other.deviation[two[kept]]
        order = np.argsort(deviation, kind="stable")
        kept = kept[order]
        parts = np.concatenate((self.parts[one[kept]], other.parts[two[kept]]), axis=1)
        return _Bundle(deviation[order], loss[kept], usage[:, kept], parts)


@dataclass(frozen=True, eq=False)
class Alternatives:
    """What open groups may have instead of their first configurations, in bundles of groups.

    A partial plan grows by a bundle at a time: most groups have so few alternatives within delta that several
    together have hardly more.

    Attributes:
        base: (groups,) the first configuration of each group, which all else is relative to.
        order: (resources,) resource of each row of `usage`, those of few different values first.
        members: the alternatives of each bundle, by rising deviation; the bundle of the most deviating first.
        deviation, loss: (alternatives,).
        usage: (resources, alternatives).
        parts: of each alternative, its configurations.
    """

    base: Integers
    order: Integers
    members: list[Integers]
    deviation: Floats
    loss: Floats
    usage: Floats
    parts: list[Integers]

    @classmethod
    def build(cls, configurations: Configurations, groups: int, resources: Integers, delta: float) -> Alternatives:
        """Group what deviates by at most `delta`."""
        start = np.searchsorted(configurations.group, np.arange(groups + 1))
        base = start[:-1]
        own = base[configurations.group]
        loss = configurations.loss - configurations.loss[own]
        usage = configurations.usage[resources] - configurations.usage[np.ix_(resources, own)]
        few_first = np.argsort([np.unique(use).size for use in usage], kind="stable")
        order, usage = resources[few_first], usage[few_first]
        single = []
        for group in np.flatnonzero(np.diff(start) > 1).tolist():
            first, last = int(start[group]), int(start[group + 1])
            kept = first + undominated(loss[first:last], usage[:, first:last])
            single.append(_Bundle(configurations.deviation[kept], loss[kept], usage[:, kept], kept[:, None]))
        single.sort(key=lambda one: -float(one.deviation[min(1, one.deviation.size - 1)]))
        bundles: list[_Bundle] = []
        for one in single:
            if bundles and bundles[-1].deviation.size * one.deviation.size <= BUNDLED**2:
                joined = bundles[-1].joined(one, delta * (1 + SLACK))
                if joined.deviation.size <= BUNDLED:
                    bundles[-1] = joined
                    continue
            bundles.append(one)
        ends = np.cumsum([0] + [one.deviation.size for one in bundles])
        return cls(
            base,
            order,
            [np.arange(low, high) for low, high in pairwise(ends.tolist())],
            np.concatenate([np.empty(0), *(one.deviation for one in bundles)]),
            np.concatenate([np.empty(0), *(one.loss for one in bundles)]),
            np.concatenate([np.empty((order.size, 0)), *(one.usage for one in bundles)], axis=1),
            [parts for one in bundles for parts in one.parts],
        )


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
        own = float(multipliers @ room)

        def value(prices: Floats) -> tuple[float, Floats]:
            """theta(prices) - theta(multipliers), and the least priced change of each group."""
            cost = alternatives.loss + prices @ alternatives.usage
            least = np.array([cost[part].min() for part in alternatives.members])
            return float(least.sum()) - float(prices @ room) + own, least

        found, least, slack = [], [], []
        # with one resource a partial plan is hardly ever cut off by its price: dominance leaves a staircase
        for resource in np.flatnonzero(multipliers > 0).tolist() if multipliers.size > 1 else []:
            for sign in (1.0, -1.0):
                step = 0.5
                for _ in range(24):
                    prices = multipliers.copy()
                    prices[resource] *= 1 + sign * step
                    theta, each = value(prices)
                    if theta >= -delta:
                        break
                    step /= 2
                found.append(prices)
                least.append(each)
                slack.append(delta * (1 + SLACK) - theta)
        shape = (len(found), multipliers.size)
        groups = len(alternatives.members)
        return cls(np.reshape(found, shape), np.reshape(least, (len(found), groups)), np.array(slack))

    def within(self, loss: Floats, usage: Floats, spent: Floats) -> Integers:
        """Which partial plans don't deviate too much at any price, ascending; arguments as in `Partial`."""
        kept = np.ones(loss.size, dtype=bool)
        for prices, slack in zip(self.prices, self.slack + spent, strict=True):
            kept &= loss + prices @ usage <= slack
        return np.flatnonzero(kept)
