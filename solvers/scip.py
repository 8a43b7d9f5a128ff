"""SCIP, through the vectorised model builder of OR-Tools.

Numerics. SCIP's tolerances are absolute for rows of order 1, so every resource row is divided by its room, and
the loss is scaled by its size in the starting plan; in raw seconds a tolerance of 1e-7 let it break caps. The
feasibility tolerance is 1e-9, and the gap the caller's (OR-Tools' default for SCIP is 1e-4). Should a plan
break a cap all the same, the cap is lowered by a hair and SCIP runs again; the bound that is reported is
always that of the original caps.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Answer, Options, Solver
from .check import check
from .errors import SolverError
from .lagrangian import relax_and_repair
from .problem import Problem
from .reach import fits
from .solution import Limit, Stats, relative_gap
from .structure import Integers, offsets

FEASIBILITY_TOLERANCE = 1e-9
LOSS_SIZE = 1e3
"""The loss is scaled to this: SCIP's 1e-7 on reduced costs is then worth 1e-10 of it. (A tighter setting of
that tolerance makes SCIP complain on stderr.)"""
TIGHTENINGS = (3e-9, 3e-8, 3e-7)
"""Relative reductions of the caps tried when SCIP's plan breaks one."""
MAX_SEED = 2**31 - 1


@dataclass(frozen=True, eq=False)
class _Run:
    """What SCIP said once, in the problem's units."""

    columns: Integers | None
    lower_bound: float
    status: str


class ScipSolver(Solver):
    """The whole problem as one mixed-integer programme."""

    name = "scip"
    summary = "SCIP (OR-Tools): the whole problem as one mixed-integer programme"
    exact = True
    gives_bound = True
    requires = ("ortools",)

    def _solve(self, problem: Problem, options: Options) -> Answer:
        start = relax_and_repair(problem, options)
        stats: Stats = {"lagrangian_bound": start.lower_bound}
        if start.infeasible:
            stats["infeasible_by"] = "lagrangian certificate"
            return Answer(infeasible=True, lower_bound=math.inf, stats=stats)
        hint = start.columns if start.columns is not None else options.warm_start
        if start.columns is not None:
            stats["start"] = float(problem.loss[start.columns].sum())
        unit = _loss_unit(problem, hint)
        best = start.columns
        first: _Run | None = None
        runs = 0
        for tightening in (0.0, *TIGHTENINGS):
            if options.clock.over:
                break
            run = _run(problem, options, unit, hint, tightening)
            runs += 1
            first = first or run
            if run.columns is None:
                break
            if check(problem, run.columns).feasible:
                if best is None or problem.loss[run.columns].sum() < problem.loss[best].sum():
                    best = run.columns
                break
            stats["tightened"] = tightening
        stats["runs"] = runs
        if first is None:
            return Answer(columns=best, multipliers=start.multipliers, limit=Limit.TIME, stats=stats)
        stats["scip_status"] = first.status
        infeasible = first.status == "INFEASIBLE" and best is None
        if first.status == "INFEASIBLE" and best is not None:
            stats["remark"] = "SCIP says infeasible, the starting plan meets the caps"
        proven = best is not None and _gap(problem, best, first.lower_bound) <= options.rel_gap
        return Answer(
            columns=best,
            lower_bound=first.lower_bound,
            infeasible=infeasible,
            optimal=first.status == "OPTIMAL" and runs == 1,
            limit=Limit.TIME if first.status in ("FEASIBLE", "NOT_SOLVED") and not proven else Limit.NONE,
            multipliers=start.multipliers,
            stats=stats,
        )


def _gap(problem: Problem, plan: Integers, lower_bound: float) -> float:
    return relative_gap(float(problem.loss[plan].sum()), lower_bound)


def _loss_unit(problem: Problem, plan: Integers | None) -> float:
    """The loss of a plan near the optimum, or of the columns on average where there is none."""
    loss = float(problem.loss[plan].sum()) if plan is not None else 0.0
    if loss <= 0:
        loss = float(problem.loss.mean()) * problem.groups
    return loss / LOSS_SIZE if loss > 0 else 1.0


def _run(problem: Problem, options: Options, loss_unit: float, hint: Integers | None, tightening: float) -> _Run:
    """Build the programme, run SCIP once, scale its answer back."""
    from scipy import sparse

    # OR-Tools is typed in part only
    model_builder: Any = importlib.import_module("ortools.linear_solver.python.model_builder")
    columns = problem.columns
    room = problem.room - tightening * np.abs(problem.caps)
    scale = np.where(room > 0, room, np.maximum(problem.usage.max(axis=1), np.abs(room)))
    scale[scale <= 0] = 1.0
    cover, layers = _cover(problem)
    matrix = sparse.vstack((sparse.csr_matrix(problem.usage / scale[:, None]), cover), format="csr", dtype=np.float64)
    model = model_builder.Model()
    helper = model.helper
    helper.fill_model_from_sparse_data(
        np.zeros(columns),
        np.ones(columns),
        problem.loss / loss_unit,
        np.concatenate((np.full(problem.resources, -math.inf), np.ones(layers))),
        np.concatenate((room / scale, np.ones(layers))),
        matrix,
    )
    for column in range(columns):
        helper.set_var_integrality(column, True)
    if hint is not None and fits(problem, hint):
        ones = set(hint.tolist())
        for column in range(columns):
            helper.add_hint(column, float(column in ones))
    solver = model_builder.Solver("SCIP")
    if not solver.solver_is_supported():
        raise SolverError("scip: this OR-Tools has no SCIP; install an official wheel or choose another solver")
    if math.isfinite(options.clock.limit):
        solver.set_time_limit_in_seconds(max(options.clock.left, 1e-3))
    solver.set_solver_specific_parameters(_parameters(options))
    status = solver.solve(model)
    plan = None
    if status in (model_builder.SolveStatus.OPTIMAL, model_builder.SolveStatus.FEASIBLE):
        plan = np.flatnonzero(np.asarray(solver.values(model.get_variables())) > 0.5)
    known = plan is not None or status == model_builder.SolveStatus.NOT_SOLVED
    bound = float(solver.best_objective_bound) * loss_unit if known else -math.inf
    return _Run(plan, bound if math.isfinite(bound) else -math.inf, status.name)


def _cover(problem: Problem) -> tuple[object, int]:
    """The rows that cover every layer once, sparse (layers, columns), and their number."""
    from scipy import sparse

    first = offsets(problem.group_sizes.astype(np.int64))
    rows, members = [], []
    for layer in range(int(problem.group_sizes.max())):
        covering = np.flatnonzero(problem.mask >> layer & 1)
        rows.append(first[problem.group[covering]] + layer)
        members.append(covering)
    row, column = np.concatenate(rows), np.concatenate(members)
    shape = (int(first[-1]), problem.columns)
    return sparse.csr_matrix((np.ones(row.size), (row, column)), shape=shape), shape[0]


def _parameters(options: Options) -> str:
    """SCIP's settings, one per line."""
    settings: dict[str, float | int] = {
        "numerics/feastol": FEASIBILITY_TOLERANCE,
        "limits/gap": options.rel_gap,
        "limits/absgap": 0.0,
        "randomization/randomseedshift": options.seed % MAX_SEED,
        "parallel/maxnthreads": options.threads,
    }
    return "\n".join(f"{name} = {value!r}" for name, value in settings.items())
