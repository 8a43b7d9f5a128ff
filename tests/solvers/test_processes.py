"""Libraries that clash, processes of their own, and what reaches standard output."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from msq.solvers.isolated import solve_isolated
from msq.solvers.quiet import quiet_stdout
from msq.solvers.registry import missing_requirements

PROBLEM = """
import numpy as np
from msq.solvers.problem import Problem
from msq.solvers.registry import get_solver
from msq.solvers.errors import SolverError
problem = Problem(
    group=np.array([0, 0, 1, 1]), mask=np.ones(4, int), choice=np.array([0, 1, 0, 1]), loss=np.array([4.0, 1, 4, 1]),
    usage=np.array([[1.0, 2, 1, 2]]), caps=np.array([3.0]), base=np.zeros(1), group_sizes=np.ones(2, int),
    resource_names=("memory",), choice_names=("a", "b"))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROBLEM + code], check=False, capture_output=True, text=True)


def absent(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


@pytest.mark.skipif(absent("highspy", "ortools"), reason="needs highspy and OR-Tools")
@pytest.mark.parametrize("name", ["scip", "highs", "cp_sat"])
def test_highspy_first_ends_in_an_answer_or_one_sentence(name) -> None:
    done = run(
        "import highspy\n"
        f"try: print(get_solver({name!r}).solve(problem).status)\n"
        "except SolverError as cause: print('refused:', cause)\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0] == "optimal" or lines[0].startswith("refused: OR-Tools can't be loaded here")


@pytest.mark.skipif(absent("cvxpy", "ortools"), reason="needs CVXPY and OR-Tools")
def test_cvxpy_and_or_tools_share_a_process() -> None:
    done = run(
        "for name in ('cvxpy', 'highs', 'cvxpy_lp', 'scip', 'cp_sat'): print(get_solver(name).solve(problem).objective)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5.0"] * 5


@pytest.mark.parametrize("name", ["exact", "scip", "cvxpy"])
def test_isolated_answers_as_in_process(name, make_random, brute) -> None:
    if missing_requirements(name):
        pytest.skip("not installed")
    problem = make_random(4, 2, 0.6)
    found = solve_isolated(name, problem)
    assert found.error == ""
    assert found.solution is not None
    assert found.solution.objective == pytest.approx(brute(problem), rel=1e-6)
    assert found.peak_bytes > 10**7
    assert found.seconds == found.solution.seconds


def test_isolated_reports_what_goes_wrong(make) -> None:
    fused = make([(0, 3, 0, 1.0, (1.0,))], [5])
    found = solve_isolated("no_such_solver", fused)
    assert found.solution is None
    assert found.error.startswith("SolverError: solver 'no_such_solver' doesn't exist")


def test_quiet_stdout_swallows_c_output_only_while_it_lasts(capfd) -> None:
    with quiet_stdout():
        os.write(1, b"noise")
    os.write(1, b"sound")
    assert capfd.readouterr().out == "sound"
