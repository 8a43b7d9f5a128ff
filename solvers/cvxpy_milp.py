"""CVXPY: the whole problem in its modelling language, solved by HiGHS.

HiGHS is reached through highspy where CVXPY has it, else through scipy, see `libraries`; scipy can't be given
tolerances, so its plans break caps more often and are then sought again below lowered caps, see `milp`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Options
from .errors import SolverError
from .libraries import load_cvxpy, quiet_cvxpy
from .milp import MilpSolver, Run
from .rows import Rows
from .structure import Floats

TOLERANCE = 1e-9
MAX_SEED = 2**31 - 1


class CvxpySolver(MilpSolver):
    """The whole problem as one mixed-integer programme."""

    name = "cvxpy"
    summary = "CVXPY: the whole problem as one mixed-integer programme, solved by HiGHS"
    requires = ("cvxpy",)
    gives_bound = True

    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        cvxpy = load_cvxpy()
        variables = cvxpy.Variable(rows.cost.size, boolean=True)
        model = cvxpy.Problem(cvxpy.Minimize(rows.cost @ variables), constraints(rows, variables))
        engine = mixed_integer_engine(cvxpy)
        try:
            with quiet_cvxpy():
                model.solve(solver=engine, **_settings(engine, options))
        except cvxpy.error.SolverError as cause:
            # CVXPY raises when time is up before there is a solution
            if options.clock.over:
                return Run(None, -math.inf, "time limit")
            raise SolverError(f"solver 'cvxpy': {engine} failed ({str(cause).splitlines()[0]})") from cause
        status = str(model.status)
        infeasible = status == cvxpy.INFEASIBLE
        if variables.value is None or infeasible:
            return Run(None, -math.inf, status, infeasible=infeasible)
        bound = _bound(model.solver_stats.extra_stats)
        return Run(np.asarray(variables.value), bound, f"{engine} {status}", optimal=status == cvxpy.OPTIMAL)


def constraints(rows: Rows, variables: Any) -> list[Any]:
    """The rows as equalities and inequalities of CVXPY, in this order, empty ones left out."""
    equal = rows.lower == rows.upper
    found = []
    if equal.any():
        found.append(rows.matrix[equal] @ variables == rows.upper[equal])
    if not equal.all():
        found.append(rows.matrix[~equal] @ variables <= rows.upper[~equal])
    return found


def mixed_integer_engine(cvxpy: Any) -> str:
    """HIGHS where CVXPY could load highspy, else scipy's HiGHS.

    Raises:
        SolverError: CVXPY has neither.
    """
    with quiet_cvxpy():
        installed = cvxpy.installed_solvers()
    for engine in ("HIGHS", "SCIPY"):
        if engine in installed:
            return engine
    raise SolverError("this CVXPY has neither HIGHS nor SCIPY; install scipy, or choose another solver")


def _settings(engine: str, options: Options) -> dict[str, Any]:
    time_limit = max(options.clock.left, 1e-3) if math.isfinite(options.clock.limit) else 1e9
    if engine == "SCIPY":
        return {"scipy_options": {"time_limit": time_limit, "mip_rel_gap": options.rel_gap}}
    return {
        "time_limit": time_limit,
        "mip_rel_gap": options.rel_gap,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
        "random_seed": options.seed % MAX_SEED,
        "threads": options.threads,
    }


def _bound(extra: Any) -> float:
    """The dual bound in what CVXPY passes on: a dict of scipy's, an object of highspy's."""
    bound = extra.get("mip_dual_bound") if isinstance(extra, dict) else getattr(extra, "mip_dual_bound", None)
    return float(bound) if bound is not None and math.isfinite(bound) else -math.inf
