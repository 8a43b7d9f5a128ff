"""Leave out alternatives that another one beats in loss and in every resource.

Exact for one resource and for short lists. In a long list with several resources an alternative is compared with
those that agree in all resources but one, and with the best of those that are in smaller cells of a grid in every
resource: some that are beaten stay.
"""

from __future__ import annotations

import numpy as np

from .structure import Floats, Integers, ranges

PAIRWISE = 192
"""Longest list of which all pairs are compared."""
GRID_RESOURCES = 4
"""Most resources for which there is a grid: its size grows exponentially with them."""
CELLS_PER_ALTERNATIVE = 4.0
"""Cells of the grid: more tell alternatives better apart and cost more to walk."""
_EARLIER = np.tri(PAIRWISE, k=-1, dtype=bool).T


def undominated(loss: Floats, usage: Floats) -> Integers:
    """Positions of the alternatives that no other beats or equals, ascending; of equal ones the first stays.

    Args:
        loss: (alternatives,).
        usage: (resources, alternatives). Put resources that take few different values first.
    """
    if loss.size <= 1:
        return np.arange(loss.size)
    if usage.shape[0] == 1:
        return np.sort(staircase(loss, usage[0]))
    if loss.size <= PAIRWISE:
        return _pairwise(loss, usage)
    kept = _by_grid(loss, usage) if usage.shape[0] <= GRID_RESOURCES else np.arange(loss.size)
    return kept[_by_runs(loss[kept], usage[:, kept])]


def undominated_in_lists(start: Integers, loss: Floats, usage: Floats) -> Integers:
    """As `undominated` for many lists at once, each by itself.

    Args:
        start: (lists + 1,) offsets of the lists, none of them empty.
        loss: (alternatives,) of all lists, one after the other.
        usage: (resources, alternatives) likewise.
    """
    size = np.diff(start)
    if usage.shape[0] == 1:
        return _by_runs(loss, np.vstack((np.repeat(np.arange(size.size), size), usage)))
    kept = np.ones(loss.size, dtype=bool)
    for position in np.flatnonzero(size > PAIRWISE).tolist():
        part = slice(int(start[position]), int(start[position + 1]))
        kept[part] = False
        kept[start[position] + undominated(loss[part], usage[:, part])] = True
    short = np.flatnonzero((size > 1) & (size <= PAIRWISE))
    if short.size:
        member = ranges(start[:-1][short], size[short])
        rivals = np.repeat(size[short], size[short])
        one = np.repeat(member, rivals)
        two = ranges(np.repeat(start[:-1][short], size[short]), rivals)
        no_worse, better = loss[two] <= loss[one], (loss[two] < loss[one]) | (two < one)
        for use in usage:
            no_worse &= use[two] <= use[one]
            better |= use[two] < use[one]
        kept[one[no_worse & better]] = False
    return np.flatnonzero(kept)


def staircase(loss: Floats, usage: Floats) -> Integers:
    """As `undominated` for one resource, in the order of rising use and falling loss."""
    order = usage.argsort(kind="stable")
    loss = loss[order]
    lower = np.empty(order.size, dtype=bool)
    lower[:1] = True
    np.less(loss[1:], np.minimum.accumulate(loss)[:-1], out=lower[1:])
    order = order[lower]
    usage = usage[order]
    last = np.empty(order.size, dtype=bool)
    last[-1:] = True
    np.greater(usage[1:], usage[:-1], out=last[:-1])
    return np.asarray(order[last])


def _pairwise(loss: Floats, usage: Floats) -> Integers:
    """Compare all pairs. In lexical order what beats an alternative comes before it, and of equal ones the first."""
    order = np.lexsort((*usage[::-1], loss))
    no_worse = _EARLIER[: order.size, : order.size].copy()
    for use in usage[:, order]:
        no_worse &= use[:, None] <= use
    return np.sort(order[~no_worse.any(axis=0)])


def _by_runs(loss: Floats, usage: Floats) -> Integers:
    """Sort by all resources, the last one fastest; in runs of equal others, keep what lowers the least loss."""
    order = np.lexsort((loss, *usage[::-1]))
    rank = np.empty(loss.size, dtype=np.int64)
    rank[np.argsort(loss[order], kind="stable")] = np.arange(loss.size)
    run = np.zeros(loss.size, dtype=np.int64)
    np.cumsum((np.diff(usage[:-1, order], axis=1) != 0).any(axis=0), out=run[1:])
    # ranks, so that equal losses differ, lowered from run to run, so that one running minimum serves all runs
    key = rank - run * loss.size
    least = np.minimum.accumulate(key)
    kept = np.ones(loss.size, dtype=bool)
    kept[1:] = key[1:] < least[:-1]
    return np.sort(order[kept])


def _by_grid(loss: Floats, usage: Floats) -> Integers:
    """Drop what is no better than the least loss of all cells that are smaller in every resource."""
    resources = usage.shape[0]
    side = max(2, int((CELLS_PER_ALTERNATIVE * loss.size) ** (1 / resources)))
    low, extent = usage.min(axis=1), np.ptp(usage, axis=1)
    scale = side / np.where(extent > 0, extent, 1.0)
    cell = np.minimum((usage - low[:, None]) * scale[:, None], side - 1).astype(np.int64)
    flat = np.ravel_multi_index(tuple(cell), (side,) * resources)
    least = np.full(side**resources, np.inf)
    np.minimum.at(least, flat, loss)
    grid = least.reshape((side,) * resources)
    for axis in range(resources):
        np.minimum.accumulate(grid, axis=axis, out=grid)
    # one cell of infinities before the first, so that each looks at the cells strictly below its own
    padded = np.full((side + 1,) * resources, np.inf)
    padded[(slice(1, None),) * resources] = grid
    return np.flatnonzero(padded[tuple(cell)] > loss)
