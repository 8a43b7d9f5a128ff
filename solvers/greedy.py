"""Exchange columns one at a time, from several simple plans.

From the plan of least loss, from the leanest for each resource and from the leanest for all of them together:
exchanges that bring most per loss added until the caps hold, then exchanges that save most per use until none fits
(see `greedy_moves`). The best of the resulting plans is the answer.
"""

from __future__ import annotations

import numpy as np

from .base import Answer, Options, Solver
from .greedy_moves import fill, repair
from .problem import Problem
from .reach import cap_units, fits, reachable
from .solution import Limit


class GreedySolver(Solver):
    """Repair and fill."""

    name = "greedy"
    summary = "single exchanges of most gain per cost, from the plan of least loss and from the leanest ones"

    def _solve(self, problem: Problem, options: Options) -> Answer:
        clock = options.clock
        unit = cap_units(problem)
        costs = [problem.loss, *problem.usage, (problem.usage / unit[:, None]).sum(axis=0)]
        starts = [problem.structure.evaluate(cost)[1] for cost in costs]
        if options.warm_start is not None:
            starts.append(options.warm_start)
        best, best_loss, tried = None, np.inf, 0
        for start in starts:
            plan = repair(problem, start, clock)
            if fits(problem, plan):
                plan = fill(problem, plan, clock)
                loss = float(problem.loss[plan].sum())
                if loss < best_loss:
                    best, best_loss = plan, loss
            tried += 1
            if clock.over:
                break
        limit = Limit.TIME if clock.over else Limit.NONE
        if best is None:
            proven = reachable(problem, clock=clock, only_prove=True).proven_infeasible
            remark = "no exchange of single columns meets the caps; another solver may find a plan"
            return Answer(infeasible=proven, limit=limit, stats={} if proven else {"remark": remark})
        return Answer(columns=best, limit=limit, stats={"starts": tried})
