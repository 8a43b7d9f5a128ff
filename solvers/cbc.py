"""CBC, through PuLP.

PuLP runs CBC as a programme of its own on a file and reports no bound. When CBC says that it has finished, its
plan is within the asked gap of the best, which is a bound; when time is up, the bound is `lagrangian`'s. CBC's
preprocessing can lose the best plans (one of 330 small problems); when a plan that is known refutes what CBC says, it
runs again without.
"""

from __future__ import annotations

import importlib
import itertools
import math
import tempfile
import warnings
from typing import Any

import numpy as np

from .base import Options
from .errors import SolverError
from .milp import MilpSolver, Run
from .rows import Rows
from .structure import Floats

TOLERANCE = 1e-9
"""On rows of order 1, and on integrality."""


class CbcSolver(MilpSolver):
    """The whole problem as one mixed-integer programme."""

    name = "cbc"
    summary = "CBC (PuLP): the whole problem as one mixed-integer programme"
    requires = ("pulp",)

    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        # PuLP 3.3 warns of what 4.0 takes away; the package is pinned below that
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pulp = importlib.import_module("pulp")
            run = _once(pulp, rows, options, hint, [])
            if _refuted(run, rows, hint):
                run = _once(pulp, rows, options, hint, ["preprocess off"])
        # whatever is still wrong is found by `Solver.solve`
        return run


def _refuted(run: Run, rows: Rows, hint: Floats | None) -> bool:
    """Whether a known solution is better than CBC says is possible."""
    return hint is not None and (run.infeasible or float(rows.cost @ hint) < run.bound)


def _once(pulp: Any, rows: Rows, options: Options, hint: Floats | None, extra: list[str]) -> Run:
    engine = pulp.PULP_CBC_CMD(
        msg=False,
        timeLimit=max(options.clock.left, 1e-2) if math.isfinite(options.clock.limit) else None,
        gapRel=options.rel_gap,
        gapAbs=0.0,
        threads=options.threads if options.threads > 1 else None,
        warmStart=hint is not None,
        options=[
            f"primalTolerance {TOLERANCE}",
            f"integerTolerance {TOLERANCE}",
            f"randomCbcSeed {options.seed % 2**31}",
            *extra,
        ],
    )
    if not engine.available():
        raise SolverError("solver 'cbc': this PuLP has no CBC for this machine; choose another solver")
    problem, variables = _model(pulp, rows, hint)
    # PuLP leaves its files behind when CBC crashes or is interrupted
    with tempfile.TemporaryDirectory(prefix="msq-cbc-", ignore_cleanup_errors=True) as folder:
        engine.tmpDir = folder
        try:
            problem.solve(engine)
        except pulp.PulpSolverError:
            return Run(None, -math.inf, "CBC crashed")
    status = pulp.LpStatus[problem.status]
    finished = problem.sol_status == pulp.LpSolutionOptimal
    if not finished and problem.sol_status != pulp.LpSolutionIntegerFeasible:
        return Run(None, -math.inf, status, infeasible=problem.status == pulp.LpStatusInfeasible)
    values = np.array([variable.varValue or 0.0 for variable in variables])
    cost = float(rows.cost @ np.round(values))
    bound = cost - (options.rel_gap + TOLERANCE / 10) * abs(cost) if finished else -math.inf
    return Run(values, bound, status, optimal=finished)


def _model(pulp: Any, rows: Rows, hint: Floats | None) -> tuple[Any, list[Any]]:
    problem = pulp.LpProblem("msq", pulp.LpMinimize)
    variables = [pulp.LpVariable(f"x{i}", cat=pulp.LpBinary) for i in range(rows.cost.size)]
    problem.setObjective(pulp.LpAffineExpression(list(zip(variables, rows.cost.tolist(), strict=True))))
    starts, matrix = rows.matrix.indptr.tolist(), rows.matrix
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        members, weights = matrix.indices[start:end].tolist(), matrix.data[start:end].tolist()
        terms = pulp.LpAffineExpression([(variables[i], weight) for i, weight in zip(members, weights, strict=True)])
        lower, upper = float(rows.lower[index]), float(rows.upper[index])
        sense = pulp.LpConstraintEQ if lower == upper else pulp.LpConstraintLE
        problem.addConstraint(pulp.LpConstraint(terms, sense, f"r{index}", upper))
    if hint is not None:
        for variable, value in zip(variables, hint.tolist(), strict=True):
            variable.setInitialValue(value)
    return problem, variables
