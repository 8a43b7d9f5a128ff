"""Layers that must share a choice, and a limit on the number of choices: checker, MILP backends, refusals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from msq.solvers.check import check
from msq.solvers.errors import SolverError
from msq.solvers.problem import Problem
from msq.solvers.registry import get_solver, missing_requirements, solver_class, solver_names
from msq.solvers.solution import Status

ABLE = [name for name in solver_names() if solver_class(name).side_constraints]


@pytest.fixture(params=ABLE)
def able(request: pytest.FixtureRequest) -> str:
    if missing_requirements(request.param):
        pytest.skip(f"{request.param} needs {', '.join(missing_requirements(request.param))}")
    return request.param


def tied(problem: Problem, seed: int, *, same: bool, most: int | None) -> Problem:
    """Two random layers must agree, and at most `most` choices may be used."""
    layers = int(problem.group_sizes.sum())
    numbers = None
    if same and layers > 1:
        numbers = np.full(layers, -1)
        numbers[np.random.default_rng(seed).choice(layers, 2, replace=False)] = 3
    return dataclasses.replace(problem, same_choice=numbers, max_choices=most)


def least(problem: Problem, plans) -> float:
    losses = [report.loss for report in (check(problem, plan) for plan in plans(problem)) if report.feasible]
    return min(losses, default=math.inf)


@pytest.mark.parametrize(("same", "most"), [(True, None), (False, 1), (False, 2), (True, 2)])
def test_ties_agree_with_brute_force(able, make_random, plans, same, most) -> None:
    for seed in range(5):
        problem = tied(make_random(70 + seed, 2, 0.6), seed, same=same, most=most)
        solution = get_solver(able).solve(problem, time_limit=20)
        optimum = least(problem, plans)
        assert "rejected" not in solution.stats
        if math.isinf(optimum):
            assert solution.status is Status.INFEASIBLE
        else:
            assert solution.status is Status.OPTIMAL
            assert solution.objective == pytest.approx(optimum, rel=1e-6)


def test_checker_names_what_is_broken(make) -> None:
    columns = [(g, 1, q, 1.0, (1.0,)) for g in range(3) for q in range(3)]
    problem = dataclasses.replace(make(columns, [10]), same_choice=np.array([5, -1, 5]), max_choices=2)
    assert check(problem, [0, 4, 6]).feasible
    report = check(problem, [0, 3, 7])
    assert report.partition_ok
    assert not report.feasible
    assert report.message == "layers that must agree (set 5) have option-0 and option-1"
    message = check(problem, [0, 4, 8]).message
    assert message == "3 choices are used (option-0, option-1, option-2), 2 are allowed"


@pytest.mark.parametrize("name", [name for name in solver_names() if name not in ABLE])
def test_other_solvers_refuse(name, make) -> None:
    problem = dataclasses.replace(make([(0, 1, 0, 1.0, (1.0,))], [10]), max_choices=1)
    if missing_requirements(name):
        pytest.skip("not installed")
    with pytest.raises(SolverError, match=f"solver '{name}' can't handle layers that must share a choice"):
        get_solver(name).solve(problem)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_choices": 0}, "max_choices: expected an integer >= 1"),
        ({"same_choice": np.array([1, -1])}, "expected sets of at least two layers"),
        ({"same_choice": np.array([-1, -1])}, "expected sets of at least two layers"),
        ({"same_choice": np.array([1])}, "same_choice: expected shape"),
        ({"same_choice": np.array([0.5, 0.5])}, "same_choice: expected integers"),
    ],
)
def test_bad_ties_are_explained(make, fields, words) -> None:
    problem = make([(0, 1, 0, 1.0, (1.0,)), (1, 1, 0, 1.0, (1.0,))], [10])
    with pytest.raises(SolverError, match=words):
        dataclasses.replace(problem, **fields)
