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
    plans = [plan]
    if fits(problem, plan):
        return Dual(value, np.zeros(1), plans, False, 1)
    over = (loss, float(excess[0]))
    reach = reachable(problem)
    plans.extend(reach.plans)
    if reach.proven_infeasible:
        return Dual(math.inf, np.zeros(1), plans, True, 2)
    lean = reach.plans[0]
    under = (float(problem.loss[lean].sum()), float(problem.usage[0, lean].sum() - problem.room[0]))
    best_value, best_price = value, 0.0
    cap = float(usable_caps(problem)[0] - problem.base[0])
    steps = 2
    while steps < MAX_STEPS and not clock.over and over[1] > under[1]:
        price = max(0.0, (under[0] - over[0]) / (over[1] - under[1]))
        value, loss, excess, plan = _evaluate(problem, np.array([price]))
        steps += 1
        plans.append(plan)
        if value > best_value:
            best_value, best_price = value, price
        line = over[0] + price * over[1]
        if value >= line - 1e-13 * (abs(line) + price * abs(cap)):
            break
        if excess[0] + problem.room[0] <= cap:
            under = (loss, float(excess[0]))
        else:
            over = (loss, float(excess[0]))
    return Dual(best_value, np.array([best_price]), plans, False, steps)


def _cut(problem: Problem, clock: Clock) -> Dual:
    """Several resources: cutting planes, in units where every room and the loss are of order 1."""
    resources = problem.resources
    value, _, _, plan = _evaluate(problem, np.zeros(resources))
    if fits(problem, plan):
        return Dual(value, np.zeros(resources), [plan], False, 1)
    reach = reachable(problem, clock=clock, only_prove=True)
    plans = [plan, *reach.plans]
    if reach.proven_infeasible:
        return Dual(math.inf, np.zeros(resources), plans, True, len(plans))
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
    found = maximise(theta, np.zeros(resources), box=100.0, cuts=known_cuts, clock=clock)
    multipliers = found.point * loss_unit / unit
    bound = max(value, found.value * loss_unit)
    return Dual(bound, multipliers, plans, False, len(plans))
