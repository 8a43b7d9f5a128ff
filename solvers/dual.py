"""The Lagrangian dual: prices of the resources at which the best unconstrained plan costs most.

For prices lambda >= 0,

    theta(lambda) = min_x sum_c (loss_c + sum_r lambda_r usage_rc) x_c  -  sum_r lambda_r room_r

bounds every plan's loss from below; `theta` is concave and piecewise linear, each plan x being one piece. Its
maximum equals the bound of the linear relaxation over whole-group configurations. With one resource it is
found exactly, by intersecting the pieces of the two plans on either side of the cap (Handler & Zang 1980);
with several by cutting planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .cutting_planes import Cut, maximise
from .problem import Problem
from .reach import fits, reachable, usable_caps
from .structure import Floats, Integers

MAX_STEPS = 500


@dataclass(frozen=True, eq=False)
class Dual:
    """The maximum of the dual, and the plans that led to it.

    Attributes:
        value: lower bound on the loss of every plan; inf when proven infeasible.
        multipliers: (resources,) prices, loss per unit of each resource.
        plans: plans met on the way (columns, ascending), latest last; some meet the caps, others don't.
        infeasible: no plan meets the caps.
        evaluations: how often the columns were walked.
    """

    value: float
    multipliers: Floats
    plans: list[Integers]
    infeasible: bool
    evaluations: int


def priced(problem: Problem, multipliers: Floats) -> Floats:
    """Loss plus the price of the resources, of each column; (columns,)."""
    return np.asarray(problem.loss + multipliers @ problem.usage)


def solve_dual(problem: Problem, clock: Clock) -> Dual:
    """Maximise the dual of a problem with any number of resources, or stop early when time is over."""
    if problem.resources == 1:
        return _intersect(problem, clock)
    return _cut(problem, clock)


def _evaluate(problem: Problem, multipliers: Floats) -> tuple[float, float, Floats, Integers]:
    """(theta, loss, room used beyond what there is (resources,), plan) at the given prices."""
    value, plan = problem.structure.evaluate(priced(problem, multipliers))
    excess = problem.usage[:, plan].sum(axis=1) - problem.room
    return value - float(multipliers @ problem.room), float(problem.loss[plan].sum()), excess, plan


def _intersect(problem: Problem, clock: Clock) -> Dual:
    """One resource: exact, in about as many evaluations as the bits it takes to tell the pieces apart."""
    value, loss, excess, plan = _evaluate(problem, np.zeros(1))
    if fits(problem, plan):
        return Dual(value, np.zeros(1), [plan], False, 1)
    reach = reachable(problem)
    if reach.proven_infeasible:
        return Dual(math.inf, np.zeros(1), [plan, *reach.plans], True, 2)
    found = _along(problem, 0, (loss, excess), reach.plans[0], clock)
    bound, price = max((value, 0.0), (found.value, found.price))
    return Dual(bound, np.array([price]), [plan, *reach.plans, *found.plans], False, 2 + len(found.plans))


@dataclass(frozen=True, eq=False)
class _Along:
    """The maximum of the dual when one resource alone has a price.

    Attributes:
        value, price: the maximum, and where.
        plans: plans met on the way.
        excess: (resources,) of the mixture of the last two plans, on either side of the cap, that meets it exactly.
    """

    value: float
    price: float
    plans: list[Integers]
    excess: Floats


def _along(problem: Problem, resource: int, cheapest: tuple[float, Floats], lean: Integers, clock: Clock) -> _Along:
    """Maximise over the price of one resource, the others' being zero.

    Args:
        problem: any.
        resource: the one with a price.
        cheapest: (loss, excess (resources,)) of the plan of least loss, which exceeds the resource's cap.
        lean: a plan that doesn't.
        clock: ends the search early.
    """
    room, cap = problem.room[resource], float(usable_caps(problem)[resource] - problem.base[resource])
    over = cheapest
    under = (float(problem.loss[lean].sum()), problem.usage[:, lean].sum(axis=1) - problem.room)
    best_value, best_price = -math.inf, 0.0
    plans: list[Integers] = []
    prices = np.zeros(problem.resources)
    while len(plans) < MAX_STEPS and not clock.over and over[1][resource] > under[1][resource]:
        price = max(0.0, (under[0] - over[0]) / float(over[1][resource] - under[1][resource]))
        if plans and price == prices[resource]:  # rounding hides that the pieces meet
            break
        prices[resource] = price
        value, loss, excess, plan = _evaluate(problem, prices)
        plans.append(plan)
        if value > best_value:
            best_value, best_price = value, price
        line = over[0] + price * float(over[1][resource])
        if value >= line - 1e-13 * (abs(line) + price * abs(cap)):
            break
        if excess[resource] + room <= cap:
            under = (loss, excess)
        else:
            over = (loss, excess)
    apart = float(over[1][resource] - under[1][resource])
    share = min(max(-float(under[1][resource]) / apart, 0.0), 1.0) if apart > 0 else 0.0
    return _Along(best_value, best_price, plans, share * over[1] + (1 - share) * under[1])


def _cut(problem: Problem, clock: Clock) -> Dual:
    """Several resources: cutting planes, in units where every room and the loss are of order 1.

    Often one resource alone is scarce. Its price is looked for first: where the mixture of the plans that are best at
    that price meets the other caps, no other price can be of use, for it is a supergradient.
    """
    resources = problem.resources
    value, loss, excess, plan = _evaluate(problem, np.zeros(resources))
    if fits(problem, plan):
        return Dual(value, np.zeros(resources), [plan], False, 1)
    reach = reachable(problem, clock=clock, only_prove=True)
    plans = [plan, *reach.plans]
    if reach.proven_infeasible:
        return Dual(math.inf, np.zeros(resources), plans, True, len(plans))
    start = np.zeros(resources)
    scarce = int(np.argmax(excess / np.where(problem.room > 0, problem.room, np.inf)))
    if excess[scarce] > 0 and problem.usage[scarce, reach.plans[scarce]].sum() <= problem.room[scarce]:
        found = _along(problem, scarce, (loss, excess), reach.plans[scarce], clock)
        plans += found.plans
        if (np.delete(found.excess, scarce) <= 0).all():
            start[scarce] = found.price
            return Dual(max(value, found.value), start, plans, False, len(plans))
        start[scarce] = found.price
    uses = [problem.usage[:, known].sum(axis=1) for known in plans]
    losses = [float(problem.loss[known].sum()) for known in plans]
    room = np.where(problem.room > 0, problem.room, 0.0)
    unit = np.where(room > 0, room, np.max(uses, axis=0))
    unit[unit <= 0] = 1.0
    loss_unit = max(*losses, np.finfo(np.float64).tiny)

    def cut(known_loss: float, use: Floats) -> Cut:
        return known_loss / loss_unit, (use - problem.room) / unit

    def theta(point: Floats) -> Cut:
        _, known_loss, excess, known = _evaluate(problem, point * loss_unit / unit)
        plans.append(known)
        return known_loss / loss_unit, excess / unit

    known_cuts = [cut(*pair) for pair in zip(losses, uses, strict=True)]
    best = maximise(theta, start * unit / loss_unit, box=100.0, cuts=known_cuts, clock=clock)
    multipliers = best.point * loss_unit / unit
    bound = max(value, best.value * loss_unit)
    return Dual(bound, multipliers, plans, False, len(plans))
