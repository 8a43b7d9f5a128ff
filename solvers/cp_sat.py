"""CP-SAT (OR-Tools): the whole problem in integers.

Uses are rounded up to multiples of room / 2^45 and rooms down, so a plan of the integer problem meets the true
caps. (A plan that meets a cap to within some 1e-12 may be lost that way, which is what the solvers here allow for
rounding in sums.) Losses are rounded down, so the bound holds. Presolve is off: with coefficients of this size it
cut off the best plans of some 5 in 10,000 small problems (OR-Tools 9.15), with less probing those of others.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Options
from .libraries import load_or_tools
from .milp import MilpSolver, Run
from .reach import ROUNDING
from .rows import Rows
from .structure import Floats, Integers

ROOM = 2.0**45
"""Units in the room of a resource."""
COST = 2.0**40
"""Units in a cost of 1; a plan near the optimum costs `rows.LOSS_SIZE`."""
MOST = 2.0**60
"""Most that all coefficients of a row may sum to: CP-SAT adds in 64 bits."""
HAIR = 1e-3
"""Units that a use may lie above a whole number and still be rounded down to it."""
MAX_SEED = 2**31 - 1


class CpSatSolver(MilpSolver):
    """The whole problem in integers, by constraint programming and clause learning."""

    name = "cp_sat"
    summary = "CP-SAT (OR-Tools): the whole problem in integers, uses rounded up"
    requires = ("ortools",)

    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        cp_model = load_or_tools("ortools.sat.python.cp_model")
        model = cp_model.CpModel()
        variables = [model.new_bool_var("") for _ in range(rows.cost.size)]
        for index in range(rows.matrix.shape[0]):
            _add_row(cp_model, model, variables, rows, index)
        scale = min(COST, MOST / max(float(rows.cost.sum()), 1.0))
        cost = np.floor(rows.cost * scale).astype(np.int64)
        model.minimize(cp_model.LinearExpr.weighted_sum(variables, cost.tolist()))
        if hint is not None:
            for variable, value in zip(variables, hint.tolist(), strict=True):
                model.add_hint(variable, round(value))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = options.threads
        solver.parameters.random_seed = options.seed % MAX_SEED
        solver.parameters.relative_gap_limit = options.rel_gap
        solver.parameters.absolute_gap_limit = 0.0
        solver.parameters.cp_model_presolve = False
        if math.isfinite(options.clock.limit):
            solver.parameters.max_time_in_seconds = max(options.clock.left, 1e-3)
        status = solver.solve(model)
        values = None
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            values = np.array(solver.values(variables), dtype=np.float64)
        known = values is not None or status == cp_model.UNKNOWN
        return Run(
            values,
            float(solver.best_objective_bound) / scale if known else -math.inf,
            solver.status_name(status),
            optimal=status == cp_model.OPTIMAL,
            infeasible=status == cp_model.INFEASIBLE,
        )


def _add_row(cp_model: Any, model: Any, variables: list[Any], rows: Rows, index: int) -> None:
    """Add one row in integers: as it is where it is integral, else rounded."""
    part = slice(int(rows.matrix.indptr[index]), int(rows.matrix.indptr[index + 1]))
    members = rows.matrix.indices[part].tolist()
    weights = rows.matrix.data[part]
    lower, upper = float(rows.lower[index]), float(rows.upper[index])
    terms = [variables[i] for i in members]
    if (weights == np.round(weights)).all() and upper == round(upper) and float(np.abs(weights).sum()) < MOST:
        expression = cp_model.LinearExpr.weighted_sum(terms, weights.astype(np.int64).tolist())
        if lower == upper:
            model.add(expression == int(upper))
        else:
            model.add(expression <= int(upper))
        return
    rounded, room = _rounded(weights, upper)
    model.add(cp_model.LinearExpr.weighted_sum(terms, rounded.tolist()) <= room)


def _rounded(weights: Floats, upper: float) -> tuple[Integers, int]:
    """Uses rounded up and room rounded down; what exceeds the room is cut off, it can't be used anyway."""
    if upper < 0:
        return np.zeros(weights.size, dtype=np.int64), -1
    size = upper if upper > 0 else max(float(weights.max(initial=0.0)), 1.0)
    scale = min(ROOM, MOST / max(weights.size, 1)) / size
    room = math.floor((upper + ROUNDING * abs(upper)) * scale)
    rounded = np.ceil(np.maximum(weights * scale - HAIR, 0.0))
    return np.minimum(rounded, room + 1).astype(np.int64), room
