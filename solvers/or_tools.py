"""SCIP and HiGHS through the vectorised model builder of OR-Tools."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .base import Options
from .errors import SolverError
from .libraries import load_or_tools
from .milp import Run
from .quiet import quiet_stdout
from .rows import Rows
from .structure import Floats


def run_model_builder(
    engine: str,
    rows: Rows,
    options: Options,
    hint: Floats | None,
    settings: Mapping[str, float | int | bool | str],
) -> Run:
    """Solve with an engine of OR-Tools.

    Args:
        engine: ``SCIP`` or ``HIGHS``.
        rows: the programme.
        options: supplies the time limit.
        hint: (variables,) or None.
        settings: the engine's own, by name.

    Raises:
        SolverError: OR-Tools can't be loaded, lacks the engine, or refuses a setting.
    """
    model_builder = load_or_tools("ortools.linear_solver.python.model_builder")
    model = model_builder.Model()
    helper = model.helper
    variables = rows.cost.size
    helper.fill_model_from_sparse_data(
        np.zeros(variables), np.ones(variables), rows.cost, rows.lower, rows.upper, rows.matrix
    )
    for variable in range(variables):
        helper.set_var_integrality(variable, True)
    if hint is not None:
        for variable, value in enumerate(hint.tolist()):
            helper.add_hint(variable, value)
    solver = model_builder.Solver(engine)
    if not solver.solver_is_supported():
        raise SolverError(f"this OR-Tools has no {engine}; install an official wheel or choose another solver")
    if math.isfinite(options.clock.limit):
        solver.set_time_limit_in_seconds(max(options.clock.left, 1e-3))
    solver.set_solver_specific_parameters("\n".join(f"{name} = {_text(value)}" for name, value in settings.items()))
    with quiet_stdout():
        status = solver.solve(model)
    kinds = model_builder.SolveStatus
    if status == kinds.INVALID_SOLVER_PARAMETERS:
        raise SolverError(f"this OR-Tools refuses the settings of {engine}; install a version of 9.12 to 9.15")
    values = None
    if status in (kinds.OPTIMAL, kinds.FEASIBLE):
        values = np.asarray(solver.values(model.get_variables()), dtype=np.float64)
    known = values is not None or status == kinds.NOT_SOLVED
    bound = float(solver.best_objective_bound) if known else -math.inf
    return Run(
        values,
        bound if math.isfinite(bound) else -math.inf,
        status.name,
        optimal=status == kinds.OPTIMAL,
        infeasible=status == kinds.INFEASIBLE,
    )


def _text(value: float | int | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
