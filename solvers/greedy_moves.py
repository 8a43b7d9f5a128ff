"""Exchange single columns of a plan for others of the same segment: towards the caps, then towards less loss."""

from __future__ import annotations

import numpy as np

from .clock import Clock
from .problem import Problem
from .reach import cap_units, fits, total_usage, usable_caps
from .structure import Floats, Integers, ranges


def _alternatives(problem: Problem, plan: Integers) -> tuple[Integers, Integers]:
    """All columns of the plan's segments, and for each the position in `plan` of what it would replace."""
    segments = problem.segments
    segment = segments.of_column[plan]
    lengths = segments.start[segment + 1] - segments.start[segment]
    return ranges(segments.start[segment], lengths), np.repeat(np.arange(plan.size), lengths)


def repair(problem: Problem, plan: Integers, clock: Clock) -> Integers:
    """Exchange columns until the plan meets the caps, each time the one that brings most per loss added.

    Returns:
        columns, ascending; still above a cap when no single exchange brings it closer.
    """
    plan = np.sort(plan)
    columns, position = _alternatives(problem, plan)
    unit = cap_units(problem)
    tiny = np.finfo(np.float64).eps * float(problem.loss[plan].sum() + problem.loss.max()) or 1.0
    while not fits(problem, plan) and not clock.over:
        excess = total_usage(problem, plan) - usable_caps(problem)
        change = problem.usage[:, columns] - problem.usage[:, plan[position]]
        before = (np.maximum(excess, 0.0) / unit).sum()
        after = (np.maximum(excess[:, None] + change, 0.0) / unit[:, None]).sum(axis=0)
        gain = before - after
        if not gain.max() > before * 1e-12:
            break
        price = np.maximum(problem.loss[columns] - problem.loss[plan[position]], 0.0) + tiny
        best = int(np.argmax(np.where(gain > 0, gain / price, -np.inf)))
        plan[position[best]] = columns[best]
    return np.sort(plan)


def fill(problem: Problem, plan: Integers, clock: Clock) -> Integers:
    """Spend what a plan leaves under the caps: exchanges that fit, those that save most per use first.

    Args:
        plan: columns of a plan that meets the caps.

    Returns:
        columns, ascending; no single exchange that fits has less loss.
    """
    plan = np.sort(plan)
    columns, position = _alternatives(problem, plan)
    unit = cap_units(problem)
    while not clock.over:
        left = usable_caps(problem) - total_usage(problem, plan)
        saved = problem.loss[plan[position]] - problem.loss[columns]
        change = problem.usage[:, columns] - problem.usage[:, plan[position]]
        useful = np.flatnonzero((saved > 0) & (change <= left[:, None]).all(axis=0))
        if not useful.size:
            break
        cost = (np.maximum(change[:, useful], 0.0) / unit[:, None]).sum(axis=0)
        order = useful[np.argsort(-_ratio(saved[useful], cost), kind="stable")]
        _, first = np.unique(position[order], return_index=True)
        for move in order[np.sort(first)].tolist():
            if (change[:, move] <= left).all():
                plan[position[move]] = columns[move]
                left = left - change[:, move]
    return np.sort(plan)


def _ratio(saved: Floats, cost: Floats) -> Floats:
    """Saving per cost; free savings come first, the largest of them in front."""
    free = cost <= 0
    return np.where(free, np.finfo(np.float64).max * (saved / saved.max()), saved / np.where(free, 1.0, cost))
