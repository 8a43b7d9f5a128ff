"""HiGHS, through OR-Tools.

It gets no starting plan: OR-Tools 9.15 crashes when it hands hints to HiGHS (segmentation fault in `solve`).
"""

from __future__ import annotations

from .base import Options
from .milp import MilpSolver, Run
from .or_tools import run_model_builder
from .rows import Rows
from .structure import Floats

TOLERANCE = 1e-9
"""On rows of order 1, and on integrality."""
MAX_SEED = 2**31 - 1


class HighsSolver(MilpSolver):
    """The whole problem as one mixed-integer programme."""

    name = "highs"
    summary = "HiGHS (OR-Tools): the whole problem as one mixed-integer programme"
    requires = ("ortools",)

    def _run(self, rows: Rows, options: Options, hint: Floats | None) -> Run:
        settings: dict[str, float | int | bool | str] = {
            "mip_rel_gap": options.rel_gap,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": TOLERANCE,
            "primal_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
            "random_seed": options.seed % MAX_SEED,
            "threads": options.threads,
            "output_flag": False,
        }
        return run_model_builder("HIGHS", rows, options, None, settings)
