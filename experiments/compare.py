"""Solver strategies side by side: what they find, what they prove, what they cost.

Every backend runs in a process of its own with its own time limit, so that a crash or a clash of libraries takes
nothing else down. Answers to the same problem are then held against each other: a bound above another's plan, or
"infeasible" where another has a plan that the checker accepts, is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..planner.budget import Budget
from ..planner.constraints import Constrained, Constraint, constrain
from ..planner.problem_builder import build_problem
from ..profiles.tables import Profile
from ..solvers.base import CONTRADICTION_TOLERANCE
from ..solvers.check import check
from ..solvers.errors import SolverError
from ..solvers.isolated import solve_isolated
from ..solvers.problem import Problem
from ..solvers.registry import missing_requirements, solver_names
from ..solvers.solution import Solution, Status


@dataclass(frozen=True)
class Comparison:
    """One backend on one problem.

    Attributes:
        budgets: as written, joined by spaces.
        solver: its name.
        status: optimal, feasible, infeasible, unknown; with a `remark` "unavailable" (something isn't installed),
            "refused" (the backend can't handle the problem) or "failed".
        objective: loss of its plan, None without one.
        lower_bound, gap: None where nothing was proven; a bound may come without a plan.
        within_caps: whether the independent checker found every cap kept; None without a plan.
        seconds: wall time of the solve, loading what the backend needs included; None if it didn't run.
        peak_mb: largest resident size of its process; None if not known.
        columns: candidates considered.
        columns_kept: candidates left after reduction; None where the backend doesn't say.
        remark: why there is no answer, or what in the answer doesn't hold.
    """

    budgets: str
    solver: str
    status: str
    objective: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    within_caps: bool | None = None
    seconds: float | None = None
    peak_mb: int | None = None
    columns: int | None = None
    columns_kept: int | None = None
    remark: str = ""


@dataclass(frozen=True, eq=False)
class Trial:
    """One backend on one problem, to be run.

    Attributes:
        constrained: the problem.
        solver: name of the backend.
        missing: modules that it needs and that aren't installed.
    """

    constrained: Constrained
    solver: str
    missing: tuple[str, ...] = ()

    def run(self, *, time_limit: float = 60.0, rel_gap: float = 1e-6, seed: int = 0, threads: int = 1) -> Comparison:
        """The row of this trial; takes up to `time_limit` seconds. Arguments as in `Solver.solve`."""
        row = Comparison(" ".join(budget.text for budget in self.constrained.built.budgets), self.solver, "unavailable")
        if self.missing:
            return replace(row, remark=f"pip install {' '.join(self.missing)}")
        problem = self.constrained.problem
        done = solve_isolated(self.solver, problem, time_limit=time_limit, rel_gap=rel_gap, seed=seed, threads=threads)
        row = replace(
            row,
            status="refused" if done.refused else "failed",
            seconds=done.seconds,
            peak_mb=round(done.peak_bytes / 1e6) or None,
            columns=problem.columns,
            remark=done.error,
        )
        return row if done.solution is None else _answered(row, problem, done.solution)


def _answered(row: Comparison, problem: Problem, solution: Solution) -> Comparison:
    """The row of a backend that has answered."""
    kept = solution.stats.get("kept_columns")
    row = replace(
        row,
        status=str(solution.status),
        lower_bound=solution.lower_bound if math.isfinite(solution.lower_bound) else None,
        columns_kept=None if kept is None else int(kept),
        remark=str(solution.stats.get("rejected", "")),
    )
    if solution.columns is None:
        return row
    return replace(
        row,
        objective=solution.objective,
        gap=solution.gap if math.isfinite(solution.gap) else None,
        within_caps=check(problem, solution.columns).feasible,
    )


def trials(
    profile: Profile,
    problems: Sequence[Sequence[Budget]],
    *,
    solvers: Sequence[str] | None = None,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
    constraints: Sequence[Constraint] = (),
) -> list[list[Trial]]:
    """What to run to compare backends on the problems of a profile: the trials of each problem.

    Args:
        profile, quantizers, implementations, fusion: see `build_problem`.
        problems: the joint budgets of each problem.
        solvers: names; None for all.
        constraints: side constraints of all problems.

    Raises:
        PlanError, SolverError: bad budgets, quantizers, constraints or solver names.
    """
    names = list(dict.fromkeys(solver_names() if solvers is None else solvers))
    if not names:
        raise SolverError(f"expected at least one solver; there are {', '.join(solver_names())}")
    missing = {name: missing_requirements(name) for name in names}
    selection = {"quantizers": quantizers, "implementations": implementations, "fusion": fusion}
    built = [constrain(build_problem(profile, budgets, **selection), constraints) for budgets in problems]  # type: ignore[arg-type]
    return [[Trial(problem, name, missing[name]) for name in names] for problem in built]


def out_of_reach(rows: Sequence[Comparison]) -> bool:
    """Whether a backend proves that the problem of these rows has no plan, and none has one."""
    return any(row.status == Status.INFEASIBLE for row in rows) and all(row.objective is None for row in rows)


def contradictions(rows: Sequence[Comparison]) -> list[Comparison]:
    """The answers to one problem, with remarks where one can't be true beside another's checked plan."""
    plans = [(row.objective, row.solver) for row in rows if row.objective is not None and row.within_caps]
    if not plans:
        return list(rows)
    best, whose = min(plans)
    marked = []
    for row in rows:
        remarks = [row.remark] if row.remark else []
        if row.status == Status.INFEASIBLE:
            remarks.append(f"it says infeasible, {whose} has a plan")
        if row.lower_bound is not None and row.lower_bound > best + CONTRADICTION_TOLERANCE * abs(best):
            remarks.append(f"its bound {row.lower_bound:.12g} is above the plan of {whose}, {best:.12g}")
        marked.append(replace(row, remark="; ".join(remarks)))
    return marked
