"""The checker sees through every kind of wrong plan, and `Solver.solve` acts on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msq.solvers.base import Answer, Options, Solver
from msq.solvers.check import check
from msq.solvers.problem import Problem
from msq.solvers.solution import Status


@pytest.fixture
def pair(make) -> Problem:
    """One group of two layers: columns 0, 1 cover layer 0; 2 covers layer 1; 3 covers both."""
    return make(
        [(0, 1, 0, 1.0, (2.0,)), (0, 1, 1, 0.5, (4.0,)), (0, 2, 0, 1.0, (2.0,)), (0, 3, 0, 3.0, (3.0,))],
        [10.0],
        [5.0],
    )


def test_good_plan(pair) -> None:
    report = check(pair, [2, 0])
    assert report.feasible
    assert report.message == ""
    assert report.loss == 2.0
    np.testing.assert_array_equal(report.usage, [9.0])
    np.testing.assert_array_equal(report.excess, [0.0])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([0], "layer 1 of group 0 is covered 0 times"),
        ([], "layer 0 of group 0 is covered 0 times"),
        ([0, 1, 2], "layer 0 of group 0 is covered 2 times"),
        ([0, 0, 2], "layer 0 of group 0 is covered 2 times"),
        ([2, 3], "layer 1 of group 0 is covered 2 times"),
        ([0, 2, 99], "column 99 doesn't exist; there are 4"),
        ([0, 2, -1], "column -1 doesn't exist"),
    ],
)
def test_broken_partition(pair, columns, words) -> None:
    report = check(pair, columns)
    assert not report.partition_ok
    assert not report.feasible
    assert words in report.message


def test_broken_cap(pair) -> None:
    report = check(pair, [1, 2])
    assert report.partition_ok
    assert not report.feasible
    np.testing.assert_array_equal(report.excess, [1.0])
    assert "memory is 11, above its cap of 10 by 1" in report.message


@pytest.mark.parametrize(("excess", "feasible"), [(0.9e-9, True), (1.2e-9, False)])
def test_cap_tolerance_is_relative_to_the_cap(make, excess, feasible) -> None:
    problem = make([(0, 1, 0, 0.0, (5e6 * (1 + excess),))], [5e6])
    assert check(problem, [0]).feasible is feasible


def test_sums_are_exact(make) -> None:
    problem = make([(group, 1, 0, 0.1, (0.1,)) for group in range(10)], [1.0])
    report = check(problem, range(10))
    assert report.loss == 1.0
    assert report.usage[0] == 1.0


class Liar(Solver):
    """Says what it is told to."""

    name = "liar"
    summary = "for tests"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def _solve(self, problem: Problem, options: Options) -> Answer:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Answer(np.array([1, 2]), 1.5, optimal=True), Status.UNKNOWN, "memory is 11"),
        (Answer(np.array([0]), 1.0), Status.UNKNOWN, "covered 0 times"),
        (Answer(np.array([0, 2]), 2.5, optimal=True), Status.FEASIBLE, "its bound 2.5 is above the loss"),
        (Answer(np.array([0, 2]), 1.0, optimal=True), Status.FEASIBLE, "says optimal"),
        (Answer(np.array([0, 2]), optimal=True), Status.FEASIBLE, "says optimal"),
        (Answer(np.array([0, 2]), math.nan), Status.FEASIBLE, "not a number"),
        (Answer(np.array([0, 2]), infeasible=True), Status.FEASIBLE, "says infeasible"),
    ],
)
def test_lies_are_rejected_and_recorded(pair, answer, status, words) -> None:
    solution = Liar(answer).solve(pair)
    assert solution.status is status
    assert words in str(solution.stats["rejected"])
    assert (solution.columns is None) == (status is Status.UNKNOWN)
    assert solution.lower_bound <= solution.objective


def test_true_claims_stand(pair) -> None:
    solution = Liar(Answer(np.array([2, 0]), 2.0 * (1 - 1e-7), optimal=True)).solve(pair)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == 2.0
    assert "rejected" not in solution.stats
    np.testing.assert_array_equal(solution.columns, [0, 2])


def test_abilities_are_enforced(make) -> None:
    from msq.solvers.errors import SolverError

    class Simple(Liar):
        max_resources = 1
        fusion = False

    plain = make([(0, 1, 0, 1.0, (1.0, 1.0))], [5, 5])
    with pytest.raises(SolverError, match="at most 1 budgets, the problem has 2"):
        Simple(Answer()).solve(plain)
    fused = make([(0, 3, 0, 1.0, (1.0,))], [5])
    with pytest.raises(SolverError, match="can't handle columns that fuse layers"):
        Simple(Answer()).solve(fused)
