"""Solver strategies side by side on the same budgets: what they find, what they prove, how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..planner.budget import Budget
from ..planner.problem_builder import build_problem
from ..profiles.tables import Profile
from ..solvers.check import check
from ..solvers.errors import SolverError
from ..solvers.registry import get_solver, missing_requirements, solver_names


@dataclass(frozen=True)
class Comparison:
    """One backend on one problem.

    Attributes:
        solver: its name.
        status: optimal, feasible, infeasible, unknown; or "unavailable" / "refused" with a `remark`.
        objective: loss of its plan, None without one.
        lower_bound, gap: None where nothing was proven.
        within_caps: whether the independent checker found every cap kept; None without a plan.
        seconds: wall time of the solve.
        columns: candidates considered.
        remark: why there is no answer.
    """

    solver: str
    status: str
    objective: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    within_caps: bool | None = None
    seconds: float | None = None
    columns: int | None = None
    remark: str = ""


def compare_solvers(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    solvers: Sequence[str] | None = None,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
    time_limit: float = 60.0,
    seed: int = 0,
) -> list[Comparison]:
    """Run backends on the problem of a profile and budgets, one after the other.

    Args:
        solvers: names; None for all.
        profile, budgets, quantizers, implementations, fusion: see `build_problem`.
        time_limit: seconds for each backend.

    Raises:
        PlanError, SolverError: bad budgets, quantizers or solver names.
    """
    names = list(dict.fromkeys(solver_names() if solvers is None else solvers))
    if not names:
        raise SolverError(f"expected at least one solver; there are {', '.join(solver_names())}")
    lacking = {name: missing_requirements(name) for name in names}
    built = build_problem(profile, budgets, quantizers=quantizers, implementations=implementations, fusion=fusion)
    rows = []
    for name in names:
        if lacking[name]:
            rows.append(Comparison(name, "unavailable", remark=f"pip install {' '.join(lacking[name])}"))
            continue
        try:
            solution = get_solver(name).solve(built.problem, time_limit=time_limit, seed=seed)
        except SolverError as cause:
            rows.append(Comparison(name, "refused", remark=str(cause)))
            continue
        found = solution.columns is not None
        proven = solution.lower_bound > float("-inf") and found
        rows.append(
            Comparison(
                solver=name,
                status=str(solution.status),
                objective=solution.objective if found else None,
                lower_bound=solution.lower_bound if proven else None,
                gap=solution.gap if proven else None,
                within_caps=check(built.problem, solution.columns).feasible if solution.columns is not None else None,
                seconds=solution.seconds,
                columns=built.problem.columns,
            )
        )
    return rows
