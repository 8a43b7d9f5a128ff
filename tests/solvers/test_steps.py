"""Caps in whole steps, and bundles of groups, against direct enumeration."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from msq.solvers import alternatives, search, steps
from msq.solvers.alternatives import Alternatives
from msq.solvers.clock import Clock
from msq.solvers.configurations import Configurations, Penalties, enumerate_configurations
from msq.solvers.dual import priced, solve_dual
from msq.solvers.problem import Problem
from msq.solvers.registry import get_solver
from msq.solvers.solution import Status
from msq.solvers.steps import whole_steps


def stepped(make, seed: int, resources: int, *, spread: float = 5.0) -> Problem:
    """Five groups of four columns; memory in steps of 100 with remainders up to `spread`, the rest continuous."""
    random = np.random.default_rng(seed)
    columns = []
    for group in range(5):
        for choice in range(4):
            memory = 100.0 * (1 + choice) * (1 + group % 2) + np.round(random.uniform(-spread, spread))
            others = random.uniform(0.5, 1.5, resources - 1) * (4 - choice if choice % 2 else 1 + choice)
            columns.append((group, 1, choice, random.uniform(0.5, 1.5) * 4.0**-choice, (memory, *others)))
    loose = make(columns, [1e9] * resources)
    uses = np.array([loose.usage[:, list(plan)].sum(axis=1) for plan in every_plan(loose)])
    tight = random.uniform(0.3, 1.0 if resources == 1 else 0.8, resources)
    return make(columns, (uses.max(axis=0) - tight * np.ptp(uses, axis=0)).tolist())


def every_plan(problem: Problem) -> np.ndarray:
    """(plans, groups) columns."""
    return np.array(list(product(*(np.flatnonzero(problem.group == g).tolist() for g in range(problem.groups)))))


def optimum(problem: Problem) -> float:
    plans = every_plan(problem)
    fits = (problem.usage[:, plans].sum(axis=2) <= problem.room[:, None] * (1 + 1e-12)).all(axis=0)
    return float(problem.loss[plans].sum(axis=1)[fits].min(initial=math.inf))


def at_the_dual(problem: Problem, delta: float) -> tuple[Configurations, np.ndarray, float]:
    """Configurations up to delta, prices, and the dual value."""
    prices = solve_dual(problem, Clock()).multipliers
    cost = priced(problem, prices)
    near = enumerate_configurations(problem, Penalties.build(problem.structure, cost), delta, limit=10**6)
    return near, prices, problem.structure.evaluate(cost)[0] - float(prices @ problem.room)


def test_no_plan_within_delta_has_more_steps_or_less_loss(monkeypatch, make) -> None:
    monkeypatch.setattr(steps, "WORTHWHILE", 1e-3)
    seen, bound = 0, 0
    for seed in range(36):
        problem = stepped(make, seed, 1 + seed % 2, spread=(0.0, 5.0, 30.0)[seed % 3])
        best = optimum(problem)
        if math.isinf(best):
            continue
        for share in (0.5, 1.0, 2.0):
            dual = at_the_dual(problem, 0.0)[2]
            delta = share * max(best - dual, 1e-3)
            near, prices, _ = at_the_dual(problem, delta)
            found = whole_steps(problem, near, prices, 1e-9 * problem.caps, delta)
            if found is None:
                continue
            seen += 1
            count = dict(zip(found.configurations.columns.tolist(), found.configurations.usage[-1], strict=True))
            deviation = dict(zip(found.configurations.columns.tolist(), found.configurations.deviation, strict=True))
            for plan in every_plan(problem).tolist():
                loss, use = problem.loss[plan].sum(), problem.usage[:, plan].sum(axis=1)
                if loss > dual + delta or (use > problem.room).any():
                    continue
                total = sum(count[c] for c in plan)
                assert total <= found.room
                spare = np.append(problem.room - use, found.room - total)
                above = found.gain + sum(deviation[c] for c in plan) + found.multipliers @ spare
                assert loss - dual == pytest.approx(above, rel=1e-9, abs=1e-12)
                bound += 1
    assert seen > 15
    assert bound > 15


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 5.0, 40.0])
def test_exact_with_steps_finds_the_optimum(monkeypatch, make, resources, spread) -> None:
    monkeypatch.setattr(steps, "WORTHWHILE", 1e-6)
    monkeypatch.setattr(search, "FEW_STATES", 2)
    used = []
    monkeypatch.setattr(search, "whole_steps", lambda *a: used.append(whole_steps(*a)) or used[-1])
    for seed in range(15):
        problem = stepped(make, 1000 + seed, resources, spread=spread)
        best = optimum(problem)
        solution = get_solver("exact").solve(problem, rel_gap=0.0)
        if math.isinf(best):
            assert solution.status is Status.INFEASIBLE
        else:
            assert solution.status is Status.OPTIMAL
            assert solution.objective == pytest.approx(best, rel=1e-9)
    assert any(found is not None for found in used)


def test_a_plan_far_below_the_caps_is_not_taken_for_none(make) -> None:
    """The best column that fits leaves so much room that its loss is far above the dual value."""
    columns = [(0, 1, 0, 0.0, (10.0, 10.0)), (0, 1, 1, 100.0, (0.0, 0.0)), (0, 1, 2, 101.0, (0.0, 10.0))]
    columns += [(1, 1, 0, 0.0, (10.0, 10.0)), (1, 1, 1, 100.0, (0.0, 0.0))]
    solution = get_solver("exact").solve(make(columns, [5.0, 5.0]), rel_gap=0.0)
    assert solution.objective == 200.0


def test_steps_far_smaller_than_the_uses_are_left_alone(make) -> None:
    columns = [(g, 1, c, 4.0**-c, (1e40 * (1 + c) + 1e-40 * g,)) for g in range(4) for c in range(3)]
    problem = make(columns, [7.5e40])
    assert get_solver("exact").solve(problem, rel_gap=0.0).objective == pytest.approx(optimum(problem), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_bundles_stand_for_all_that_is_not_beaten(monkeypatch, make, seed) -> None:
    monkeypatch.setattr(alternatives, "BUNDLED", 30)
    monkeypatch.setattr(alternatives, "MOST_PRODUCTS", 100)
    problem = stepped(make, seed, 2)
    near, _, _ = at_the_dual(problem, 0.3)
    found = Alternatives.build(near, problem.groups, np.arange(2), 0.3)
    assert found.bundles < problem.groups - 1
    parts = found.parts
    for row, loss, usage, deviation in zip(parts, found.loss, found.usage.T, found.deviation, strict=True):
        own = row[row >= 0]
        base = found.base[near.group[own]]
        assert loss == pytest.approx((near.loss[own] - near.loss[base]).sum())
        assert usage == pytest.approx((near.usage[:, own] - near.usage[:, base]).sum(axis=1)[found.order])
        assert deviation == pytest.approx(near.deviation[own].sum())
    for first, last in zip(found.start[:-1], found.start[1:], strict=True):
        assert (np.diff(found.deviation[first:last]) >= 0).all()
        groups = np.unique(near.group[parts[first:last][parts[first:last] >= 0]])
        members = [np.flatnonzero((near.group == g) & (near.deviation <= 0.3)) for g in groups]
        for combination in product(*members):
            own = np.array(combination)
            if near.deviation[own].sum() > 0.3:
                continue
            base = found.base[groups]
            loss = (near.loss[own] - near.loss[base]).sum()
            usage = (near.usage[:, own] - near.usage[:, base]).sum(axis=1)[found.order]
            better = (found.loss[first:last] <= loss + 1e-12) & (
                found.usage[:, first:last] <= usage[:, None] + 1e-9
            ).all(axis=0)
            assert better.any()
