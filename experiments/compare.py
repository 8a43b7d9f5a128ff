"""Solver strategies side by side: what they find, what they prove, what they cost.

Every backend runs in a process of its own with its own time limit, so that a crash or a clash of libraries takes
nothing else down. Answers to the same problem are then held against each other: a bound above another's plan, or
"infeasible" where another has a plan that the checker accepts, is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ..solvers.solution import Status


@dataclass(frozen=True)
class Comparison:
    """One backend on one problem.

    Attributes:
        budgets: as written, joined by spaces.
        solver: its name.
        status: optimal, feasible, infeasible, unknown; "unavailable" or "failed" with a `remark`.
        objective: loss of its plan, None without one.
        lower_bound, gap: None where nothing was proven.
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


def compare_solvers(
    profile: Profile,
    problems: Sequence[Sequence[Budget]],
    *,
    solvers: Sequence[str] | None = None,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
    constraints: Sequence[Constraint] = (),
    time_limit: float = 60.0,
    rel_gap: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> Iterator[list[Comparison]]:
    """Run backends on the problems of a profile, one after the other; yields the rows of each problem.

    Args:
        profile, quantizers, implementations, fusion: see `build_problem`.
        problems: the joint budgets of each problem.
        solvers: names; None for all.
        constraints: side constraints of all problems.
        time_limit: seconds for each backend on each problem.
        rel_gap, seed, threads: see `Solver.solve`.

    Raises:
        PlanError, SolverError: bad budgets, quantizers, constraints or solver names.
    """
    names = list(dict.fromkeys(solver_names() if solvers is None else solvers))
    if not names:
        raise SolverError(f"expected at least one solver; there are {', '.join(solver_names())}")
    lacking = {name: missing_requirements(name) for name in names}
    selection = {"quantizers": quantizers, "implementations": implementations, "fusion": fusion}
    built = [constrain(build_problem(profile, budgets, **selection), constraints) for budgets in problems]  # type: ignore[arg-type]
    for one in built:
        rows = []
        for name in names:
            if lacking[name]:
                remark = f"pip install {' '.join(lacking[name])}"
                rows.append(Comparison(_text(one), name, "unavailable", remark=remark))
            else:
                rows.append(_run(one, name, time_limit=time_limit, rel_gap=rel_gap, seed=seed, threads=threads))
        yield contradictions(rows)


def _text(constrained: Constrained) -> str:
    return " ".join(budget.text for budget in constrained.built.budgets)


def _run(constrained: Constrained, name: str, **limits: float) -> Comparison:
    problem: Problem = constrained.problem
    done = solve_isolated(name, problem, **limits)  # type: ignore[arg-type]
    row = Comparison(
        _text(constrained),
        name,
        "failed",
        seconds=done.seconds,
        peak_mb=round(done.peak_bytes / 1e6) or None,
        columns=problem.columns,
        remark=done.error,
    )
    if done.solution is None:
        return row
    solution = done.solution
    kept = solution.stats.get("kept_columns")
    row = replace(
        row,
        status=str(solution.status),
        columns_kept=None if kept is None else int(kept),
        remark=str(solution.stats.get("rejected", "")),
    )
    if solution.columns is None:
        return row
    proven = solution.lower_bound > float("-inf")
    return replace(
        row,
        objective=solution.objective,
        lower_bound=solution.lower_bound if proven else None,
        gap=solution.gap if proven else None,
        within_caps=check(problem, solution.columns).feasible,
    )


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
