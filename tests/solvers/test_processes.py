"""Libraries that clash, processes of their own, and what reaches standard output."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from msq.solvers import isolated
from msq.solvers.isolated import solve_isolated
from msq.solvers.quiet import quiet_stdout
from msq.solvers.registry import get_solver, missing_requirements

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
    assert found.refused
    assert found.error.startswith("solver 'no_such_solver' doesn't exist")
    assert solve_isolated("exact", fused, time_limit=1e12).solution is not None


BACKENDS = """
import os, signal, subprocess, sys, tempfile, time
from pathlib import Path
from msq.solvers import isolated

here = Path(__file__).parent

class Slow:
    def solve(self, problem, **limits):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / "scratch").write_text(tempfile.mkdtemp())
        (here / "pid").write_text(str(child.pid))
        (here / "ready").touch()
        time.sleep(600)

class Crashing:
    def solve(self, problem, **limits):
        os._exit(7)

class Failing:
    def solve(self, problem, **limits):
        hears = sys.platform == "win32" or signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        raise ZeroDivisionError(f"Ctrl-C reaches it: {hears}")

def slow(*arguments):
    isolated.get_solver = lambda name: Slow()
    isolated._work(*arguments)

def crashing(*arguments):
    isolated.get_solver = lambda name: Crashing()
    isolated._work(*arguments)

def failing(*arguments):
    isolated.get_solver = lambda name: Failing()
    isolated._work(*arguments)
"""


@pytest.fixture
def backends(tmp_path, monkeypatch):
    """A module that processes can import, with backends that go wrong."""
    (tmp_path / "wrong_backends.py").write_text(BACKENDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("wrong_backends")
    sys.modules.pop("wrong_backends")


def gone(pid: int) -> bool:
    """Whether a process that isn't ours ends within ten seconds (a zombie has ended)."""
    for _ in range(100):
        done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True)
        if done.returncode or done.stdout.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="needs sessions")
def test_an_overrun_is_ended_with_its_children_and_its_files(make, backends, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(isolated, "_work", backends.slow)
    monkeypatch.setattr(isolated, "GRACE", 15.0)
    found = solve_isolated("exact", make([(0, 1, 0, 1.0, (1.0,))], [5]), time_limit=1.0)
    assert found.solution is None and not found.refused
    assert found.error == "exact ran 15 s past its time limit and was ended"
    assert (tmp_path / "ready").exists()
    assert gone(int((tmp_path / "pid").read_text()))
    assert not Path((tmp_path / "scratch").read_text()).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs sessions")
def test_an_interrupt_ends_the_process_and_its_children(make, backends, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(isolated, "_work", backends.slow)

    def interrupt(*_: object) -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(isolated, "_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        solve_isolated("exact", make([(0, 1, 0, 1.0, (1.0,))], [5]))
    assert gone(int((tmp_path / "pid").read_text()))
    assert not Path((tmp_path / "scratch").read_text()).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs sessions")
def test_a_killed_caller_takes_the_process_along(backends, tmp_path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import wrong_backends\n"
        "from msq.solvers import isolated\n"
        "isolated._work = wrong_backends.slow\n"
        "isolated.solve_isolated('exact', problem)\n"
    )
    with subprocess.Popen([sys.executable, "-c", PROBLEM + code]) as caller:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.1)
        caller.kill()
    assert gone(int((tmp_path / "pid").read_text()))
    assert not Path((tmp_path / "scratch").read_text()).exists()


def test_a_crash_and_an_exception_are_told_apart(make, backends, monkeypatch) -> None:
    problem = make([(0, 1, 0, 1.0, (1.0,))], [5])
    monkeypatch.setattr(isolated, "_work", backends.crashing)
    assert solve_isolated("exact", problem).error == "exact crashed (exit code 7)"
    monkeypatch.setattr(isolated, "_work", backends.failing)
    found = solve_isolated("exact", problem)
    heard = sys.platform == "win32"
    assert (found.error, found.refused) == (f"ZeroDivisionError: Ctrl-C reaches it: {heard}", False)


def test_without_the_resource_module_the_peak_is_unknown(monkeypatch) -> None:
    assert isolated._peak_bytes() > 10**6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert isolated._peak_bytes() == 0


@pytest.mark.skipif(absent("pulp"), reason="needs PuLP")
def test_cbc_leaves_no_files_when_it_crashes(make, tmp_path, monkeypatch) -> None:
    import pulp

    def crash(self: object, problem: object, *_: object) -> None:
        Path(self.tmpDir, "left-pulp.mps").touch()  # type: ignore[attr-defined]
        raise pulp.PulpSolverError("no")

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", crash)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    problem = make([(0, 1, 0, 4.0, (1.0,)), (0, 1, 1, 1.0, (2.0,)), (0, 1, 2, 3.0, (1.5,))], [1.7])
    assert get_solver("cbc").solve(problem).stats["status"] == "CBC crashed"
    assert not list(tmp_path.iterdir())


def test_quiet_stdout_swallows_c_output_only_while_it_lasts(capfd) -> None:
    with quiet_stdout():
        os.write(1, b"noise")
    os.write(1, b"sound")
    assert capfd.readouterr().out == "sound"
