"""Segments, partitions, hulls, frontier and bounds against direct enumeration."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from msq.solvers.check import check
from msq.solvers.clock import Clock
from msq.solvers.configurations import Penalties, enumerate_configurations
from msq.solvers.cutting_planes import maximise
from msq.solvers.dual import priced, solve_dual
from msq.solvers.errors import SolverError
from msq.solvers.frontier import frontier
from msq.solvers.hulls import lower_hulls
from msq.solvers.partitions import has_partition, partitions
from msq.solvers.reach import reachable

SEEDS = range(8)


@given(st.integers(1, 5), st.data())
@settings(max_examples=80, deadline=None)
def test_partitions_are_all_exact_covers(size, data) -> None:
    full = (1 << size) - 1
    masks = sorted(data.draw(st.sets(st.integers(1, full), min_size=1, max_size=9)))
    expected = set()
    for subset in range(1 << len(masks)):
        chosen = [masks[i] for i in range(len(masks)) if subset >> i & 1]
        if sum(chosen) == full and np.bitwise_or.reduce(chosen or [0]) == full:
            expected.add(tuple(i for i in range(len(masks)) if subset >> i & 1))
    found = list(partitions(masks, full))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert has_partition(masks, full) == bool(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_finds_the_least_plan(make_random, plans, seed) -> None:
    problem = make_random(seed, 2, 0.5)
    cost = np.random.default_rng(seed).normal(size=problem.columns)
    value, columns = problem.structure.evaluate(cost)
    assert check(problem, columns).partition_ok
    assert value == pytest.approx(cost[columns].sum())
    assert value == pytest.approx(min(cost[list(plan)].sum() for plan in plans(problem)))


def test_too_many_partitions_are_refused(make) -> None:
    columns = [(0, mask, 0, 1.0, (1.0,)) for mask in range(1, 1 << 9)]
    problem = make(columns, [100.0])
    with pytest.raises(SolverError, match=r"group 0 .* has more than 20000 partitions; offer fewer"):
        _ = problem.structure


@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=9), min_size=1))
@settings(max_examples=80, deadline=None)
def test_hulls_hold_the_best_point_for_every_price(sets) -> None:
    start = np.concatenate(([0], np.cumsum([len(points) for points in sets])))
    usage, loss = np.array([point for points in sets for point in points], dtype=float).T
    hulls = lower_hulls(start, usage, loss)
    for i, points in enumerate(sets):
        corners = hulls.point[hulls.start[i] : hulls.start[i + 1]]
        assert (np.diff(usage[corners]) > 0).all()
        assert (np.diff(loss[corners]) < 0).all()
        slopes = -np.diff(loss[corners]) / np.diff(usage[corners])
        assert (np.diff(slopes) < 0).all()
        np.testing.assert_allclose(hulls.slope[hulls.start[i] + 1 : hulls.start[i + 1]], slopes)
        for price in (0.0, 0.3, 1.0, 2.5, 100.0):
            best = min(b + price * a for a, b in points)
            assert (loss[corners] + price * usage[corners]).min() == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_frontier_is_the_hull_of_all_plans(make_random, plans, seed) -> None:
    problem = make_random(seed, 2, 0.5)
    table = [list(plan) for plan in plans(problem)]
    for resource in range(2):
        curve = frontier(problem, resource)
        usage = np.array([problem.usage[resource, plan].sum() for plan in table]) + problem.base[resource]
        loss = np.array([problem.loss[plan].sum() for plan in table])
        assert curve.usage[0] == pytest.approx(usage.min())
        assert curve.loss[-1] == pytest.approx(loss.min())
        hull = lower_hulls(np.array([0, usage.size]), usage, loss).point
        corners = np.unique(np.round(np.column_stack((curve.usage, curve.loss)), 9), axis=0)
        for corner in np.round(np.column_stack((usage[hull], loss[hull])), 9):
            assert np.abs(corners - corner).max(axis=1).min() < 3e-9
        for point in range(curve.points):
            report = check(problem, curve.columns(point))
            assert report.partition_ok
            assert report.loss == pytest.approx(curve.loss[point], rel=1e-9)
            assert report.usage[resource] == pytest.approx(curve.usage[point], rel=1e-12)
    with pytest.raises(SolverError, match="point: expected 0 to"):
        curve.columns(curve.points)
    with pytest.raises(SolverError, match=r"resource: expected 0 to 1 \(memory, latency@1\), got 2"):
        frontier(problem, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("resources", [1, 2, 3])
def test_dual_and_reach_bound_every_plan(make_random, plans, brute, seed, resources) -> None:
    problem = make_random(100 + seed, resources, 0.9)
    table = [list(plan) for plan in plans(problem)]
    usage = np.array([problem.usage[:, plan].sum(axis=1) for plan in table]) + problem.base
    reach = reachable(problem)
    np.testing.assert_allclose(reach.minimum_usage, usage.min(axis=0))
    least_scale = (usage / problem.caps).max(axis=1).min()
    assert reach.common_scale <= least_scale * (1 + 1e-9)
    if resources == 1:
        assert reach.common_scale == pytest.approx(least_scale)
    optimum = brute(problem)
    if reach.proven_infeasible:
        assert optimum == np.inf
    dual = solve_dual(problem, Clock())
    assert dual.infeasible == reach.proven_infeasible
    if not dual.infeasible:
        assert dual.value <= optimum * (1 + 1e-9)
        prices = dual.multipliers
        theta = problem.structure.evaluate(priced(problem, prices))[0] - prices @ problem.room
        assert dual.value == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_configurations_are_those_within_delta(make_random, plans, seed) -> None:
    problem = make_random(seed, 2, 0.5)
    cost = problem.loss + np.array([0.05, 0.02]) @ problem.usage
    value, _ = problem.structure.evaluate(cost)
    deviation = np.full(problem.columns, np.inf)
    configurations: dict[tuple[int, ...], float] = {}
    for plan in plans(problem):
        above = cost[list(plan)].sum() - value
        np.minimum.at(deviation, list(plan), above)
        for group in range(problem.groups):
            part = tuple(sorted(c for c in plan if problem.group[c] == group))
            configurations[part] = min(configurations.get(part, np.inf), above)
    penalties = Penalties.build(problem.structure, cost)
    np.testing.assert_allclose(penalties.total, deviation, atol=1e-12)
    for delta in (0.0, 0.05, 0.3, np.inf):
        listed = enumerate_configurations(problem, penalties, delta + 1e-12, limit=10**6)
        assert listed.complete
        found = {tuple(listed.columns_of(np.array([i])).tolist()): listed.deviation[i] for i in range(listed.count)}
        expected = {part: above for part, above in configurations.items() if above <= delta + 1e-12}
        assert len(found) == listed.count
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[part] for part in expected], list(expected.values()), atol=1e-12)
        few = enumerate_configurations(problem, penalties, delta, limit=3)
        assert few.count <= 3
    assert not few.complete
    np.testing.assert_allclose(listed.loss, [problem.loss[list(part)].sum() for part in found])


def test_reach_with_caps_at_and_below_zero(make) -> None:
    free = make([(0, 1, 0, 1.0, (0.0, 3.0)), (0, 1, 1, 0.0, (2.0, 1.0))], [0.0, 2.0])
    assert reachable(free).minimum_usage.tolist() == [0.0, 1.0]
    assert not reachable(free).proven_infeasible
    below = make([(0, 1, 0, 1.0, (1.0,))], [-1.0])
    assert reachable(below).proven_infeasible
    assert reachable(below).common_scale == np.inf
    base = make([(0, 1, 0, 1.0, (0.0,))], [4.0], [5.0])
    assert reachable(base).proven_infeasible
    assert reachable(base).common_scale == pytest.approx(1.25)


def test_cutting_planes_reach_the_top_and_widen_the_box() -> None:
    planes = [(0.0, np.array([1.0, 0.0])), (0.0, np.array([0.0, 1.0])), (3e4, np.array([-1.0, -1.0]))]

    def function(point: np.ndarray) -> tuple[float, np.ndarray]:
        return min(planes, key=lambda cut: cut[0] + cut[1] @ point)

    top = maximise(function, np.zeros(2), box=10.0)
    assert top.value == pytest.approx(1e4)
    np.testing.assert_allclose(top.point, [1e4, 1e4], rtol=1e-6)
