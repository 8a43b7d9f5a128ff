"""CVXPY: linear relaxation, its prices as a bound, and its solution rounded.

The prices of the resource rows give a Lagrangian bound, recomputed here from scratch (weak duality holds for any
prices, so the accuracy of the linear solver doesn't matter). Rounding takes in every group the partition and
columns that the relaxation uses most, repairs the caps and fills up what is left.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Answer, Options, Solver
from .cvxpy_milp import constraints, mixed_integer_engine
from .dual import priced
from .errors import SolverError
from .greedy_moves import fill, repair
from .libraries import load_cvxpy, quiet_cvxpy
from .problem import Problem
from .reach import fits, reachable
from .rows import build_rows, loss_unit
from .solution import Limit
from .structure import Floats


class CvxpyLpSolver(Solver):
    """Linear relaxation and rounding."""

    name = "cvxpy_lp"
    summary = "CVXPY: linear relaxation, bound by its prices, plan by rounding"
    requires = ("cvxpy",)
    gives_bound = True

    def _solve(self, problem: Problem, options: Options) -> Answer:
        reach = reachable(problem, clock=options.clock, only_prove=True)
        if reach.proven_infeasible:
            return Answer(infeasible=True, lower_bound=math.inf, stats={"infeasible_by": "farkas certificate"})
        free, plan = problem.structure.evaluate(problem.loss)
        if fits(problem, plan):
            return Answer(plan, free, optimal=True, multipliers=np.zeros(problem.resources))
        multipliers, weights, status = _relax(problem, options)
        value = problem.structure.evaluate(priced(problem, multipliers))[0] - float(multipliers @ problem.room)
        starts = [plan, *reach.plans]
        if weights is not None:
            layers = np.bitwise_count(problem.mask.astype(np.uint64))
            starts.append(problem.structure.evaluate(-weights * layers)[1])
        if options.warm_start is not None:
            starts.append(options.warm_start)
        best = None
        for start in starts:
            found = repair(problem, start, options.clock)
            if fits(problem, found):
                found = fill(problem, found, options.clock)
                if best is None or problem.loss[found].sum() < problem.loss[best].sum():
                    best = found
        return Answer(
            columns=best,
            lower_bound=max(value, free),
            limit=Limit.TIME if options.clock.over else Limit.NONE,
            multipliers=multipliers,
            stats={"status": status},
        )


def _relax(problem: Problem, options: Options) -> tuple[Floats, Floats | None, str]:
    """(prices (resources,), share of each column (columns,) or None, status) of the linear relaxation."""
    cvxpy = load_cvxpy()
    rows = build_rows(problem, loss_unit(problem, None))
    variables = cvxpy.Variable(rows.cost.size, nonneg=True)
    limits = constraints(rows, variables)
    model = cvxpy.Problem(cvxpy.Minimize(rows.cost @ variables), limits)
    nothing = np.zeros(problem.resources)
    engine = mixed_integer_engine(cvxpy)
    seconds = max(options.clock.left, 1e-3) if math.isfinite(options.clock.limit) else 1e9
    limit: dict[str, Any] = {"time_limit": seconds}
    settings = {"scipy_options": {"method": "highs", **limit}} if engine == "SCIPY" else limit
    try:
        with quiet_cvxpy():
            model.solve(solver=engine, **settings)
    except cvxpy.error.SolverError as cause:
        if options.clock.over:
            return nothing, None, "time limit"
        raise SolverError(f"solver 'cvxpy_lp': {engine} failed ({str(cause).splitlines()[0]})") from cause
    status = f"{engine} {model.status}"
    if model.status != cvxpy.OPTIMAL or limits[-1].dual_value is None:
        return nothing, None, status
    # the rows are use / scale; a price is loss per unit of use
    scale = problem.room / np.where(problem.room > 0, rows.upper[: problem.resources], 1.0)
    prices = np.asarray(limits[-1].dual_value)[: problem.resources] * rows.unit
    prices = np.where(problem.room > 0, prices / np.where(scale > 0, scale, 1.0), 0.0)
    return np.maximum(prices, 0.0), np.asarray(variables.value), status
