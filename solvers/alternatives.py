"""What groups may have instead of their best configurations, several groups at a time.

A partial plan of the bounded programme grows by a bundle of groups in one step. Most groups have so few alternatives
within delta that several together have hardly more, and every step costs time however little it does. Neighbours are
bundled as in a tournament, all pairs of a round at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .configurations import Configurations
from .dominance import undominated_in_lists
from .structure import Floats, Integers, distinct, offsets, ranges

BUNDLED = 12
"""Most alternatives of several groups taken together."""
MOST_PRODUCTS = 48
"""Most pairs of alternatives of two bundles that are looked at to see whether few remain."""
ROUNDS = 3
"""Of the tournament: after a few, hardly any neighbours remain that can be taken together."""
SLACK = 1e-9
"""Deviations up to this much above delta, relative, are kept, so that rounding loses no plan."""


@dataclass(frozen=True, eq=False)
class Alternatives:
    """What open groups, those with several configurations within delta, may have, in bundles of groups.

    Attributes:
        base: (groups,) the first configuration of each group, which all else is relative to.
        order: (resources,) resource of each row of `usage`, those of few different values first.
        start: (bundles + 1,) offsets of each bundle's alternatives; the bundle of the most deviating first.
        deviation, loss: (alternatives,) rising deviation inside each bundle.
        usage: (resources, alternatives).
        parts: (alternatives, width) configurations of each, -1 to fill up.
    """

    base: Integers
    order: Integers
    start: Integers
    deviation: Floats
    loss: Floats
    usage: Floats
    parts: Integers

    @classmethod
    def build(cls, configurations: Configurations, groups: int, resources: Integers, delta: float) -> Alternatives:
        """Bundle what deviates by at most `delta`.

        Args:
            configurations: of all groups, by (group, deviation).
            groups: number of groups.
            resources: those that matter.
            delta: most that a plan may deviate by.
        """
        start = np.searchsorted(configurations.group, np.arange(groups + 1))
        base = start[:-1]
        near = configurations.deviation <= delta * (1 + SLACK)
        near[base] = True
        size = np.bincount(configurations.group[near], minlength=groups)
        members = np.flatnonzero(near & (size > 1)[configurations.group])
        own = base[configurations.group[members]]
        loss = configurations.loss[members] - configurations.loss[own]
        usage = configurations.usage[resources]
        usage = usage[:, members] - usage[:, own]
        order = resources
        if resources.size > 1:
            few_first = np.argsort([distinct(use).size for use in usage], kind="stable")
            order, usage = resources[few_first], usage[few_first]
        single = cls(
            base, order, offsets(size[size > 1]), configurations.deviation[members], loss, usage, members[:, None]
        )
        if not members.size:
            return single
        found = single._without_beaten()._most_deviating_first()
        for _ in range(ROUNDS):
            joined = found._joined(delta * (1 + SLACK))
            if joined is None:
                break
            found = joined
        return found

    @property
    def bundles(self) -> int:
        """Number of bundles."""
        return int(self.start.size - 1)

    def _take(self, kept: Integers, size: Integers) -> Alternatives:
        """The alternatives `kept`, in bundles of the given sizes."""
        return replace(
            self,
            start=offsets(size),
            deviation=self.deviation[kept],
            loss=self.loss[kept],
            usage=self.usage[:, kept],
            parts=self.parts[kept],
        )

    def _without_beaten(self) -> Alternatives:
        """What no other alternative of the same bundle beats."""
        kept = undominated_in_lists(self.start, self.loss, self.usage)
        return self._take(kept, np.diff(np.searchsorted(kept, self.start)))

    def _most_deviating_first(self) -> Alternatives:
        """Bundles by falling deviation of their second alternatives."""
        size = np.diff(self.start)
        second = self.deviation[self.start[:-1] + np.minimum(size, 2) - 1]
        order = np.argsort(-second, kind="stable")
        return self._take(ranges(self.start[:-1][order], size[order]), size[order])

    def _joined(self, most: float) -> Alternatives | None:
        """With neighbours taken together where they have no more than `BUNDLED` alternatives; None if none do.

        What deviates by more than `most`, or is beaten, is left out.
        """
        size = np.diff(self.start)
        pairs = self.bundles // 2
        left, right = np.arange(pairs) * 2, np.arange(pairs) * 2 + 1
        tried = np.flatnonzero(size[left] * size[right] <= MOST_PRODUCTS)
        if not tried.size:
            return None
        left, right = left[tried], right[tried]
        # every alternative of the left bundle with every one of the right
        one = ranges(self.start[left], size[left])
        partners = np.repeat(size[right], size[left])
        two = ranges(np.repeat(self.start[right], size[left]), partners)
        pair = np.repeat(np.repeat(np.arange(left.size), size[left]), partners)
        one = np.repeat(one, partners)
        deviation = self.deviation[one] + self.deviation[two]
        kept = np.flatnonzero(deviation <= most)
        one, two, pair, deviation = one[kept], two[kept], pair[kept], deviation[kept]
        loss, usage = self.loss[one] + self.loss[two], self.usage[:, one] + self.usage[:, two]
        kept = undominated_in_lists(np.searchsorted(pair, np.arange(left.size + 1)), loss, usage)
        few = np.bincount(pair[kept], minlength=left.size) <= BUNDLED
        if not few.any():
            return None
        kept = kept[few[pair[kept]]]
        # the joined ones take the place of their left bundles
        gone = np.zeros(self.bundles, dtype=bool)
        gone[left[few]] = gone[right[few]] = True
        owner = np.repeat(np.arange(self.bundles), size)
        alone = np.flatnonzero(~gone[owner])
        place = np.concatenate((owner[alone], left[pair[kept]]))
        deviation = np.concatenate((self.deviation[alone], deviation[kept]))
        order = np.lexsort((deviation, place))
        nothing = np.full_like(self.parts[alone], -1)
        parts = np.concatenate(
            (np.hstack((self.parts[alone], nothing)), np.hstack((self.parts[one[kept]], self.parts[two[kept]])))
        )
        parts = -np.sort(-parts, axis=1)
        parts = parts[:, : int((parts >= 0).sum(axis=1).max())]
        counts = np.bincount(place, minlength=self.bundles)
        return replace(
            self,
            start=offsets(counts[counts > 0]),
            deviation=deviation[order],
            loss=np.concatenate((self.loss[alone], loss[kept]))[order],
            usage=np.concatenate((self.usage[:, alone], usage[:, kept]), axis=1)[:, order],
            parts=parts[order],
        )
