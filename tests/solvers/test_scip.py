"""What `scip` does when SCIP's plan breaks a cap, and whether it can do without the starting plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msq.solvers import milp
from msq.solvers.base import Answer
from msq.solvers.registry import get_solver, missing_requirements
from msq.solvers.scip import ScipSolver
from msq.solvers.solution import Status

pytestmark = pytest.mark.skipif(bool(missing_requirements("scip")), reason="scip needs ortools")


@pytest.fixture
def problem(make_random):
    return make_random(21, 2, 0.6)


def test_a_plan_above_a_cap_leads_to_a_tightened_run(monkeypatch, problem, brute) -> None:
    true_run, asked = ScipSolver._run, []
    above = problem.structure.evaluate(problem.loss)[1]

    def careless(self, rows, options, hint):
        asked.append(rows.upper[0])
        run = true_run(self, rows, options, hint)
        return dataclasses.replace(run, values=rows.completed(problem, above)) if len(asked) == 1 else run

    monkeypatch.setattr(ScipSolver, "_run", careless)
    solution = get_solver("scip").solve(problem)
    assert len(asked) == 2
    assert solution.stats["tightened"] == 0.0
    assert "rejected" not in solution.stats
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(brute(problem), rel=1e-6)


def test_optimum_is_scips_own_work(monkeypatch, make_random, brute) -> None:
    monkeypatch.setattr(milp, "relax_and_repair", lambda problem, options: Answer())
    for seed in range(4):
        problem = make_random(40 + seed, 2, 0.7)
        solution = get_solver("scip").solve(problem)
        assert solution.status is Status.OPTIMAL
        assert solution.objective == pytest.approx(brute(problem), rel=1e-6)
        assert solution.lower_bound == pytest.approx(solution.objective, rel=1e-6)


def test_resources_in_tiny_units_change_nothing(make_random, brute) -> None:
    problem = make_random(33, 2, 0.7)
    unit = np.array([1e-9, 1e9])
    scaled = dataclasses.replace(
        problem,
        usage=problem.usage * unit[:, None],
        caps=problem.caps * unit,
        base=problem.base * unit,
        loss=problem.loss * 1e-7,
    )
    solution = get_solver("scip").solve(scaled)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(brute(problem) * 1e-7, rel=1e-6)
