"""A table of realistic size: bounds and plans agree across backends."""

from __future__ import annotations

import numpy as np
import pytest
from msq.solvers.check import check
from msq.solvers.frontier import frontier
from msq.solvers.problem import Problem, column_order
from msq.solvers.registry import get_solver
from msq.solvers.solution import Status


def transformer(blocks: int, bits_cap: float, tokens_cap: float | None) -> Problem:
    """Layers shaped like a Llama block (q, k, v | o | gate, up | down), twelve rates, fusion saves time."""
    random = np.random.default_rng(blocks)
    shapes = [[(4, 4), (1, 4), (1, 4)], [(4, 4)], [(14, 4), (14, 4)], [(4, 14)]]
    rates = np.arange(1.5, 7.5, 0.5)
    rows, sizes, sensitivity, weights = [], [], [], []
    for _ in range(blocks):
        for layers in shapes:
            size = np.array([2.0**20 * out * into for out, into in layers])
            scale = random.lognormal(-4, 1.2, len(layers))
            for mask in range(1, 1 << len(layers)):
                covered = np.array([mask >> i & 1 for i in range(len(layers))], dtype=bool)
                for choice, bits in enumerate(rates):
                    loss = scale[covered].sum() * 1.1 * 4.0**-bits
                    memory = size[covered].sum() * bits / 8
                    time = 2.0 + memory / 1e6 * random.uniform(0.95, 1.05)
                    rows.append((len(sizes), mask, choice, loss, memory, time, bits))
            sizes.append(len(layers))
            sensitivity.extend(scale)
            weights.extend(size)
    table = np.array(rows)
    group, mask = table[:, 0].astype(int), table[:, 1].astype(int)
    order = column_order(group, mask)
    table = table[order]
    total = float(np.sum(weights))
    caps = [bits_cap / 8 * total] + ([tokens_cap] if tokens_cap is not None else [])
    return Problem(
        group=group[order],
        mask=mask[order],
        choice=table[:, 2].astype(int),
        loss=table[:, 3],
        usage=table[:, 4 : 4 + len(caps)].T,
        caps=np.array(caps),
        base=np.array([0.0, 10.0])[: len(caps)],
        group_sizes=np.array(sizes),
        resource_names=("memory", "latency@1")[: len(caps)],
        choice_names=tuple(f"rate-{bits}" for bits in rates),
        layer_sensitivity=np.array(sensitivity),
        layer_weights=np.array(weights),
        column_bits=table[:, 6],
    )


@pytest.mark.parametrize("tokens_cap", [None, 470.0])
def test_lagrangian_is_near_the_proven_optimum(tokens_cap) -> None:
    problem = transformer(6, 3.25, tokens_cap)
    best = get_solver("scip").solve(problem, time_limit=30, rel_gap=1e-7)
    assert best.status is Status.OPTIMAL
    quick = get_solver("lagrangian").solve(problem)
    assert quick.objective <= best.objective * 1.005
    assert quick.lower_bound <= best.objective * (1 + 1e-9)
    assert quick.lower_bound >= best.objective * 0.98
    for name in ("uniform", "water_filling"):
        simple = get_solver(name).solve(problem)
        assert simple.status is Status.FEASIBLE
        assert simple.objective >= best.objective * (1 - 1e-9)
        assert simple.lower_bound <= best.objective


def test_water_filling_bounds_memory_only() -> None:
    assert np.isfinite(get_solver("water_filling").solve(transformer(4, 3.0, None)).lower_bound)
    assert get_solver("water_filling").solve(transformer(4, 3.0, 470.0)).lower_bound == -np.inf


def test_shadow_price_is_the_slope_of_the_frontier() -> None:
    problem = transformer(4, 3.0, None)
    curve = frontier(problem, 0)
    solution = get_solver("lagrangian").solve(problem)
    after = int(np.searchsorted(curve.usage, problem.caps[0], side="right"))
    assert solution.multipliers is not None
    assert solution.multipliers[0] == pytest.approx(curve.price[after], rel=1e-9)
    share = (problem.caps[0] - curve.usage[after - 1]) / (curve.usage[after] - curve.usage[after - 1])
    interpolated = curve.loss[after - 1] + share * (curve.loss[after] - curve.loss[after - 1])
    assert solution.lower_bound == pytest.approx(interpolated, rel=1e-10)


def test_every_frontier_point_is_a_plan() -> None:
    problem = transformer(3, 3.0, 470.0)
    for resource in range(2):
        curve = frontier(problem, resource)
        assert (np.diff(curve.usage) > 0).all()
        assert (np.diff(curve.loss) < 0).all()
        assert (np.diff(curve.price) <= 0).all()
        for point in range(curve.points):
            report = check(problem, curve.columns(point))
            assert report.partition_ok
            assert report.usage[resource] == pytest.approx(curve.usage[point], rel=1e-12)
            assert report.loss == pytest.approx(curve.loss[point], rel=1e-9)
