"""The dual bound, and a plan repaired from the plans around it.

The dual (see `dual`) supplies prices, a lower bound and the plans on either side of the caps. From some of
those plans, local search (see `improve`) moves over the configurations whose reduced cost is small enough to
matter; every better plan narrows the gap and with it the list of configurations, so the search is repeated
until the gap stays. Every step is deterministic; there is no proof of optimality beyond the gap.
"""

from __future__ import annotations

import math

import numpy as np

from .base import Answer, Options, Solver
from .clock import Clock
from .configurations import Penalties, enumerate_configurations
from .dual import Dual, priced, solve_dual
from .improve import improve
from .problem import Problem
from .reach import cap_units, fits, total_usage
from .solution import Limit, Stats, relative_gap
from .structure import Floats, Integers

STARTS = 4
"""Plans of the dual from which local search starts."""
PASSES = 6
"""How often the list of configurations is narrowed."""
CONFIGURATIONS = 1500
"""Most configurations of the search, beyond one for every group."""


class LagrangianSolver(Solver):
    """Dual bound by intersection search or cutting planes, plan by local search."""

    name = "lagrangian"
    summary = "Lagrangian dual with repair: fast, near the optimum, with a lower bound and shadow prices"
    gives_bound = True

    def _solve(self, problem: Problem, options: Options) -> Answer:
        return relax_and_repair(problem, options)


def relax_and_repair(problem: Problem, options: Options) -> Answer:
    """Everything that `LagrangianSolver` does, for other backends to build on."""
    clock = options.clock
    dual = solve_dual(problem, clock)
    stats: Stats = {"evaluations": dual.evaluations}
    if dual.infeasible:
        return Answer(lower_bound=math.inf, infeasible=True, stats=stats)
    extra = [] if options.warm_start is None else [options.warm_start]
    plan, tried = _repair(problem, dual, extra, options.rel_gap, clock)
    stats["configurations"] = tried
    if plan is None:
        stats["remark"] = "no plan was found that meets the caps together, nor a proof that there is none"
    return Answer(
        columns=plan,
        lower_bound=dual.value,
        limit=Limit.TIME if clock.over else Limit.NONE,
        multipliers=dual.multipliers,
        stats=stats,
    )


def _repair(
    problem: Problem, dual: Dual, extra: list[Integers], rel_gap: float, clock: Clock
) -> tuple[Integers | None, int]:
    """The best plan found, and how many configurations the search had."""
    cost = priced(problem, dual.multipliers)
    penalties = Penalties.build(problem.structure, cost)
    pool = _distinct(dual.plans + extra)
    feasible = [plan for plan in pool if fits(problem, plan)]
    best = min(feasible, key=lambda plan: float(problem.loss[plan].sum()), default=None)
    starts = _starts(problem, pool, cost, best)
    limit = problem.groups + CONFIGURATIONS
    tried = 0
    for _ in range(PASSES):
        upper = math.inf if best is None else float(problem.loss[best].sum())
        if clock.over or relative_gap(upper, dual.value) <= rel_gap:
            break
        delta = max(0.0, upper - dual.value)
        near = enumerate_configurations(problem, penalties, delta, limit=limit)
        tried = max(tried, near.count)
        found = [improve(problem, start, near, dual.multipliers, clock) for start in starts]
        better = [plan for plan in found if fits(problem, plan)]
        better.sort(key=lambda plan: float(problem.loss[plan].sum()))
        if not better or not float(problem.loss[better[0]].sum()) < upper:
            if best is not None:
                break
            limit *= 2  # nothing fits yet: look further away
            starts = found
            continue
        best = better[0]
        starts = _starts(problem, _distinct(better + pool), cost, best)
    return best, tried


def _starts(problem: Problem, pool: list[Integers], cost: Floats, best: Integers | None) -> list[Integers]:
    """`best`, then the plans of least priced cost; of equal ones those that break the caps least."""
    unit = cap_units(problem)

    def key(plan: Integers) -> tuple[float, float]:
        excess = np.maximum(total_usage(problem, plan) - problem.caps, 0.0) / unit
        return float(cost[plan].sum()), float(excess.sum())

    ordered = sorted((plan for plan in pool if plan is not best), key=key)[: STARTS - 1]
    return ordered if best is None else [best, *ordered]


def _distinct(plans: list[Integers]) -> list[Integers]:
    return list({plan.tobytes(): plan for plan in plans}.values())
