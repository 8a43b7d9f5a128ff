"""The parts of `exact` against direct enumeration, and each of its stages against brute force."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise, product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from msq.solvers import completion, dominance, exact, join, programme
from msq.solvers.clock import Clock
from msq.solvers.completion import Completion
from msq.solvers.configurations import Penalties, enumerate_configurations
from msq.solvers.dominance import undominated
from msq.solvers.dual import priced, solve_dual
from msq.solvers.highest import highest
from msq.solvers.registry import get_solver
from msq.solvers.residual import solve_residual
from msq.solvers.search import search
from msq.solvers.solution import Limit, Status


def beats(loss, usage, one, other) -> bool:
    """Whether `one` is no worse than `other` in everything, and either better in something or earlier."""
    no_worse = loss[one] <= loss[other] and (usage[:, one] <= usage[:, other]).all()
    equal = loss[one] == loss[other] and (usage[:, one] == usage[:, other]).all()
    return bool(no_worse and (not equal or one < other))


@given(st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_short_lists_lose_exactly_what_is_beaten(resources, seed) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 40))
    loss = random.integers(0, 6, count).astype(float)
    usage = random.integers(0, 6, (resources, count)).astype(float)
    expected = [i for i in range(count) if not any(beats(loss, usage, j, i) for j in range(count) if j != i)]
    assert undominated(loss, usage).tolist() == expected


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_long_lists_keep_everything_that_is_not_beaten(monkeypatch, resources, seed) -> None:
    monkeypatch.setattr(dominance, "PAIRWISE", 1)
    random = np.random.default_rng(seed)
    loss = random.integers(0, 20, 300).astype(float)
    usage = random.integers(0, 20, (resources, 300)).astype(float)
    kept = set(undominated(loss, usage).tolist())
    needed = {i for i in range(300) if not any(beats(loss, usage, j, i) for j in range(300) if j != i)}
    if resources == 1:
        assert kept == needed
    else:
        assert len(kept) < 300
        # of equal ones any may stay
        assert {tuple(v) for v in np.vstack((loss, usage)).T[sorted(kept)]} >= {
            tuple(v) for v in np.vstack((loss, usage)).T[sorted(needed)]
        }


@dataclass
class Side:
    deviation: np.ndarray
    loss: np.ndarray
    usage: np.ndarray


@pytest.mark.parametrize("resources", [2, 3])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("direct", [0, 10**6])
def test_best_pair_is_the_best_of_all_pairs(monkeypatch, resources, seed, direct) -> None:
    monkeypatch.setattr(join, "CHUNK", 50)
    monkeypatch.setattr(join, "DIRECT", direct)
    random = np.random.default_rng(seed)
    prices = random.uniform(0.1, 2, resources) * (random.random(resources) < 0.8)

    def side(count: int) -> Side:
        deviation = np.sort(random.exponential(1.0, count))
        usage = random.normal(0, 3, (resources, count)).round(int(random.integers(0, 4)))
        return Side(deviation, deviation - prices @ usage, usage)

    first, second = side(int(random.integers(1, 80))), side(int(random.integers(1, 80)))
    room = random.normal(0, 2, resources)
    for delta in (0.5, 3.0, 20.0):
        total = first.loss[:, None] + second.loss[None, :]
        use = first.usage[:, :, None] + second.usage[:, None, :]
        worth = total + prices @ room
        allowed = (use <= room[:, None, None]).all(axis=0) & (worth <= delta)
        pair = join.best_pair(first, second, room, prices, delta, Clock())
        assert pair.complete
        if allowed.any():
            assert total[pair.first, pair.second] == pytest.approx(total[allowed].min())
            assert allowed[pair.first, pair.second]
        elif pair.first >= 0:
            assert (use[:, pair.first, pair.second] <= room).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("stairs", [0, 10**6])
def test_search_finds_the_best_plan_within_delta(monkeypatch, make_random, plans, seed, resources, stairs) -> None:
    monkeypatch.setattr(programme, "FEW_BLOCKS", 1 + seed % 4)
    monkeypatch.setattr(completion, "MOST_STAIRS", stairs)
    problem = make_random(seed, resources, 0.6)
    dual = solve_dual(problem, Clock())
    cost = priced(problem, dual.multipliers)
    penalties = Penalties.build(problem.structure, cost)
    base = problem.structure.evaluate(cost)[0]
    for delta in (0.02, 0.2, 5.0):
        near = enumerate_configurations(problem, penalties, delta, limit=10**6)
        found = search(problem, near, dual.multipliers, delta, limit=10**6, clock=Clock())
        assert found.complete
        within = [
            problem.loss[list(plan)].sum()
            for plan in plans(problem)
            if (problem.usage[:, list(plan)].sum(axis=1) <= problem.room).all()
            and problem.loss[list(plan)].sum() + dual.multipliers @ problem.room <= base + delta
        ]
        if within:
            assert found.columns is not None
            assert problem.loss[found.columns].sum() == pytest.approx(min(within))
            assert found.least <= min(within) + dual.multipliers @ problem.room - base + 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_staircases_are_the_cheapest_continuations(seed) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 4, 5)
    start = np.concatenate(([0], np.cumsum(sizes)))
    members = [np.arange(low, high) for low, high in pairwise(start)]
    loss, usage = random.normal(0, 1, start[-1]), random.normal(0, 2, (2, start[-1])).round(int(random.integers(0, 3)))
    room, prices = random.normal(0, 2, 2), random.uniform(0.1, 1, 2)
    stairs = Completion(0, members, loss, usage, room, prices, delta=1e9)
    cost = loss + prices[1] * usage[1]
    for place in range(len(members) + 1):
        for found, part in ((stairs.behind, members[place:]), (stairs.before, members[:place])):
            rests = [(sum(usage[0, c] for c in rest), sum(cost[c] for c in rest)) for rest in product(*part)]
            for x in random.normal(0, 6, 10):
                least = min((price for use, price in rests if use <= x), default=math.inf)
                assert found[place].least_cost(np.array([x]))[0] == pytest.approx(least)


def test_search_without_enough_states_says_so(make_random) -> None:
    problem = make_random(3, 2, 0.6)
    dual = solve_dual(problem, Clock())
    penalties = Penalties.build(problem.structure, priced(problem, dual.multipliers))
    near = enumerate_configurations(problem, penalties, 5.0, limit=10**6)
    assert not search(problem, near, dual.multipliers, 5.0, limit=2, clock=Clock()).complete
    few = enumerate_configurations(problem, penalties, 5.0, limit=4)
    assert not search(problem, few, dual.multipliers, 5.0, limit=10**6, clock=Clock()).complete


@pytest.mark.parametrize(("small", "large"), [(1, 2), (4, 10), (1, 10**5)])
@pytest.mark.parametrize("resources", [1, 2, 3])
def test_every_stage_proves_the_optimum(monkeypatch, make_random, brute, small, large, resources) -> None:
    monkeypatch.setattr(exact, "SMALL", small)
    monkeypatch.setattr(exact, "LARGE", large)
    residuals = 0
    for seed in range(8):
        for tightness in (0.4, 0.9):
            problem = make_random(500 + 10 * resources + seed, resources, tightness)
            optimum = brute(problem)
            solution = get_solver("exact").solve(problem, rel_gap=0.0, time_limit=30)
            residuals += "residual_columns" in solution.stats
            assert "rejected" not in solution.stats
            if math.isinf(optimum):
                assert solution.status is Status.INFEASIBLE
            else:
                assert solution.status is Status.OPTIMAL
                assert solution.objective == pytest.approx(optimum, rel=1e-9)
                assert solution.gap <= 1e-9
    if large != 10:
        assert (residuals > 0) == (large == 2)


def test_too_large_a_residual_is_skipped_with_an_honest_gap(monkeypatch, make_random, brute) -> None:
    for name, value in (("SMALL", 1), ("LARGE", 1), ("MAX_RESIDUAL", 0)):
        monkeypatch.setattr(exact, name, value)
    problem = make_random(2, 2, 0.6)
    solution = get_solver("exact").solve(problem, rel_gap=0.0)
    assert "residual_skipped" in solution.stats
    assert solution.status is Status.FEASIBLE
    assert solution.limit is Limit.NONE
    assert solution.lower_bound <= brute(problem) <= solution.objective


def test_residual_bounds_what_is_above_the_dual(make_random, brute) -> None:
    from msq.solvers.base import Options

    problem = make_random(11, 2, 0.7)
    dual = solve_dual(problem, Clock())
    cost = priced(problem, dual.multipliers)
    value = problem.structure.evaluate(cost)[0] - float(dual.multipliers @ problem.room)
    found = solve_residual(
        problem, np.zeros(problem.columns), cost, dual.multipliers, math.inf, Options(Clock(20), 0.0)
    )
    assert found.columns is not None
    assert problem.loss[found.columns].sum() == pytest.approx(brute(problem))
    assert value + found.bound == pytest.approx(brute(problem), rel=1e-6)


def test_warm_start_is_kept_when_there_is_no_time(make_random, brute) -> None:
    problem = make_random(5, 2, 0.6)
    best = get_solver("exact").solve(problem)
    again = get_solver("exact").solve(problem, time_limit=1e-9, warm_start=best.columns)
    assert again.columns is not None
    assert again.objective == best.objective


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_highest_point_is_highest(seed) -> None:
    from scipy.optimize import linprog

    random = np.random.default_rng(seed)
    dimension, planes = int(random.integers(1, 4)), int(random.integers(1, 20))
    offset, slope = random.normal(size=planes), random.normal(size=(planes, dimension)) * 10.0 ** random.integers(-2, 3)
    total = float(random.choice([1.0, np.inf]))
    point, _ = highest(offset, slope, np.full(dimension, 2.0), total)
    some = int(random.integers(1, planes + 1))
    _, basis = highest(offset[:some], slope[:some], np.full(dimension, 3.0), total)
    again, _ = highest(offset, slope, np.full(dimension, 2.0), total, basis)
    assert (offset + slope @ again).min() == pytest.approx((offset + slope @ point).min(), abs=1e-9, rel=1e-9)
    assert (point >= 0).all()
    assert (point <= 2).all()
    assert point.sum() <= total + 1e-9
    rows = np.column_stack((np.ones(planes), -slope))
    sums = np.array([[0.0] + [1.0] * dimension])
    result = linprog(
        [-1.0] + [0.0] * dimension,
        A_ub=np.vstack((rows, sums)) if np.isfinite(total) else rows,
        b_ub=np.append(offset, total) if np.isfinite(total) else offset,
        bounds=[(None, None)] + [(0, 2)] * dimension,
    )
    assert (offset + slope @ point).min() == pytest.approx(-result.fun, abs=1e-8, rel=1e-8)


def test_an_unlikely_partition_is_not_overlooked(make) -> None:
    """Either segment of the only feasible partition is cheap elsewhere; together they deviate most."""
    columns = [
        (0, 0b0011, 0, 5.0, (1.0, 1.0)),
        (0, 0b1100, 0, 0.0, (9.0, 0.0)),
        (0, 0b1100, 0, 5.0, (1.0, 1.0)),
        (0, 0b0011, 0, 0.0, (0.0, 9.0)),
        (0, 0b0101, 0, 500.0, (2.0, 2.0)),
        (0, 0b1010, 0, 500.0, (2.0, 2.0)),
    ]
    assert get_solver("exact").solve(make(columns, [4.0, 4.0])).objective == 10.0
    assert get_solver("exact").solve(make(columns[1:2] + columns[3:], [4.0, 4.0])).objective == 1000.0


def test_a_solve_loads_nothing() -> None:
    """Loading takes longer than solving: the first `np.unique` of a process takes 10 ms, for numpy.ma."""
    script = """
import sys
import numpy as np
from msq.solvers.problem import Problem
from msq.solvers.registry import get_solver
random = np.random.default_rng(0)
groups, count = 20, 12
use = np.tile(np.arange(1.0, count + 1), groups) * random.uniform(0.9, 1.1, (2, groups * count))
loss = np.tile(4.0 ** -np.arange(count), groups) * random.uniform(0.5, 1.5, groups * count)
solver = get_solver("exact")
before = set(sys.modules)
problem = Problem(
    group=np.repeat(np.arange(groups), count),
    mask=np.ones(groups * count, int),
    choice=np.tile(np.arange(count), groups),
    loss=loss,
    usage=use,
    caps=np.array([90.0, 91.0]),
    base=np.zeros(2),
    group_sizes=np.ones(groups, int),
    resource_names=("memory", "latency"),
    choice_names=tuple(map(str, range(count))),
)
assert solver.solve(problem).status == "optimal"
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
