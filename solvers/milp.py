"""What the backends share that hand the whole problem to a mixed-integer solver.

They start from the plan of `lagrangian`, which also proves most infeasible problems infeasible; the bound is the
solver's own. Its gap is the caller's (the default of SCIP, HiGHS and CBC is 1e-4). Should a plan break a cap in
spite of the scaling (see `rows`), the cap is lowered by a hair and the solver runs again; the bound that is
reported is always that of the original caps.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from .base import Answer, Options, Solver
from .check import check
from .lagrangian import relax_and_repair
from .problem import Problem
from .reach import fits
from .rows import Rows, build_rows, loss_unit
from .solution import Limit, Stats, relative_gap
from .structure import Floats, Integers

TIGHTENINGS = (3e-9, 3e-8, 3e-7)
"""Relative reductions of the caps tried when the solver's plan breaks one."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a mixed-integer solver said once.

    Attributes:
        values: (variables,) of its best solution, or None.
        bound: on the cost of all solutions, in the units of the rows; -inf if not known.
        status: in its own words.
        optimal, infeasible: its claims.
    """

    values: Floats | None
    bound: float
    status: str
    optimal: bool = False
    infeasible: bool = False


class MilpSolver(Solver):
    """The whole problem as one mixed-integer programme. Subclasses write `_run`."""

    exact = True
    gives_bound = True
    side_constraints = True

    @abstractmethod
    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        """Solve the programme once.

        Args:
            rows: the programme.
            options: time, gap, seed, threads.
            hint: (variables,) of a known solution, or None.
        """

    def _solve(self, problem: Problem, options: Options) -> Answer:
        start = relax_and_repair(problem, options)
        stats: Stats = {"lagrangian_bound": start.lower_bound}
        if start.infeasible:
            stats["infeasible_by"] = "lagrangian certificate"
            return Answer(infeasible=True, lower_bound=math.inf, stats=stats)
        known = [plan for plan in (start.columns, options.warm_start) if plan is not None]
        best = _Best(problem)
        for plan in known:
            best.offer(plan)
        if best.columns is not None:
            stats["start"] = best.loss
        unit = loss_unit(problem, known[0] if known else None)
        first: Run | None = None
        runs = 0
        for tightening in (0.0, *TIGHTENINGS):
            if options.clock.over:
                break
            rows = build_rows(problem, unit, tightening)
            hint = None if best.columns is None else rows.completed(problem, best.columns)
            run = self._run(rows, options, hint)
            runs += 1
            first = first or run
            if run.values is None or best.offer(np.flatnonzero(run.values[: problem.columns] > 0.5)):
                break
            stats["tightened"] = tightening
        stats["runs"] = runs
        if first is None:
            stats["remark"] = f"no time was left for {self.name}: plan and bound are those of lagrangian"
            return Answer(best.columns, start.lower_bound, multipliers=start.multipliers, limit=Limit.TIME, stats=stats)
        stats["status"] = first.status
        if first.values is None and not first.infeasible and best.columns is not None:
            bound_too = "" if math.isfinite(first.bound) else " and bound"
            stats["remark"] = f"{self.name} found no plan ({first.status}): plan{bound_too} are those of lagrangian"
        if first.infeasible and best.columns is not None:
            stats["remark"] = f"{self.name} says infeasible, a known plan meets the caps"
        bound = first.bound * unit if math.isfinite(first.bound) else start.lower_bound
        proven = relative_gap(best.loss, bound) <= options.rel_gap
        stopped = options.clock.over or not (first.optimal or first.infeasible)
        return Answer(
            columns=best.columns,
            lower_bound=bound,
            infeasible=first.infeasible and best.columns is None,
            optimal=first.optimal and runs == 1,
            limit=Limit.TIME if stopped and not proven else Limit.NONE,
            multipliers=start.multipliers,
            stats=stats,
        )


@dataclass(eq=False)
class _Best:
    """The best plan that holds."""

    problem: Problem
    columns: Integers | None = None
    loss: float = dataclasses.field(default=math.inf)

    def offer(self, plan: Integers) -> bool:
        """Keep a plan if it is better; whether it holds at all."""
        report = check(self.problem, plan)
        holds = report.feasible and fits(self.problem, plan)
        if holds and report.loss < self.loss:
            self.columns, self.loss = np.sort(plan), report.loss
        return holds
