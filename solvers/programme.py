"""Bounded dynamic programme: the best plan among those whose deviations sum to at most delta.

At the dual optimum every plan's loss is ``dual + sum of deviations + prices @ unused room`` (see `dual` and
`configurations`), all terms non-negative: plans of loss below ``dual + delta`` consist of configurations whose
deviations sum to at most delta. The groups that have more than one such configuration are dealt out to two
halves (Horowitz & Sahni 1974). Each half lists its partial plans, group by group, and drops those that

- deviate by more than delta, at the dual's prices or at any of several others: with prices mu, dual value
  theta(mu) and deviations d_mu, a plan below ``dual + delta`` has ``theta(mu) + sum d_mu <= dual + delta``;
- another partial plan of the same half beats in loss and in every resource.

Then the halves are joined: pairs of partial plans that together meet the caps and deviate least.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .clock import Clock
from .configurations import Configurations
from .dominance import undominated
from .join import best_pair
from .problem import Problem
from .reach import fits
from .structure import Floats, Integers

SLACK = 1e-9
"""Deviations up to this much above delta, relative, are kept, so that rounding loses no plan."""


@dataclass(frozen=True, eq=False)
class Found:
    """The outcome of one search.

    Attributes:
        columns: best plan within delta that meets the caps, ascending; None if there is none.
        complete: nothing was left out, so no plan of loss below ``dual + delta`` is better.
        states: partial plans listed at the end, both halves.
        pairs: pairs looked at.
    """

    columns: Integers | None
    complete: bool
    states: int
    pairs: int


@dataclass(eq=False)
class Half:
    """Partial plans of some groups, sorted by deviation, relative to the best configurations.

    Attributes:
        deviation: (states,) sum of deviations at the dual's prices.
        loss: (states,) change of loss.
        usage: (resources, states) change of use.
        parents, choices: for each group dealt to this half, (states then,) the state that each came from and
            the configuration that it added.
    """

    deviation: Floats
    loss: Floats
    usage: Floats
    parents: list[Integers] = field(default_factory=list)
    choices: list[Integers] = field(default_factory=list)

    @classmethod
    def start(cls, resources: int) -> Half:
        """The one partial plan of no groups."""
        return cls(np.zeros(1), np.zeros(1), np.zeros((resources, 1)))

    @property
    def states(self) -> int:
        """Number of partial plans."""
        return int(self.deviation.size)

    def choices_of(self, state: int) -> list[int]:
        """The configurations of one partial plan."""
        chosen = []
        for parents, choices in zip(reversed(self.parents), reversed(self.choices), strict=True):
            chosen.append(int(choices[state]))
            state = int(parents[state])
        return chosen


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
        return cls(
            np.reshape(found, shape), np.reshape(least, (len(found), len(alternatives.members))), np.array(slack)
        )


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
        limit: most partial plans in each half; of more, those of least deviation stay.
        clock: the search gives up when its limit has passed.
    """
    everything = np.arange(problem.resources)
    priced = np.flatnonzero(multipliers > 0)
    if 0 < priced.size < problem.resources:
        found = _search(problem, configurations, multipliers, delta, priced, limit, clock)
        if found.complete and (found.columns is None or fits(problem, found.columns)):
            return found
    return _search(problem, configurations, multipliers, delta, everything, limit, clock)


def _search(
    problem: Problem,
    configurations: Configurations,
    multipliers: Floats,
    delta: float,
    resources: Integers,
    limit: int,
    clock: Clock,
) -> Found:
    """`search` with some of the resources."""
    alternatives = _Alternatives.build(configurations, problem.groups, resources)
    order = alternatives.order
    rounding = 0.5e-12 * np.abs(problem.caps)
    room = (problem.room + rounding - configurations.usage[:, alternatives.base].sum(axis=1))[order]
    prices = _Prices.build(alternatives, room, multipliers[order], delta)
    halves = (Half.start(order.size), Half.start(order.size))
    spent = np.zeros((2, prices.slack.size))
    complete = configurations.complete
    for position, members in enumerate(alternatives.members):
        if clock.over:
            return Found(None, False, sum(half.states for half in halves), 0)
        side = int(halves[1].states < halves[0].states)
        spent[side] += prices.least[:, position]
        complete &= _extend(halves[side], alternatives, configurations.deviation, members, delta, limit)
        _prune(halves[side], prices, spent[side])
    pair = best_pair(halves[0], halves[1], room, multipliers[order], delta * (1 + SLACK), clock)
    columns = None
    if pair.first >= 0:
        chosen = alternatives.base.copy()
        for configuration in halves[0].choices_of(pair.first) + halves[1].choices_of(pair.second):
            chosen[configurations.group[configuration]] = configuration
        columns = configurations.columns_of(chosen)
    return Found(columns, complete and pair.complete, sum(half.states for half in halves), pair.pairs)


def _extend(
    half: Half, alternatives: _Alternatives, deviation: Floats, members: Integers, delta: float, limit: int
) -> bool:
    """Add a group to a half; False if partial plans had to be left out."""
    most = delta * (1 + SLACK)
    counts = np.searchsorted(half.deviation, most - deviation[members], side="right")
    complete = True
    if counts.sum() > 2 * limit:
        sums = np.concatenate([half.deviation[:n] + deviation[c] for n, c in zip(counts, members, strict=True)])
        most = float(np.partition(sums, 2 * limit)[2 * limit])
        counts = np.searchsorted(half.deviation, most - deviation[members], side="right")
        complete = False
    parents = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    choices = np.repeat(members, counts)
    loss = half.loss[parents] + alternatives.loss[choices]
    usage = half.usage[:, parents] + alternatives.usage[:, choices]
    total = half.deviation[parents] + deviation[choices]
    kept = undominated(loss, usage)
    kept = kept[np.argsort(total[kept], kind="stable")]
    if kept.size > limit:
        kept = kept[:limit]
        complete = False
    half.deviation, half.loss, half.usage = total[kept], loss[kept], usage[:, kept]
    half.parents.append(parents[kept])
    half.choices.append(choices[kept].astype(np.int32))
    return complete


def _prune(half: Half, prices: _Prices, spent: Floats) -> None:
    """Drop partial plans that deviate too much at other prices.

    `spent` (prices,) is the least priced change of the half's groups.
    """
    if not prices.slack.size:
        return
    priced = half.loss + prices.prices @ half.usage
    kept = (priced <= (prices.slack + spent)[:, None]).all(axis=0)
    if kept.all():
        return
    half.deviation, half.loss, half.usage = half.deviation[kept], half.loss[kept], half.usage[:, kept]
    half.parents[-1], half.choices[-1] = half.parents[-1][kept], half.choices[-1][kept]
