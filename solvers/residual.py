"""What the bounded programme leaves: columns whose deviation is within the gap, as a mixed-integer programme.

Everything is stated relative to the plan of least priced cost, layer by layer: column c covers layers l with shares
of that plan's loss and use, and enters with what it changes. The objective is then the distance to the dual bound,
scaled to order 1, and the rows are the room that this plan leaves, scaled by the largest change, so that HiGHS'
absolute tolerances (1e-6) are worth 1e-9 of the caps and less. Solved by `scipy.optimize.milp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .base import Options
from .problem import Problem
from .quiet import quiet_stdout
from .rows import cover_rows
from .solution import Stats
from .structure import Floats, Integers

SCALE = 1e3
"""The gap is scaled to this, so that an absolute gap of 1e-6 is 1e-9 of it."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What the mixed-integer solver said.

    Attributes:
        columns: its plan, or None. Not yet checked.
        bound: every plan of the residual has at least this much loss above the dual value; -inf if not known.
        infeasible: it says that the residual has no plan.
        stats: counts and remarks.
    """

    columns: Integers | None
    bound: float
    infeasible: bool
    stats: Stats = field(default_factory=dict)


def solve_residual(
    problem: Problem,
    deviations: Floats,
    cost: Floats,
    multipliers: Floats,
    gap: float,
    options: Options,
) -> Residual:
    """Solve over the columns that a plan better than the best one can have.

    Args:
        problem: supplies columns and caps.
        deviations: (columns,) at `multipliers`, see `configurations`.
        cost: (columns,) priced.
        multipliers: (resources,) prices.
        gap: loss of the best plan less the dual value; inf without a plan.
        options: time limit and asked gap.

    Returns:
        bound and plan; a bound above `gap` is cut down to it by the caller.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import vstack

    columns = np.flatnonzero(deviations <= gap * (1 + 1e-9))
    _, base = problem.structure.evaluate(cost)
    loss = _relative(problem, problem.loss, base, columns)
    usage = np.array([_relative(problem, use, base, columns) for use in problem.usage])
    room = problem.room - problem.usage[:, base].sum(axis=1)
    # what the base plan has above the dual value
    above = float(multipliers @ room)
    unit = (gap if math.isfinite(gap) and gap > 0 else max(float(np.abs(loss).max()), 1e-300)) / SCALE
    size = np.maximum(np.abs(usage).max(axis=1), np.finfo(np.float64).tiny)
    cover = cover_rows(problem, columns)
    layers = cover.shape[0]
    rows = LinearConstraint(
        vstack((usage / size[:, None], cover)),
        np.concatenate((np.full(problem.resources, -np.inf), np.ones(layers))),
        np.concatenate((room / size, np.ones(layers))),
    )
    limits = {"time_limit": _seconds(options), "mip_rel_gap": 0.0}
    with quiet_stdout():
        result = milp(
            loss / unit, integrality=np.ones(columns.size), bounds=Bounds(0.0, 1.0), constraints=rows, options=limits
        )
    stats: Stats = {"residual_columns": int(columns.size), "residual_status": str(result.message)}
    plan = None if result.x is None else columns[np.flatnonzero(result.x > 0.5)]
    bound = result.get("mip_dual_bound")
    known = bound is not None and math.isfinite(bound)
    return Residual(plan, float(bound) * unit + above if known else -math.inf, result.status == 2, stats)


def _seconds(options: Options) -> float:
    return min(max(options.clock.left, 1e-3), 1e9)


def _relative(problem: Problem, values: Floats, base: Integers, columns: Integers) -> Floats:
    """Values of columns less the shares that the base plan has in the layers they cover; (len(columns),).

    A base column's value is shared out evenly over its layers.
    """
    row, layer = problem.covers(base)
    share = np.zeros(int(problem.group_sizes.sum()))
    share[layer] = (values[base] / np.bincount(row))[row]
    row, layer = problem.covers(columns)
    total = np.bincount(row, share[layer], columns.size)
    return np.asarray(values[columns] - total)
