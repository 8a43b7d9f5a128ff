"""Whole steps of a resource: a tighter bound where uses come in large steps and small remainders.

Memory is such a resource: a layer's bytes change by weights x bits, the same few sizes everywhere, and a little by the
quantizer's tables. Take any step size s and write the use of every configuration, relative to the best one of its
group, as s k + r with k whole and r small. A plan that meets the cap has s sum(k) + sum(r) <= room. If no plan within
delta can have sum(k) > K = floor(room / s), its remainders having to save too much, then sum(k) <= K is a cap on
its own (a cut of Chvatal and Gomory), and it may be much tighter than the room: what lies between s K and the room
can't be used. With the price moved from the resource to its steps, the dual gains that part's price, less what the
remainders are worth. The programme then keeps whole numbers instead of bytes, with a smaller delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .configurations import Configurations
from .problem import Problem
from .structure import Floats, Integers, distinct

WORTHWHILE = 0.1
"""Least gain, as a share of delta."""
MOST_SIZES = 64
"""Most different changes of use: a resource with more has no steps."""
MOST_ENTRIES = 1_000_000
"""Of the table of sizes and configurations."""
TRIES = 8
"""Most step sizes whose cap is looked at closely."""
HAIR = 1e-6
"""Remainders must miss by so much of a step, against rounding."""
SMALLEST_STEP = 1e-9
"""Relative to all uses and the room: that many steps are counted exactly."""
_PRICES = 2.0 ** np.arange(-3, 8)


@dataclass(frozen=True, eq=False)
class Steps:
    """A resource in whole steps.

    Attributes:
        configurations: those given, with the steps as one resource more, and deviations at `multipliers`.
        multipliers: (resources + 1,) the price of the resource moved to its steps.
        room: most that the steps of a plan may sum to.
        gain: by which the dual value rises.
    """

    configurations: Configurations
    multipliers: Floats
    room: float
    gain: float


def whole_steps(
    problem: Problem, configurations: Configurations, multipliers: Floats, rounding: Floats, delta: float
) -> Steps | None:
    """The steps of the resource and size that gain most; None if none is worth it.

    Args:
        problem: supplies caps.
        configurations: all of deviation up to delta, some of each group.
        multipliers: (resources,) prices that the deviations belong to.
        rounding: (resources,) what sums of uses may be off by.
        delta: most that plans of interest deviate by.
    """
    base = np.searchsorted(configurations.group, np.arange(problem.groups))
    best: tuple[float, int, float, float] | None = None
    for resource in np.flatnonzero(multipliers > 0).tolist():
        use = _relative(configurations, base, resource)
        room = float(problem.room[resource] - configurations.usage[resource, base].sum())
        price = float(multipliers[resource])
        found = _best_size(configurations.deviation, use, base, room, float(rounding[resource]), price, delta)
        if found is not None and (best is None or found[0] > best[0]):
            best = (found[0], resource, found[1], found[2])
    if best is None:
        return None
    gain, resource, size, room = best
    use = _relative(configurations, base, resource)
    steps = np.rint(use / size)
    price = float(multipliers[resource])
    deviation = configurations.deviation - price * (use - steps * size)
    deviation -= np.repeat(np.minimum.reduceat(deviation, base), np.diff(np.append(base, deviation.size)))
    moved = np.append(multipliers, price * size)
    moved[resource] = 0.0
    return Steps(configurations.with_resource(steps, deviation), moved, room, gain)


def _relative(configurations: Configurations, base: Integers, resource: int) -> Floats:
    """Use of a resource relative to the first configuration of each group; (configurations,)."""
    use = configurations.usage[resource]
    return np.asarray(use - use[base[configurations.group]])


def _best_size(
    deviation: Floats, use: Floats, base: Integers, room: float, rounding: float, price: float, delta: float
) -> tuple[float, float, float] | None:
    """(gain, size, cap on the sum of steps) of the step size that gains most; None without one."""
    size = distinct(np.abs(use))
    size = size[size > SMALLEST_STEP * max(float(size[-1]), abs(room) + rounding)]
    if not 0 < size.size <= MOST_SIZES or size.size * use.size > MOST_ENTRIES:
        return None
    steps = np.rint(use / size[:, None])
    rest = use - steps * size[:, None]
    cap = np.floor((room + rounding) / size)
    worth = np.minimum.reduceat(deviation - price * rest, base, axis=1).sum(axis=1)
    gain = price * (room - cap * size) + worth
    for one in np.argsort(-gain, kind="stable")[:TRIES].tolist():
        if not gain[one] > WORTHWHILE * delta:
            break
        # what the remainders of a plan with more steps would have to save
        missing = float(size[one] * (cap[one] + 1) - room - rounding)
        if _out_of_reach(deviation, rest[one], base, missing - HAIR * float(size[one]), price, delta):
            return float(gain[one]), float(size[one]), float(cap[one])
    return None


def _out_of_reach(deviation: Floats, rest: Floats, base: Integers, missing: float, price: float, delta: float) -> bool:
    """Whether no plan within delta has remainders that sum to -missing or less, by what they can or by some price."""
    if float(np.minimum.reduceat(rest, base).sum()) > -missing:
        return True
    prices = price * _PRICES
    least = np.minimum.reduceat(deviation + prices[:, None] * rest, base, axis=1).sum(axis=1)
    return bool((least + prices * missing > delta * (1 + HAIR)).any())
