"""How low the resources can go: tightest reachable values, and proofs that no plan meets the caps.

Alone, the least use of a resource is exact. Together, for any weights mu >= 0 that add up to 1,

    max_r use_r(x) / cap_r  >=  sum_r mu_r use_r(x) / cap_r  >=  min_x sum_r mu_r use_r(x) / cap_r =: f(mu),

so the largest f, found by cutting planes over the simplex, bounds from below the factor by which all caps
must be multiplied before a plan can meet them; above 1 it proves infeasibility (a Farkas certificate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .check import CAP_TOLERANCE
from .clock import Clock
from .cutting_planes import Cut, maximise
from .problem import Problem
from .structure import Floats, Integers

ROUNDING = 1e-12
"""Relative excess over a cap that solvers put down to the order of additions."""


@dataclass(frozen=True, eq=False)
class Reach:
    """What can be reached.

    Attributes:
        minimum_usage: (resources,) least value that each resource can take alone, `base` included; exact.
        common_scale: lower bound on the least factor s such that all ``s * caps`` can be met together; exact
            for one resource. inf when a cap that must be positive isn't.
        proven_infeasible: no plan meets the caps, not even with the checker's tolerance.
        plans: plans met on the way (columns, ascending).
        weights: (resources,) the mu behind `common_scale`.
    """

    minimum_usage: Floats
    common_scale: float
    proven_infeasible: bool
    plans: list[Integers] = field(default_factory=list)
    weights: Floats | None = None


def total_usage(problem: Problem, columns: Integers) -> Floats:
    """Use of each resource by a plan, `base` included; (resources,)."""
    return np.asarray(problem.base + problem.usage[:, columns].sum(axis=1))


def fits(problem: Problem, columns: Integers) -> bool:
    """Whether a plan meets every cap, up to rounding."""
    return bool((total_usage(problem, columns) <= usable_caps(problem)).all())


def cap_units(problem: Problem) -> Floats:
    """Size of each resource to measure excess in: its cap, or where that is 0 its largest use; (resources,)."""
    size = np.abs(problem.caps)
    size = np.where(size > 0, size, problem.usage.max(axis=1))
    return np.where(size > 0, size, 1.0)


def usable_caps(problem: Problem) -> Floats:
    """The caps with room for rounding in sums; (resources,)."""
    return np.asarray(problem.caps + ROUNDING * np.abs(problem.caps))


def reachable(problem: Problem, *, clock: Clock | None = None, only_prove: bool = False) -> Reach:
    """Find out how far the caps could be lowered, or have to be raised.

    Args:
        problem: whose `caps` set the proportions between the resources.
        clock: the joint bound stops early, still valid, when its limit has passed.
        only_prove: stop as soon as infeasibility is proven or a plan that meets the caps is found;
            `common_scale` is then a weaker bound.
    """
    structure, caps = problem.structure, problem.caps
    plans = [structure.evaluate(usage)[1] for usage in problem.usage]
    alone = np.array([total_usage(problem, plan)[r] for r, plan in enumerate(plans)])
    infeasible = bool((alone > caps + CAP_TOLERANCE * np.abs(caps)).any())
    if (caps < 0).any() or ((caps == 0) & (alone > 0)).any():
        return Reach(alone, math.inf, infeasible, plans)
    positive = np.flatnonzero(caps > 0)
    if positive.size == 0:
        return Reach(alone, 0.0, infeasible, plans)
    ratios = alone[positive] / caps[positive]
    tightest = int(positive[np.argmax(ratios)])
    weights = np.zeros(problem.resources)
    weights[tightest] = 1.0
    scale = float(ratios.max())
    settled = only_prove and (infeasible or any(fits(problem, plan) for plan in plans))
    if positive.size == 1 or settled:
        return Reach(alone, scale, infeasible, plans, weights)

    def least(mu: Floats) -> Cut:
        _, plan = structure.evaluate((mu / caps[positive]) @ problem.usage[positive])
        plans.append(plan)
        return 0.0, total_usage(problem, plan)[positive] / caps[positive]

    def enough(value: float) -> bool:
        return only_prove and (value > 1 + CAP_TOLERANCE or fits(problem, plans[-1]))

    known = [(0.0, total_usage(problem, plan)[positive] / caps[positive]) for plan in plans]
    start = np.full(positive.size, 1.0 / positive.size)
    joint = maximise(least, start, box=1.0, simplex=True, cuts=known, clock=clock, enough=enough)
    if joint.value > scale:
        scale = joint.value
        weights[:] = 0.0
        weights[positive] = joint.point
    return Reach(alone, scale, infeasible or scale > 1 + CAP_TOLERANCE, plans, weights)
