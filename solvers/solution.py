"""What a solver answers, and how much of it is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from .structure import Floats, Integers


class Status(StrEnum):
    """What is known about the problem."""

    OPTIMAL = "optimal"  # a plan, proven to be within the asked relative gap of the best
    FEASIBLE = "feasible"  # a plan
    INFEASIBLE = "infeasible"  # proven: no plan meets the caps
    UNKNOWN = "unknown"  # neither a plan nor a proof


class Limit(StrEnum):
    """Which limit stopped the solver before it was done."""

    NONE = "none"
    TIME = "time"


Stats = dict[str, float | int | str]


@dataclass(frozen=True, eq=False)
class Solution:
    """A checked answer.

    Attributes:
        columns: (chosen,) int64, ascending; None without a plan.
        objective: loss of the plan, recomputed from its columns; inf without a plan.
        lower_bound: no plan has less loss; -inf when nothing was proven, inf when proven infeasible.
        status: what is known.
        limit: what stopped the solver.
        solver: name of the backend.
        seconds: wall time, everything included.
        multipliers: (resources,) shadow prices >= 0, loss saved per unit of a resource; None if not known.
        stats: counts and remarks of the backend.
    """

    columns: Integers | None
    objective: float
    lower_bound: float
    status: Status
    limit: Limit
    solver: str
    seconds: float
    multipliers: Floats | None = None
    stats: Stats = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Relative gap ``(objective - lower_bound) / |objective|``, see `relative_gap`."""
        return relative_gap(self.objective, self.lower_bound)


def relative_gap(objective: float, lower_bound: float) -> float:
    """``(objective - lower_bound) / |objective|``: 0 when both are equal, inf when either is infinite."""
    if not math.isfinite(objective) or not math.isfinite(lower_bound):
        return math.inf
    difference = objective - lower_bound
    return 0.0 if difference == 0 else difference / max(abs(objective), float(np.finfo(np.float64).tiny))
