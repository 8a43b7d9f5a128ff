"""Maximise a concave piecewise linear function of a few variables by cutting planes.

Kelley's method (1960) with the smoothing of Wentges (1997): the master problem gives the point where the
model of all cuts is largest; the function is asked halfway between that point and the best one so far, which
keeps the points from jumping across the box, and at the master's point itself whenever the halfway cut
doesn't cut it off. Ends when the model's maximum meets the best value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .clock import Clock
from .highest import highest
from .structure import Floats, Integers

Cut = tuple[float, Floats]
"""(c, g): the function is at most ``c + g @ point`` everywhere."""

MAX_ITERATIONS = 300
SMOOTHING = 0.5
BOX_GROWTH = 10.0
MAX_BOX_STEPS = 12


@dataclass(frozen=True, eq=False)
class Maximum:
    """Where the search ended.

    Attributes:
        point: (dimension,) best point.
        value: the function there: a bound from below on the maximum.
        upper: bound from above on the maximum over the domain last searched.
        cuts: all cuts, first those given.
        iterations: evaluations of the function.
    """

    point: Floats
    value: float
    upper: float
    cuts: list[Cut]
    iterations: int


def maximise(
    function: Callable[[Floats], Cut],
    start: Floats,
    *,
    box: float,
    simplex: bool = False,
    cuts: Sequence[Cut] = (),
    tolerance: float = 1e-9,
    clock: Clock | None = None,
    enough: Callable[[float], bool] = lambda value: False,
) -> Maximum:
    """Maximise over ``0 <= point <= box``, or over the unit simplex.

    Args:
        function: the cut that touches the function at a point; its value there is ``c + g @ point``.
        start: (dimension,) first point.
        box: bound on every coordinate, widened when the model's maximum lies on it. Ignored for the simplex.
        simplex: coordinates add up to 1.
        cuts: known cuts.
        tolerance: stop when ``upper - value <= tolerance * |upper|``.
        clock: stop when its limit has passed.
        enough: stop when this holds for the best value.
    """
    clock = clock or Clock()
    found = list(cuts)
    best, best_value, upper = start, -math.inf, math.inf
    basis: Integers | None = None
    iterations = widened = 0

    def ask(query: Floats) -> Cut:
        nonlocal best, best_value, iterations
        cut = function(query)
        found.append(cut)
        iterations += 1
        value = _at(cut, query)
        if value > best_value:
            best, best_value = query, value
        return cut

    def stop() -> bool:
        return enough(best_value) or clock.over or iterations >= MAX_ITERATIONS

    ask(start)
    while not stop():
        master, upper, basis = _master(found, start.size, 1.0 if simplex else box, simplex, basis)
        slack = tolerance * max(abs(upper), np.finfo(np.float64).tiny)
        if upper - best_value <= slack:
            if simplex or widened == MAX_BOX_STEPS or (best < box * (1 - 1e-9)).all():
                break
            box *= BOX_GROWTH
            widened += 1
            continue
        halfway = SMOOTHING * best + (1 - SMOOTHING) * master
        if _at(ask(halfway), master) >= upper - slack and not stop():
            ask(master)
    return Maximum(best, best_value, upper, found, iterations)


def _at(cut: Cut, point: Floats) -> float:
    return cut[0] + float(cut[1] @ point)


def _master(
    cuts: Sequence[Cut], dimension: int, box: float, simplex: bool, basis: Integers | None
) -> tuple[Floats, float, Integers]:
    """The point where the least of all cuts is largest, its value there, and the basis for the next time."""
    offset = np.array([cut[0] for cut in cuts])
    slope = np.array([cut[1] for cut in cuts])
    if simplex:
        # the last coordinate is what the others leave of 1
        point, basis = highest(
            offset + slope[:, -1], slope[:, :-1] - slope[:, -1:], np.ones(dimension - 1), total=1.0, basis=basis
        )
        point = np.append(point, max(0.0, 1.0 - point.sum()))
    else:
        point, basis = highest(offset, slope, np.full(dimension, box), basis=basis)
    return point, float((offset + slope @ point).min()), basis
