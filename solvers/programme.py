"""Bounded dynamic programme: the best plan among those whose deviations sum to at most delta.

At the dual optimum every plan's loss is ``dual + sum of deviations + prices @ unused room`` (see `dual` and
`configurations`), all terms non-negative: plans of loss below ``dual + delta`` consist of configurations whose
deviations sum to at most delta. Only groups with several such configurations matter. They are walked in a fixed
order, listing partial plans of the groups so far (prefixes); going backwards, partial plans of the groups to come
were listed before (suffixes). A falling threshold decides where the two meet: after a share s of the groups,
prefixes that deviate by more than (1 - s) delta are joined with the suffixes there and done with; those need not
deviate by more than s delta. As the number of partial plans grows exponentially with the root of (groups x
deviation), this lists the root of what two halves, each within delta, would (Horowitz & Sahni 1974), and more.

Partial plans are dropped when they

- deviate by too much at any of several other prices: with prices mu, dual value theta(mu) and deviations d_mu, a
  plan below ``dual + delta`` has ``theta(mu) + sum d_mu <= dual + delta``;
- are beaten by another partial plan of the same groups in loss and in every resource.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .clock import Clock
from .configurations import Configurations
from .dominance import undominated
from .join import best_pair
from .problem import Problem
from .reach import fits
from .structure import Floats, Integers

Indices = npt.NDArray[np.int32]

SLACK = 1e-9
"""Deviations up to this much above delta, relative, are kept, so that rounding loses no plan."""
BLOCKS, FEW_BLOCKS = 20, 5
"""Most places where prefixes and suffixes meet, in large programmes and in small ones: joining costs time too.
Between them prefixes may deviate by delta."""
SMALL = 20.0
"""Logarithm of the number of plans within delta up to which a programme is small."""


@dataclass(frozen=True, eq=False)
class Found:
    """The outcome of one search.

    Attributes:
        columns: best plan within delta that meets the caps, ascending; None if there is none.
        complete: nothing was left out, so no plan of loss below ``dual + delta`` is better.
        states: partial plans listed.
        pairs: pairs looked at.
    """

    columns: Integers | None
    complete: bool
    states: int
    pairs: int


@dataclass(frozen=True, eq=False)
class Partial:
    """Partial plans of some groups, sorted by deviation, relative to the best configurations.

    Attributes:
        deviation: (states,) sum of deviations at the dual's prices.
        loss: (states,) change of loss.
        usage: (resources, states) change of use.
        spent: (prices,) least priced change of loss of these groups, see `_Prices`.
        previous: partial plans that these extend by one group; None for the empty one.
        parents, choices: (states,) the state in `previous`, and the configuration added to it.
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
        """The configurations of one partial plan."""
        level = self
        while level.previous is not None:
            yield int(level.choices[state])
            state = int(level.parents[state])
            level = level.previous


@dataclass(frozen=True, eq=False)
class _Alternatives:
    """Open groups and their configurations, the group whose second configuration deviates most first.

    Attributes:
        base: (groups,) the first configuration of each group, which others are relative to.
        members: for each open group, its configurations that aren't dominated, by rising deviation.
        loss: (configurations,) relative to the group's base.
        usage: (resources, configurations) likewise, resources of few different values first.
        order: (resources,) resource of each row of `usage`.
    """

    base: Integers
    members: list[Integers]
    loss: Floats
    usage: Floats
    order: Integers

    @classmethod
    def build(cls, configurations: Configurations, groups: int, resources: Integers) -> _Alternatives:
        start = np.searchsorted(configurations.group, np.arange(groups + 1))
        base = start[:-1]
        own = base[configurations.group]
        loss = configurations.loss - configurations.loss[own]
        usage = configurations.usage[resources] - configurations.usage[np.ix_(resources, own)]
        few_first = np.argsort([np.unique(use).size for use in usage], kind="stable")
        order, usage = resources[few_first], usage[few_first]
        members = []
        for group in np.flatnonzero(np.diff(start) > 1).tolist():
            first, last = int(start[group]), int(start[group + 1])
            members.append(first + undominated(loss[first:last], usage[:, first:last]))
        deviation = configurations.deviation
        members.sort(key=lambda part: -float(deviation[part[min(1, part.size - 1)]]))
        return cls(base, members, loss, usage, order)


@dataclass(frozen=True, eq=False)
class _Prices:
    """Other prices, by which partial plans are cut off too.

    Attributes:
        prices: (prices, resources).
        least: (prices, open groups) least priced change of loss in each group.
        slack: (prices,) what the deviations of a plan below ``dual + delta`` may sum to.
    """

    prices: Floats
    least: Floats
    slack: Floats

    @classmethod
    def build(cls, alternatives: _Alternatives, room: Floats, multipliers: Floats, delta: float) -> _Prices:
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


def search(
    problem: Problem,
    configurations: Configurations,
    multipliers: Floats,
    delta: float,
    *,
    limit: int,
    clock: Clock,
) -> Found:
    """Find the best plan whose deviations sum to at most `delta`.

    A resource without a price is left aside at first: the programme is much smaller with one resource less, and
    when the plan it finds meets that cap as well, nothing is lost.

    Args:
        problem: supplies caps and groups.
        configurations: all of deviation up to delta; when it isn't complete, nor is the answer.
        multipliers: (resources,) prices that the deviations belong to.
        delta: see the module; finite.
        limit: most partial plans of the same groups; of more, those of least deviation stay.
        clock: the search gives up when its limit has passed.
    """
    priced = np.flatnonzero(multipliers > 0)
    if 0 < priced.size < problem.resources:
        found = _Search(problem, configurations, multipliers, delta, priced, limit).run(clock)
        if found.complete and (found.columns is None or fits(problem, found.columns)):
            return found
    return _Search(problem, configurations, multipliers, delta, np.arange(problem.resources), limit).run(clock)


class _Search:
    """`search` with some of the resources."""

    def __init__(
        self,
        problem: Problem,
        configurations: Configurations,
        multipliers: Floats,
        delta: float,
        resources: Integers,
        limit: int,
    ) -> None:
        self.configurations, self.limit = configurations, limit
        self.alternatives = _Alternatives.build(configurations, problem.groups, resources)
        order = self.alternatives.order
        rounding = 0.5e-12 * np.abs(problem.caps)
        base = configurations.usage[:, self.alternatives.base].sum(axis=1)
        self.room = (problem.room + rounding - base)[order]
        self.multipliers = multipliers[order]
        self.prices = _Prices.build(self.alternatives, self.room, self.multipliers, delta)
        self.most = delta * (1 + SLACK)
        self.states = 0
        self.blocks = self._blocks(delta)

    def run(self, clock: Clock) -> Found:
        """Suffixes backwards, then prefixes forwards, joined after every block."""
        start = Partial.empty(self.room.size, self.prices.slack.size)
        suffixes = [start]
        for position in range(len(self.blocks) - 1, 0, -1):
            suffix = suffixes[-1].within(self.most * self.blocks[position - 1][1])
            for group in reversed(self.blocks[position][0]):
                if clock.over:
                    return Found(None, False, self.states, 0)
                suffix = self._extended(suffix, group, self.most * self.blocks[position - 1][1])
            suffixes.append(suffix)
        suffixes.reverse()
        prefix, delta, pairs, best = start, self.most, 0, np.inf
        chosen: tuple[Partial, int, Partial, int] | None = None
        complete = self.configurations.complete
        for (groups, share), suffix in zip(self.blocks, suffixes, strict=True):
            for group in groups:
                if clock.over:
                    return Found(self._columns(chosen), False, self.states, pairs)
                prefix = self._extended(prefix, group, delta)
            last = suffix is suffixes[-1]
            kept = 0 if last else prefix.within(self.most * (1 - share)).states
            done = prefix.part(kept, prefix.states)
            pair = best_pair(done, suffix, self.room, self.multipliers, delta, clock)
            pairs += pair.pairs
            complete &= pair.complete and prefix.complete and suffix.complete
            if pair.first >= 0:
                loss = float(done.loss[pair.first] + suffix.loss[pair.second])
                if loss < best:
                    best, chosen = loss, (done, pair.first, suffix, pair.second)
                    # what a plan deviates by, unused room included, is its change of loss and the priced room
                    delta = min(delta, (best + float(self.multipliers @ self.room)) * (1 + SLACK))
            prefix = prefix.part(0, kept)
        return Found(self._columns(chosen), complete, self.states, pairs)

    def _blocks(self, delta: float) -> list[tuple[list[int], float]]:
        """Consecutive open groups, and the share of delta left to the suffixes behind each block's end.

        The share is where prefixes and suffixes are expected to be equally many. Of groups with deviations d, about
        exp(min over beta of beta D + sum over groups of log sum exp(-beta d)) partial plans deviate by up to D.
        """
        members = self.alternatives.members
        if not members or delta <= 0:
            return [(list(range(len(members))), 1.0)]
        deviation = self.configurations.deviation / delta
        betas = np.geomspace(0.1, 1e4, 48)
        weights = np.exp(-betas[:, None] * deviation[np.concatenate(members)])
        first = np.cumsum([0] + [part.size for part in members[:-1]])
        before = np.cumsum(np.log(np.add.reduceat(weights, first, axis=1)), axis=1)
        behind = before[:, -1:] - before
        plans = betas + before[:, -1]
        usual = int(np.argmin(plans))
        blocks = BLOCKS if plans[usual] > SMALL and self.room.size > 1 else FEW_BLOCKS
        done = before[usual] / max(float(before[usual, -1]), np.finfo(np.float64).tiny)
        ends = np.unique(np.searchsorted(done, np.arange(1, blocks + 1) / blocks - 1e-9))
        ends = np.append(ends[ends < len(members) - 1], len(members) - 1)
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

    def _extended(self, partial: Partial, group: int, most: float) -> Partial:
        """The partial plans with one more group, as far as they deviate by at most `most`."""
        alternatives, deviation = self.alternatives, self.configurations.deviation
        members = alternatives.members[group]
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
        kept = self.prices.within(loss, usage, spent)
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
            for configuration in partial.choices_of(state):
                plan[self.configurations.group[configuration]] = configuration
        return self.configurations.columns_of(plan)
