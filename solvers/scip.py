"""SCIP, through OR-Tools."""

from __future__ import annotations

from .base import Options
from .milp import MilpSolver, Run
from .or_tools import run_model_builder
from .rows import Rows
from .structure import Floats

FEASIBILITY_TOLERANCE = 1e-9
"""On rows of order 1. (A tighter setting of the tolerance on reduced costs makes SCIP complain on stderr.)"""
MAX_SEED = 2**31 - 1


class ScipSolver(MilpSolver):
    """The whole problem as one mixed-integer programme."""

    name = "scip"
    summary = "SCIP (OR-Tools): the whole problem as one mixed-integer programme"
    requires = ("ortools",)

    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        settings: dict[str, float | int | bool | str] = {
            "numerics/feastol": FEASIBILITY_TOLERANCE,
            "limits/gap": options.rel_gap,
            "limits/absgap": 0.0,
            "randomization/randomseedshift": options.seed % MAX_SEED,
            "parallel/maxnthreads": options.threads,
        }
        return run_model_builder("SCIP", rows, options, hint, settings)
