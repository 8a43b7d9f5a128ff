"""Independent check of a plan: partition, resources and loss, recomputed exactly.

Shares no code with the solvers or with `structure`: counting and `math.fsum` over the chosen columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .problem import Problem

CAP_TOLERANCE = 1e-9
"""A plan may exceed a cap by this much, relative to the cap, to allow for rounding; no solver aims at it."""


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What a plan really is.

    Attributes:
        partition_ok: every layer of every group is covered exactly once.
        usage: (resources,) use of each resource, `base` included.
        excess: (resources,) ``usage - caps`` where positive, else 0.
        loss: sum over the chosen columns.
        feasible: `partition_ok`, no cap is exceeded by more than `CAP_TOLERANCE` relative, and the side
            constraints hold.
        message: one sentence on the first thing that is wrong; empty when feasible.
    """

    partition_ok: bool
    usage: npt.NDArray[np.float64]
    excess: npt.NDArray[np.float64]
    loss: float
    feasible: bool
    message: str


def check(problem: Problem, columns: npt.ArrayLike) -> CheckReport:
    """Recompute everything about the plan that consists of `columns` (any order).

    Columns that don't exist or appear twice make the partition wrong; they don't raise.
    """
    chosen = [int(column) for column in np.asarray(columns).ravel().tolist()]
    known = [column for column in chosen if 0 <= column < problem.loss.size]
    message = ""
    if len(known) != len(chosen):
        stranger = next(column for column in chosen if not 0 <= column < problem.columns)
        message = f"column {stranger} doesn't exist; there are {problem.columns}"
    plan = np.array(known, dtype=np.int64)
    message = message or _partition_message(problem, plan)
    usage = [math.fsum([float(problem.base[r]), *problem.usage[r, plan].tolist()]) for r in range(problem.resources)]
    caps = [float(cap) for cap in problem.caps]
    broken = [r for r in range(problem.resources) if usage[r] - caps[r] > CAP_TOLERANCE * abs(caps[r])]
    partition_ok = not message
    if broken and not message:
        r = broken[0]
        message = (
            f"{problem.resource_names[r]} is {usage[r]:.12g}, above its cap of {caps[r]:.12g} "
            f"by {usage[r] - caps[r]:.3g}"
        )
    if partition_ok and not message:
        message = _side_message(problem, known)
    return CheckReport(
        partition_ok=partition_ok,
        usage=np.array(usage),
        excess=np.array([max(0.0, use - cap) for use, cap in zip(usage, caps, strict=True)]),
        loss=math.fsum(problem.loss[plan].tolist()),
        feasible=not message,
        message=message,
    )


def _partition_message(problem: Problem, plan: npt.NDArray[np.int64]) -> str:
    """One sentence on the first layer that is not covered exactly once; empty if there is none."""
    sizes = problem.group_sizes.tolist()
    covered, again = [0] * len(sizes), [0] * len(sizes)
    groups, masks = problem.group[plan].tolist(), problem.mask[plan].tolist()
    for group, mask in zip(groups, masks, strict=True):
        again[group] |= covered[group] & mask
        covered[group] |= mask
    for group, size in enumerate(sizes):
        wrong = covered[group] ^ ((1 << size) - 1) | again[group]
        if wrong:
            layer = (wrong & -wrong).bit_length() - 1
            times = sum(mask >> layer & 1 for owner, mask in zip(groups, masks, strict=True) if owner == group)
            return f"layer {layer} of group {group} is covered {times} times instead of once"
    return ""


def _side_message(problem: Problem, chosen: Sequence[int]) -> str:
    """One sentence on the first side constraint that is broken; empty if there is none."""
    if not problem.has_side_constraints:
        return ""
    names = problem.choice_names
    used = sorted({int(problem.choice[column]) for column in chosen})
    if problem.max_choices is not None and len(used) > problem.max_choices:
        return f"{len(used)} choices are used ({', '.join(names[q] for q in used)}), {problem.max_choices} are allowed"
    if problem.same_choice is None:
        return ""
    start = [0]
    for size in problem.group_sizes.tolist():
        start.append(start[-1] + size)
    found: dict[int, int] = {}
    for column in chosen:
        mask, choice = int(problem.mask[column]), int(problem.choice[column])
        for bit in range(mask.bit_length()):
            label = int(problem.same_choice[start[int(problem.group[column])] + bit]) if mask >> bit & 1 else -1
            if label >= 0 and found.setdefault(label, choice) != choice:
                return f"layers that must agree (set {label}) have {names[found[label]]} and {names[choice]}"
    return ""
