"""Which backends exist, found without importing them or what they need."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass

from .base import Solver
from .errors import SolverError

_BACKENDS: dict[str, str] = {
    "uniform": "uniform:UniformSolver",
    "greedy": "greedy:GreedySolver",
    "water_filling": "water_filling:WaterFillingSolver",
    "lagrangian": "lagrangian:LagrangianSolver",
    "cvxpy_lp": "cvxpy_lp:CvxpyLpSolver",
    "exact": "exact:ExactSolver",
    "scip": "scip:ScipSolver",
    "highs": "highs:HighsSolver",
    "cp_sat": "cp_sat:CpSatSolver",
    "cbc": "cbc:CbcSolver",
    "cvxpy": "cvxpy_milp:CvxpySolver",
}
"""Name to ``module:Class`` inside this package, roughly from simple to exact."""


@dataclass(frozen=True)
class Abilities:
    """What a backend says about itself; see `Solver`. `missing` lists modules that aren't installed."""

    name: str
    summary: str
    max_resources: int | None
    fusion: bool
    exact: bool
    gives_bound: bool
    honours_time_limit: bool
    deterministic: bool
    side_constraints: bool
    requires: tuple[str, ...]
    missing: tuple[str, ...]


def solver_names() -> tuple[str, ...]:
    """Names of all backends, whether or not what they need is installed."""
    return tuple(_BACKENDS)


def solver_class(name: str) -> type[Solver]:
    """The class of a backend.

    Raises:
        SolverError: there is none of that name.
    """
    if name not in _BACKENDS:
        near = difflib.get_close_matches(name, _BACKENDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise SolverError(f"solver {name!r} doesn't exist; {hint}there are {', '.join(_BACKENDS)}")
    module, _, attribute = _BACKENDS[name].partition(":")
    found: type[Solver] = getattr(importlib.import_module(f".{module}", __package__), attribute)
    return found


def get_solver(name: str) -> Solver:
    """A backend, ready to solve. What it needs is only checked by `Solver.solve`.

    Raises:
        SolverError: there is none of that name.
    """
    return solver_class(name)()


def missing_requirements(name: str) -> tuple[str, ...]:
    """Modules that a backend needs and that aren't installed; nothing is imported to find out.

    Raises:
        SolverError: there is no backend of that name.
    """
    return solver_class(name).missing_requirements()


def abilities() -> tuple[Abilities, ...]:
    """What every backend can do, in the order of `solver_names`."""
    kinds = [solver_class(name) for name in _BACKENDS]
    return tuple(
        Abilities(
            name=kind.name,
            summary=kind.summary,
            max_resources=kind.max_resources,
            fusion=kind.fusion,
            exact=kind.exact,
            gives_bound=kind.gives_bound,
            honours_time_limit=kind.honours_time_limit,
            deterministic=kind.deterministic,
            side_constraints=kind.side_constraints,
            requires=kind.requires,
            missing=kind.missing_requirements(),
        )
        for kind in kinds
    )
