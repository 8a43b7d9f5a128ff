"""The highest point below a set of planes: a linear programme of a few variables and many rows.

    maximise  t   subject to   t <= offset_i + slope_i @ point,   0 <= point <= upper,   sum(point) <= total

Solved on its dual, which has one row per coordinate and one more (w weighs the planes, v the bounds, s the sum),

    minimise  offset @ w + upper @ v + total s   subject to   sum(w) = 1,   v + s >= slope^T w,   all >= 0,

by the revised simplex method. The basis has dimension + 1 columns, so a pivot takes some tens of microseconds, and
no solver has to be imported. The simplex multipliers of a basis are (t, point). More planes are more columns, and other
bounds other costs: the basis of one programme is a good start for the next.
"""

from __future__ import annotations

import math

import numpy as np

from .structure import Floats, Integers

TOLERANCE = 1e-13
"""Reduced costs this small, relative to what they are the difference of, count as zero."""
MAX_PIVOTS = 1000


def highest(
    offset: Floats, slope: Floats, upper: Floats, total: float = math.inf, basis: Integers | None = None
) -> tuple[Floats, Integers]:
    """The point of the domain where the least of all planes is largest; (dimension,).

    Args:
        offset: (planes,) at least one.
        slope: (planes, dimension).
        upper: (dimension,) finite, >= 0.
        total: most that the coordinates may sum to.
        basis: (dimension + 1,) of the programme with some of the first planes, where to start.

    Returns:
        the point, and the basis that it belongs to.
    """
    planes, dimension = slope.shape
    # columns of the dual: bounds, surplus, sum if that is bounded, planes
    one = np.eye(dimension)
    before = 2 * dimension + math.isfinite(total)
    matrix = np.zeros((dimension + 1, before + planes))
    matrix[1:, :dimension] = one
    matrix[1:, dimension : 2 * dimension] = -one
    matrix[1:, 2 * dimension : before] = 1.0
    matrix[0, before:] = 1.0
    matrix[1:, before:] = -slope.T
    cost = np.concatenate((upper, np.zeros(dimension), np.full(before - 2 * dimension, total), offset))
    right = np.zeros(dimension + 1)
    right[0] = 1.0
    if basis is None:
        first = int(np.argmin(offset))
        basis = np.append(np.arange(dimension) + np.where(slope[first] > 0, 0, dimension), before + first)
    basis = basis.copy()
    absolute = np.abs(matrix)
    multipliers = np.zeros(dimension + 1)
    for pivot in range(MAX_PIVOTS):
        inverse = np.linalg.inv(matrix[:, basis])
        multipliers = cost[basis] @ inverse
        reduced = cost - multipliers @ matrix
        size = np.abs(cost) + np.abs(multipliers) @ absolute
        reduced[basis] = 0.0
        entering = np.flatnonzero(reduced < -TOLERANCE * size)
        if not entering.size:
            break
        # the steepest, and after many pivots the first, which can't cycle (Bland 1977)
        column = int(entering[np.argmin(reduced[entering])] if pivot < MAX_PIVOTS // 2 else entering[0])
        direction = inverse @ matrix[:, column]
        level = np.maximum(inverse @ right, 0.0)
        blocking = np.flatnonzero(direction > 1e-11 * np.abs(direction).max())
        if not blocking.size:
            break
        ratios = level[blocking] / direction[blocking]
        ties = blocking[ratios <= ratios.min() * (1 + 1e-12)]
        basis[ties[np.argmin(basis[ties])]] = column
    return np.clip(multipliers[1:], 0.0, upper), basis
