"""Lower convex hulls of many point sets at once.

The points of a set are (usage, loss); its lower left hull starts at the point of least usage and follows the
steepest descent of the loss, edge by edge, until the loss can't fall any more: the points that are best for
some price of the resource. All sets take a step together (gift wrapping), and points behind a set's last
corner are dropped, so the work is about points x (1/2) corners, all of it in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .structure import Floats, Integers, offsets


@dataclass(frozen=True, eq=False)
class Hulls:
    """Corners of the hull of every set.

    Attributes:
        start: (sets + 1,) CSR offsets into `point`.
        point: corners of each set, in the order of rising usage and falling loss, as positions in the input.
        slope: loss saved per usage on the edge that leads to the corner, never rising along a hull; inf for
            the first corner.
    """

    start: Integers
    point: Integers
    slope: Floats


def lower_hulls(start: Integers, usage: Floats, loss: Floats) -> Hulls:
    """Find the hulls.

    Args:
        start: (sets + 1,) offsets of the sets, none of them empty.
        usage, loss: (points,) coordinates.

    Of points with equal coordinates the first is taken; points inside an edge are no corners.
    """
    sets = np.arange(start.size - 1)
    owner = np.repeat(sets, np.diff(start))
    points = np.arange(usage.size)
    least = np.minimum.reduceat(usage, start[:-1])
    leanest = np.where(usage == least[owner], -loss, -np.inf)
    current = _first(sets, owner, points, leanest, np.zeros(points.size))
    descent = np.full(sets.size, np.inf)
    corners, owners, slopes = [current.copy()], [sets], [descent.copy()]
    while True:
        ahead = (usage[points] > usage[current[owner]]) & (loss[points] < loss[current[owner]])
        points, owner = points[ahead], owner[ahead]
        if not points.size:
            break
        sets = owner[np.flatnonzero(np.diff(owner, prepend=-1))]
        origin = current[owner]
        run = usage[points] - usage[origin]
        drop = loss[origin] - loss[points]
        corner = _first(sets, owner, points, drop / run, run)
        # rounding may let a slope exceed the one before by a hair; hulls are convex, so cut it
        slope = (loss[current[sets]] - loss[corner]) / (usage[corner] - usage[current[sets]])
        descent[sets] = np.minimum(descent[sets], slope)
        current[sets] = corner
        corners.append(corner)
        owners.append(sets)
        slopes.append(descent[sets])
    step = np.repeat(np.arange(len(owners)), [each.size for each in owners])
    owner_all = np.concatenate(owners)
    order = np.lexsort((step, owner_all))
    count = np.bincount(owner_all, minlength=start.size - 1)
    return Hulls(offsets(count), np.concatenate(corners)[order], np.concatenate(slopes)[order])


def _first(sets: Integers, owner: Integers, points: Integers, key: Floats, tie: Floats) -> Integers:
    """In each of `sets`, the first point of greatest key, ties to the greatest `tie`; (len(sets),).

    `owner` (points,) is ascending and holds exactly `sets`.
    """
    begin = np.searchsorted(owner, sets)
    row = np.repeat(np.arange(sets.size), np.diff(np.append(begin, owner.size)))
    best = np.maximum.reduceat(key, begin)
    tie = np.where(key == best[row], tie, -np.inf)
    hits = np.flatnonzero(tie == np.maximum.reduceat(tie, begin)[row])
    return points[hits[np.searchsorted(row[hits], np.arange(sets.size))]]
