"""Backends are found by name, without importing what they need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from msq.solvers.base import Solver
from msq.solvers.errors import SolverError
from msq.solvers.registry import abilities, get_solver, missing_requirements, solver_class, solver_names


def test_names_match_classes() -> None:
    for name in solver_names():
        kind = solver_class(name)
        assert issubclass(kind, Solver)
        assert kind.name == name
        assert kind.summary
        assert "\n" not in kind.summary


def test_unknown_name_lists_near_ones_and_all() -> None:
    with pytest.raises(SolverError, match=r"'lagrangean' doesn't exist; did you mean lagrangian\? there are uniform"):
        get_solver("lagrangean")
    with pytest.raises(SolverError, match="'zzz' doesn't exist; there are"):
        get_solver("zzz")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, pkgutil, importlib, msq.solvers\n"
        "for m in pkgutil.iter_modules(msq.solvers.__path__): importlib.import_module('msq.solvers.' + m.name)\n"
        "from msq.solvers.registry import abilities; abilities()\n"
        "heavy = {'ortools', 'pulp', 'cvxpy', 'torch', 'pandas', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_requirements_are_named(monkeypatch, make) -> None:
    kind = solver_class("scip")
    monkeypatch.setattr(kind, "requires", ("ortools", "no_such_module_anywhere"))
    assert missing_requirements("scip") == ("no_such_module_anywhere",)
    assert next(a for a in abilities() if a.name == "scip").missing == ("no_such_module_anywhere",)
    with pytest.raises(SolverError, match="needs no_such_module_anywhere"):
        get_solver("scip").solve(make([(0, 1, 0, 1.0, (1.0,))], [5]))
