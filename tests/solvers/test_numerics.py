"""Where rounding, ties and size could make solvers claim what isn't so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msq.experiments.instances import DEEPSEEK_V3, generate
from msq.solvers import partitions
from msq.solvers.clock import Clock
from msq.solvers.dual import solve_dual
from msq.solvers.errors import SolverError
from msq.solvers.registry import get_solver
from msq.solvers.solution import Status


@pytest.mark.parametrize("name", ["exact", "lagrangian", "scip", "highs", "cp_sat", "greedy"])
def test_one_rule_decides_what_meets_a_cap(make, name) -> None:
    """A plan that the checker would let pass, above the cap by more than rounding, is nobody's answer."""
    problem = make([(0, 1, 0, 1.0, [1.0 + 5e-10]), (0, 1, 1, 2.0, [0.5])], [1.0])
    solution = get_solver(name).solve(problem)
    assert solution.columns is not None and solution.columns.tolist() == [1]
    only = make([(0, 1, 0, 1.0, [1.0 + 5e-10])], [1.0])
    assert get_solver(name).solve(only).columns is None


@pytest.mark.parametrize("seed", range(60))
def test_uses_of_all_magnitudes_and_caps_that_are_met_exactly(make_random, brute, plans, seed) -> None:
    """Columns far above the caps don't drown the others in rounding."""
    random = np.random.default_rng(seed)
    problem = make_random(seed, 2, 0.6)
    scale = 10.0 ** random.integers(-6, 7, problem.usage.shape)
    problem = dataclasses.replace(problem, usage=problem.usage * scale)
    chosen = list(plans(problem))
    plan = chosen[int(random.integers(len(chosen)))]
    problem = dataclasses.replace(problem, caps=problem.base + problem.usage[:, list(plan)].sum(axis=1))
    solution = get_solver("exact").solve(problem, rel_gap=1e-9)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(brute(problem), rel=1e-9)


def test_more_ties_than_configurations_are_listed(make, brute) -> None:
    """Three layers of 30 equal columns have 27,000 equal configurations; every group keeps one at least."""
    columns = [(0, 1 << layer, choice % 3, 1.0, [1.0]) for layer in range(3) for choice in range(30)]
    for group in range(1, 4):
        columns += [(group, 1, choice, 4.0**-choice, [1.0 + choice * 1.3]) for choice in range(3)]
    problem = make(columns, [10.0])
    found = get_solver("exact").solve(problem, rel_gap=1e-9)
    assert found.status is Status.OPTIMAL
    few = [column for i, column in enumerate(columns) if column[0] > 0 or i % 30 == 0]
    assert found.objective == pytest.approx(brute(make(few, [10.0])))


def test_many_resources_take_no_grid(make_random, brute) -> None:
    """One cap for every group of a larger problem, as for a model split over devices."""
    problem = make_random(5, 1, 0.6)
    devices = np.array([problem.usage[0] * (problem.group == group) for group in range(problem.groups)] * 5)
    usage = np.vstack((problem.usage, devices))
    caps = np.concatenate((problem.caps, np.full(len(devices), problem.caps[0] / 2)))
    names = tuple(f"r{i}" for i in range(len(usage)))
    many = dataclasses.replace(problem, usage=usage, caps=caps, base=np.zeros(len(usage)), resource_names=names)
    solution = get_solver("exact").solve(many, rel_gap=1e-9)
    assert solution.objective == pytest.approx(brute(many))


def test_a_hopeless_cover_is_given_up(make, monkeypatch) -> None:
    monkeypatch.setattr(partitions, "MAX_DEAD_ENDS", 100)
    pairs = [(0, 1 << i | 1 << j, 0, 1.0, [1.0]) for i in range(15) for j in range(i)]
    with pytest.raises(SolverError, match="offer every layer alone, or fewer patterns"):
        make(pairs, [100.0])


def test_numbers_beyond_all_measure_are_refused(make) -> None:
    with pytest.raises(SolverError, match="expected a number that is 0 or between"):
        make([(0, 1, 0, 1e150, [1.0])], [1.0])
    with pytest.raises(SolverError, match="expected a number that is 0 or between"):
        make([(0, 1, 0, 1.0, [1e-200])], [1.0])


@pytest.mark.parametrize("seed", range(4))
def test_the_dual_of_many_groups_ends(seed) -> None:
    """Rounding in long sums must not keep the search for one price from seeing that it has ended."""
    problem = generate(DEEPSEEK_V3, 6, quantizers=12, bits_per_weight=3.25, latency=0.8, seed=seed)
    found = solve_dual(problem, Clock())
    assert found.evaluations < 150
    assert found.value > 0 and (found.multipliers >= 0).all()
