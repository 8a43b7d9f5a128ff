"""Theorem 3.1 of Q-Palette (arXiv 2509.20214), rounded to columns that exist, then repaired and filled up.

With ideal Gaussian quantizers, err = 2^(-2b), the loss sum_l a_l 2^(-2 b_l) under sum_l d_l b_l <= M is least at

    b*_l = max(eta_l, 1/2 log2(a_l / d_l) + C),

with eta_l the least rate on offer and C set by the budget. Every group then takes the partition and columns
whose rates are nearest to b*, sum_l d_l (bits - b*_l)^2 (ties: less loss, then less use); C is raised by bisection
as far as the rounded plan meets all caps, and what is left is spent greedily.
"""

from __future__ import annotations

import math

import numpy as np

from .base import Answer, Options, Solver
from .errors import SolverError
from .greedy_moves import fill, repair
from .problem import Problem
from .reach import fits, reachable
from .solution import Limit
from .structure import Floats, Integers, offsets

BISECTIONS = 60
LOSS_TIE = 1e-6
"""Weight of the loss in the rounding, relative to one squared bit: decides between equal rates."""
USE_TIE = 1e-9
"""Weight of the use of all resources in the rounding: decides between equal losses."""


class WaterFillingSolver(Solver):
    """Ideal rates, rounded."""

    name = "water_filling"
    summary = "ideal rates of Theorem 3.1 (Q-Palette), rounded, repaired and filled up"

    def _solve(self, problem: Problem, options: Options) -> Answer:
        ideal = _Ideal(problem)
        low, high = ideal.range()
        plan = ideal.rounded(low)
        steps = 0
        if fits(problem, plan):
            top = ideal.rounded(high)
            if fits(problem, top):
                plan, low = top, high
            while steps < BISECTIONS and low < high and not options.clock.over:
                middle = (low + high) / 2
                candidate = ideal.rounded(middle)
                steps += 1
                if fits(problem, candidate):
                    plan, low = candidate, middle
                else:
                    high = middle
        else:
            plan = repair(problem, plan, options.clock)
        if not fits(problem, plan):
            proven = reachable(problem, clock=options.clock, only_prove=True).proven_infeasible
            remark = "the rounded plan can't be repaired by single exchanges; another solver may find one"
            limit = Limit.TIME if options.clock.over else Limit.NONE
            return Answer(infeasible=proven, limit=limit, stats={} if proven else {"remark": remark})
        return Answer(
            columns=fill(problem, plan, options.clock),
            lower_bound=ideal.lower_bound(),
            limit=Limit.TIME if options.clock.over else Limit.NONE,
            stats={"level": low, "bisections": steps},
        )


class _Ideal:
    """The ideal rates of a problem, and their rounding."""

    def __init__(self, problem: Problem) -> None:
        absent = [
            name for name in ("layer_sensitivity", "layer_weights", "column_bits") if getattr(problem, name) is None
        ]
        if problem.layer_sensitivity is None or problem.layer_weights is None or problem.column_bits is None:
            raise SolverError(
                f"water_filling: expected a problem with layer_sensitivity, layer_weights and column_bits, "
                f"{', '.join(absent)} missing; supply them or choose another solver"
            )
        self.problem = problem
        self.sensitivity, self.weights = problem.layer_sensitivity, problem.layer_weights
        self.bits = problem.column_bits
        structure = problem.structure
        segments = structure.segments
        first_layer = offsets(problem.group_sizes.astype(np.int64))
        self._pair_segment, bit = np.nonzero((segments.mask[:, None] >> np.arange(int(problem.group_sizes.max()))) & 1)
        self._pair_layer = first_layer[segments.group[self._pair_segment]] + bit
        self._segment_of_column = segments.of_column
        self.floor = np.full(self.weights.size, np.inf)
        np.minimum.at(self.floor, self._pair_layer, structure.segment_minima(self.bits)[self._pair_segment])
        with np.errstate(divide="ignore"):
            self.level = 0.5 * np.log2(self.sensitivity / self.weights)
        self._ties = self._tie_breaks()

    def rates(self, constant: float) -> Floats:
        """b* of Theorem 3.1 at C = `constant`; (layers,)."""
        return np.asarray(np.maximum(self.floor, self.level + constant))

    def range(self) -> tuple[float, float]:
        """C below which all rates are least, and C above which all are beyond the highest on offer."""
        level = self.level[np.isfinite(self.level)]
        if not level.size:
            return 0.0, 0.0
        return float(self.floor.min() - level.max()), float(self.bits.max() - level.min())

    def _per_segment(self, layer_values: Floats) -> Floats:
        """Sum of a value (layers,) over the layers of each segment; (segments,)."""
        count = self.problem.segments.mask.size
        return np.bincount(self._pair_segment, layer_values[self._pair_layer], count).astype(np.float64)

    def _tie_breaks(self) -> Floats:
        """A small cost for loss and a smaller one for use, relative to the largest in the group; (columns,)."""
        problem = self.problem
        start = problem.segments.start[problem.segments.group_start[:-1]]

        def relative(value: Floats) -> Floats:
            largest = np.maximum.reduceat(value, start)
            return np.asarray(value / np.where(largest > 0, largest, 1.0)[problem.group])

        use = sum(relative(usage) for usage in problem.usage)
        return LOSS_TIE * relative(problem.loss) + USE_TIE * np.asarray(use)

    def rounded(self, constant: float) -> Integers:
        """The plan nearest to the ideal rates; columns, ascending."""
        rates = self.rates(constant)
        layers = offsets(self.problem.group_sizes.astype(np.int64))
        scale = np.add.reduceat(self.weights, layers[:-1])[self.problem.group]
        zeroth, first, second = (
            self._per_segment(self.weights * rates**power)[self._segment_of_column] for power in (0, 1, 2)
        )
        distance = (self.bits**2 * zeroth - 2 * self.bits * first + second) / scale
        return self.problem.structure.evaluate(distance + self._ties)[1]

    def lower_bound(self) -> float:
        """Loss of the ideal quantizers at the memory cap, if that is below every plan's; else -inf.

        Holds when memory in bytes is the only resource, no column loses less than the ideal sum of
        a_l 2^(-2 bits), and none uses less than the sum of d_l bits / 8. Any C gives a bound by weak duality,
        with the price 16 ln(2) 4^(-C) of a byte, so rounding in C does no harm.
        """
        problem = self.problem
        if problem.resource_names != ("memory",):
            return -math.inf
        sensitivity = self._per_segment(self.sensitivity)[self._segment_of_column]
        weights = self._per_segment(self.weights)[self._segment_of_column]
        rounding = 1 + 1e-12
        if (problem.loss * rounding < sensitivity * 4.0**-self.bits).any():
            return -math.inf
        if (problem.usage[0] * rounding < weights * self.bits / 8).any():
            return -math.inf
        room = float(problem.room[0])
        low, high = self.range()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if float(self.weights @ self.rates(middle)) / 8 <= room:
                low = middle
            else:
                high = middle
        rates = self.rates(low)
        price = float(16 * math.log(2) * 4.0**-low)
        ideal = float(self.sensitivity @ 4.0**-rates)
        bound = ideal + price * (float(self.weights @ rates) / 8 - room)
        return bound - 1e-9 * abs(bound)


def ideal_curve(problem: Problem, points: int = 256) -> tuple[Floats, Floats]:
    """Loss of ideal Gaussian quantizers at the rates of Theorem 3.1, against their memory.

    Args:
        problem: with layer_sensitivity, layer_weights and column_bits; rates don't go below the least on offer.
        points: of the curve, evenly spaced in C.

    Returns:
        (points,) bytes, rising, tables and scales left out, and (points,) loss.

    Raises:
        SolverError: the problem lacks what Theorem 3.1 needs.
    """
    ideal = _Ideal(problem)
    rates = np.array([ideal.rates(constant) for constant in np.linspace(*ideal.range(), points)])
    return rates @ ideal.weights / 8, 4.0**-rates @ ideal.sensitivity
