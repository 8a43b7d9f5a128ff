"""Which bounded programmes find the best plan within delta, the cheapest first.

With a resource in whole steps (see `steps`) or a resource left aside, the programme is much smaller. Both are
relaxations: what they exclude is excluded, and when the plan that they find meets all caps, nothing is lost.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .alternatives import SLACK
from .clock import Clock
from .configurations import Configurations
from .problem import Problem
from .programme import Found, Programme
from .reach import fits
from .steps import whole_steps
from .structure import Floats, Integers

FEW_STATES = 1000
"""Partial plans of the same groups that most often suffice for a plan near the best."""
ROUNDING = 64 * np.finfo(np.float64).eps
"""Of sums of uses, relative to the sum of the base configurations'."""


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
    base = configurations.usage[:, np.searchsorted(configurations.group, np.arange(problem.groups))].sum(axis=1)
    # what sums of uses may be off by; a plan that takes this room is refused later
    rounding = np.maximum(0.5e-12 * np.abs(problem.caps), ROUNDING * (np.abs(problem.caps) + base))
    room = problem.room + rounding
    steps = whole_steps(problem, configurations, multipliers, rounding, delta)
    if steps is not None:
        within = delta * (1 + SLACK) - steps.gain
        if within < 0:
            return Found(None, configurations.complete, steps.gain, 0, 0)
        priced = np.flatnonzero(steps.multipliers > 0)
        room_in_steps = np.append(room, steps.room)
        stepped = (steps.configurations, problem.groups, room_in_steps, steps.multipliers, within, priced)
        found = _narrowed(stepped, limit, clock)
        if found.columns is None or fits(problem, found.columns):
            return replace(found, least=found.least + steps.gain)
    priced = np.flatnonzero(multipliers > 0)
    if 0 < priced.size < problem.resources:
        found = _narrowed((configurations, problem.groups, room, multipliers, delta, priced), limit, clock)
        if found.complete and (found.columns is None or fits(problem, found.columns)):
            return found
    every = np.arange(problem.resources)
    return _narrowed((configurations, problem.groups, room, multipliers, delta, every), limit, clock)


def _narrowed(
    arguments: tuple[Configurations, int, Floats, Floats, float, Integers], limit: int, clock: Clock
) -> Found:
    """A programme with few partial plans first; when these don't suffice, with a delta that their best plan allows.

    With one price partial plans are few anyway.

    Args:
        arguments: of `Programme`.
        limit, clock: see `search`.
    """
    configurations, groups, room, multipliers, delta, resources = arguments
    programme = Programme(*arguments)
    few = FEW_STATES if np.count_nonzero(multipliers) > 1 else limit
    first = programme.run(min(limit, few), clock)
    if first.complete or limit <= few or clock.over:
        return first
    if first.above < delta:
        programme = Programme(configurations, groups, room, multipliers, first.above, resources)
    found = programme.run(limit, clock)
    if found.columns is None or first.above < found.above:
        found = replace(found, columns=first.columns, above=first.above)
    return replace(found, states=first.states + found.states, pairs=first.pairs + found.pairs)
