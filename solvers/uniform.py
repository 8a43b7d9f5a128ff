"""The best single choice for all layers: what a user without a planner would do.

For every choice that has columns to cover all layers, the problem is restricted to these columns (patterns and
implementations stay free) and solved by `lagrangian`; the choice of least loss among those that fit is the answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .base import Answer, Options, Solver
from .lagrangian import relax_and_repair
from .problem import Problem
from .reach import reachable
from .solution import Limit, Stats
from .structure import Integers


class UniformSolver(Solver):
    """One choice everywhere."""

    name = "uniform"
    summary = "best single quantizer that fits, with the patterns and implementations that make it fit"

    def _solve(self, problem: Problem, options: Options) -> Answer:
        stats: Stats = {}
        candidates = []
        for choice in np.unique(problem.choice).tolist():
            restricted = _restrict(problem, choice)
            if restricted is not None:
                least, _ = restricted[0].structure.evaluate(restricted[0].loss)
                candidates.append((least, choice, *restricted))
        candidates.sort(key=lambda candidate: candidate[:2])
        best, best_loss = None, np.inf
        limit = Limit.NONE
        for least, choice, part, columns in candidates:
            if least >= best_loss:
                break
            if options.clock.over:
                limit = Limit.TIME
                break
            plan = relax_and_repair(part, dataclasses.replace(options, warm_start=None)).columns
            if plan is not None and part.loss[plan].sum() < best_loss:
                best, best_loss = columns[plan], float(part.loss[plan].sum())
                stats["choice"] = problem.choice_names[choice]
        stats["choices"] = len(candidates)
        infeasible = best is None and limit is Limit.NONE and reachable(problem, only_prove=True).proven_infeasible
        if best is None and not infeasible:
            stats["remark"] = "no single choice covers every layer within the caps; mixing choices may"
        return Answer(columns=best, infeasible=infeasible, limit=limit, stats=stats)


def _restrict(problem: Problem, choice: int) -> tuple[Problem, Integers] | None:
    """The problem with the columns of one choice, and their numbers; None if they don't cover every layer."""
    columns = np.flatnonzero(problem.choice == choice)
    if problem.uncovered_groups(columns).size:
        return None
    return problem.with_columns(columns), columns
