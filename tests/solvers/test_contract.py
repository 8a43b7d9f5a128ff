"""What every backend promises, compared with brute force. A backend joins by entering the registry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msq.solvers.check import check
from msq.solvers.errors import SolverError
from msq.solvers.problem import Problem
from msq.solvers.reach import reachable
from msq.solvers.registry import get_solver, solver_class
from msq.solvers.solution import Limit, Solution, Status

SEEDS = range(6)
TIGHTNESS = (0.3, 0.7, 0.95, 1.02)


def assert_honest(problem: Problem, solution: Solution, optimum: float) -> None:
    """Whatever a backend says has to be true."""
    tolerance = 1e-6 * max(abs(optimum), 1e-9) if math.isfinite(optimum) else 0.0
    if solution.status in (Status.OPTIMAL, Status.FEASIBLE):
        assert solution.columns is not None
        report = check(problem, solution.columns)
        assert report.feasible, report.message
        assert solution.objective == pytest.approx(report.loss, rel=1e-12, abs=1e-300)
        assert solution.objective >= optimum - tolerance
        assert solution.columns.dtype == np.int64
        assert (np.diff(solution.columns) > 0).all()
    else:
        assert solution.columns is None
        assert solution.objective == math.inf
    if solution.status is Status.OPTIMAL:
        assert solution.objective <= optimum + 2 * tolerance
        assert solution.gap <= 1e-6 + 2e-9
    if solution.status is Status.INFEASIBLE:
        assert optimum == math.inf
        assert solution.lower_bound == math.inf
    if math.isfinite(optimum):
        assert solution.lower_bound <= optimum + tolerance
    if solution.multipliers is not None:
        assert solution.multipliers.shape == (problem.resources,)
        assert (solution.multipliers >= 0).all()
    assert "rejected" not in solution.stats


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("tightness", TIGHTNESS)
def test_random_problems_agree_with_brute_force(solver_name, make_random, brute, resources, tightness) -> None:
    kind = solver_class(solver_name)
    for seed in SEEDS:
        problem = make_random(1000 * resources + seed, resources, tightness)
        optimum = brute(problem)
        solution = get_solver(solver_name).solve(problem, time_limit=20)
        assert_honest(problem, solution, optimum)
        if kind.exact:
            assert solution.status is (Status.OPTIMAL if math.isfinite(optimum) else Status.INFEASIBLE)
        if kind.gives_bound and solution.columns is not None:
            assert math.isfinite(solution.lower_bound)


def test_known_answers(solver_name, known) -> None:
    solution = get_solver(solver_name).solve(known.problem, time_limit=20)
    assert_honest(known.problem, solution, known.optimum)
    if math.isinf(known.optimum):
        if reachable(known.problem).proven_infeasible:
            assert solution.status is Status.INFEASIBLE
    elif solver_class(solver_name).exact:
        assert solution.objective == pytest.approx(known.optimum, abs=1e-12)
        assert solution.status is Status.OPTIMAL


def test_same_problem_same_answer(solver_name, make_random) -> None:
    if not solver_class(solver_name).deterministic:
        pytest.skip("not deterministic")
    problem = make_random(7, 2, 0.6)
    first, second = (get_solver(solver_name).solve(problem, seed=3) for _ in range(2))
    assert first.status == second.status
    assert first.lower_bound == second.lower_bound
    if first.columns is not None:
        np.testing.assert_array_equal(first.columns, second.columns)


def test_warm_start_is_no_worse_a_start(solver_name, make_random) -> None:
    problem = make_random(11, 1, 0.5)
    cold = get_solver(solver_name).solve(problem)
    start = cold.columns if cold.columns is not None else problem.structure.evaluate(problem.loss)[1]
    warm = get_solver(solver_name).solve(problem, warm_start=start[::-1])
    assert warm.objective <= cold.objective * (1 + 1e-6)


def test_no_time_still_tells_no_lies(solver_name, make_random, brute) -> None:
    problem = make_random(5, 2, 0.8)
    solution = get_solver(solver_name).solve(problem, time_limit=1e-9)
    assert_honest(problem, solution, brute(problem))
    if solver_class(solver_name).honours_time_limit and solution.status in (Status.FEASIBLE, Status.UNKNOWN):
        assert solution.limit is Limit.TIME


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"time_limit": 0}, "time_limit: expected seconds > 0, got 0"),
        ({"rel_gap": -1.0}, "rel_gap: expected a number >= 0"),
        ({"rel_gap": math.nan}, "rel_gap: expected a number >= 0"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"threads": 0}, "threads: expected an integer >= 1"),
        ({"warm_start": [0]}, "warm_start: expected columns that cover every layer once"),
        ({"warm_start": [0, 10**9]}, "doesn't exist"),
        ({"warm_start": [0.5]}, "warm_start: expected a list of column numbers"),
    ],
)
def test_wrong_arguments_are_explained(solver_name, make, arguments, words) -> None:
    problem = make([(0, 1, 0, 1.0, (1.0,)), (0, 2, 0, 1.0, (1.0,))], [5])
    with pytest.raises(SolverError, match=words.replace("(", r"\(")):
        get_solver(solver_name).solve(problem, **arguments)
