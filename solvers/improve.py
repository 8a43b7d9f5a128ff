"""Better plans by moving one or two groups at a time to other configurations.

A plan above a cap is judged by how far it is above (sum over resources, relative to the cap), one that fits
by its loss. Every round looks at all pairs of moves among the most promising ones, standing still included,
and makes the best pair; it ends when none improves. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .configurations import Configurations
from .problem import Problem
from .reach import cap_units, usable_caps
from .structure import Floats, Integers, distinct

MAX_ROUNDS = 400
PAIR_MOVES = 400
"""Moves of which all pairs are tried: 160,000 pairs per resource and round."""


@dataclass(eq=False)
class _State:
    """A plan by groups.

    Attributes:
        chosen: (groups,) configuration of each group, -1 for what the plan had at first.
        loss: (groups,) loss of each group.
        usage: (resources, groups) use of each group.
    """

    chosen: Integers
    loss: Floats
    usage: Floats


def improve(
    problem: Problem,
    plan: Integers,
    configurations: Configurations,
    multipliers: Floats,
    clock: Clock,
) -> Integers:
    """The plan that local search reaches from `plan` (columns, ascending) by moves to `configurations`.

    Args:
        problem: supplies caps and groups.
        plan: where to start; may be above caps.
        configurations: where groups may move.
        multipliers: (resources,) prices by which promising moves are told.
        clock: the search ends early when its limit has passed.

    Returns:
        columns, ascending; never worse than `plan`, as judged above.
    """
    owner = problem.group[plan]
    groups = problem.groups
    state = _State(
        np.full(groups, -1, dtype=np.int64),
        np.bincount(owner, problem.loss[plan], groups).astype(np.float64),
        np.array([np.bincount(owner, use[plan], groups) for use in problem.usage]),
    )
    for _ in range(MAX_ROUNDS):
        if clock.over or not _move(problem, state, configurations, multipliers):
            break
    stayed = plan[state.chosen[owner] < 0]
    moved = configurations.columns_of(np.sort(state.chosen[state.chosen >= 0]))
    return np.sort(np.concatenate((stayed, moved)))


def _move(problem: Problem, state: _State, configurations: Configurations, multipliers: Floats) -> bool:
    """Make the best pair of moves; False if none improves the plan."""
    room = usable_caps(problem) - problem.base - state.usage.sum(axis=1)
    unit = cap_units(problem)
    loss = configurations.loss - state.loss[configurations.group]
    usage = configurations.usage - state.usage[:, configurations.group]
    excess = float((np.maximum(-room, 0.0) / unit).sum())
    moves = _promising(state, configurations, loss + multipliers @ usage, usage / unit[:, None], excess)
    # the last move is to stand still
    group = np.append(configurations.group[moves], -1)
    loss = np.append(loss[moves], 0.0)
    usage = np.column_stack((usage[:, moves], np.zeros(problem.resources)))

    over = np.zeros((group.size, group.size))
    for r in range(problem.resources):
        over += np.maximum(usage[r][:, None] + usage[r][None, :] - room[r], 0.0) / unit[r]
    over[group[:, None] == group[None, :]] = np.inf
    least = float(over.min())
    if not np.isfinite(least):
        return False
    cost = loss[:, None] + loss[None, :]
    cost[over > least] = np.inf
    first, second = np.unravel_index(int(np.argmin(cost)), cost.shape)
    gain = -float(cost[first, second])
    tiny = 1e-13 * (float(state.loss.sum()) + float(np.abs(loss).max()))
    if not (least < excess * (1 - 1e-9) or (least <= excess and gain > tiny)):
        return False
    for move in (int(first), int(second)):
        if move < moves.size:
            target = int(moves[move])
            where = int(configurations.group[target])
            state.chosen[where] = target
            state.loss[where] = configurations.loss[target]
            state.usage[:, where] = configurations.usage[:, target]
    return True


def _promising(state: _State, configurations: Configurations, priced: Floats, usage: Floats, excess: float) -> Integers:
    """At most `PAIR_MOVES` real moves: those of least priced change and, for a plan above a cap, the leanest.

    `usage` (resources, configurations) is the change relative to the caps.
    """
    real = np.flatnonzero(np.arange(configurations.count) != state.chosen[configurations.group])
    if real.size <= PAIR_MOVES:
        return real
    by_price = real[np.argsort(priced[real], kind="stable")]
    if excess == 0:
        return np.sort(by_price[:PAIR_MOVES])
    half = PAIR_MOVES // 2
    leanest = real[np.argsort(usage[:, real].sum(axis=0), kind="stable")]
    return distinct(np.concatenate((by_price[:half], leanest[:half])))
