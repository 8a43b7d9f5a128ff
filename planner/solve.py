"""From a profile and budgets to a plan: build, solve, check, choose kernels, promise.

A solver is never trusted. The chosen columns are checked by `solvers.check`; the promises are recomputed from
the profile's tables alone, out of the finished list of layers, and must agree with what was solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..profiles.tables import Profile
from ..solvers.base import Solver
from ..solvers.check import CAP_TOLERANCE, check
from ..solvers.errors import SolverError
from ..solvers.problem import Problem
from ..solvers.registry import get_solver
from ..solvers.solution import Solution, Status
from .budget import Budget
from .constraints import Constrained, Constraint, constrain
from .errors import PlanError
from .infeasible import no_plan
from .kernel_choice import assign, fastest_kernels
from .plan import (
    Plan,
    PlanBudget,
    PlanModel,
    PlanProfile,
    PlanQuantizer,
    Promise,
    Robustness,
    SolverReport,
)
from .problem_builder import BuiltProblem, build_problem
from .promise import promise
from .robust import check_quantile, robust_solution, standard_errors

Integers = npt.NDArray[np.int64]

MOST_RESOURCES = 4
"""Caps up to which `exact` is the better choice: its programme grows with every one of them."""
_AGREEMENT = 1e-9
"""Relative difference allowed between a sum over columns and the same sum over layers."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan and what it was found in, for questions about it.

    Attributes:
        plan: checked, with its promises.
        constrained: the problem.
        columns: (chosen,) of `constrained.problem`.
        solver: the backend.
        remarks: what in the backend's answer did not hold, or did not come from it.
    """

    plan: Plan
    constrained: Constrained
    columns: Integers
    solver: Solver
    remarks: tuple[str, ...]


def find_plan(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
    constraints: Sequence[Constraint] = (),
    robust: float | None = None,
    solver: str | None = None,
    time_limit: float = 60.0,
    rel_gap: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> Planned:
    """The best plan that a solver finds within the budgets, with the problem that it solves.

    Args:
        profile, budgets, quantizers, implementations, fusion: see `build_problem`.
        constraints: side constraints that the plan must keep.
        robust: a quantile such as 0.95: take the plan whose loss has the least such quantile over resampled
            sensitivities (see `robust`); None for the least loss as measured.
        solver: name of a backend; None for `default_solver`.
        time_limit: seconds; as much again for a robust plan.
        rel_gap: a plan proven to be this close to the best counts as optimal.
        seed: of everything random.
        threads: most threads to use.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets; says what is within reach.
        PlanError: the input is wrong, or the solver ended with neither a plan nor a proof.
    """
    if robust is not None:
        check_quantile(robust)
        standard_errors(profile)
    try:
        built = build_problem(profile, budgets, quantizers=quantizers, implementations=implementations, fusion=fusion)
        constrained = constrain(built, constraints)
        backend = get_solver(default_solver(constrained.problem) if solver is None else solver)
        solution = backend.solve(
            constrained.problem, time_limit=time_limit, rel_gap=rel_gap, seed=seed, threads=threads
        )
        if solution.columns is None:
            raise no_plan(constrained, solution, time_limit)
        robustness = None
        if robust is not None:
            found = robust_solution(
                constrained,
                backend,
                solution,
                quantile=robust,
                time_limit=time_limit,
                rel_gap=rel_gap,
                seed=seed,
                threads=threads,
            )
            solution = found.solution
            robustness = Robustness(
                quantile=robust,
                samples=found.samples,
                quantile_loss=found.chosen.quantile,
                ordinary_quantile_loss=found.nominal.quantile,
            )
    except SolverError as cause:
        raise PlanError(f"{str(cause).rstrip('.')}.") from cause
    if solution.columns is None:
        raise PlanError(f"solver '{solution.solver}' lost its plan; report this.")
    columns = solution.columns
    if any(budget.batch_size is not None for budget in built.budgets):  # else `plan_of` chooses all kernels
        columns = fastest_kernels(constrained.problem, columns)
        solution = replace(solution, columns=columns)
    plan = plan_of(built, constrained.restore(solution))
    report = plan.solver.model_copy(update={"columns": constrained.problem.columns})
    texts = tuple(one.text for one in constrained.constraints)
    plan = plan.model_copy(update={"constraints": texts, "robustness": robustness, "solver": report})
    remarks = tuple(str(solution.stats[name]) for name in ("rejected", "remark") if name in solution.stats)
    return Planned(plan, constrained, columns, backend, remarks)


def default_solver(problem: Problem) -> str:
    """`exact`; `scip` where choices are tied to each other, which `exact` can't handle, and with very many caps."""
    return "scip" if problem.has_side_constraints or problem.resources > MOST_RESOURCES else "exact"


def plan_of(built: BuiltProblem, solution: Solution) -> Plan:
    """The plan that a solution with columns stands for, checked and with its promises recomputed.

    Raises:
        PlanError: the solution does not hold.
    """
    report = check(built.problem, solution.columns if solution.columns is not None else [])
    if not report.feasible or solution.columns is None:
        raise PlanError(f"the plan of solver '{solution.solver}' does not hold: {report.message}.")
    layers = assign(built, [int(column) for column in solution.columns])
    profile = built.profile
    promised = promise(profile, layers)
    _check_promise(built, promised, report.loss)
    used = {entry.quantizer for entry in layers}
    multipliers = solution.multipliers
    manifest = profile.manifest
    return Plan(
        msq_version=__version__,
        model=PlanModel(
            name=manifest.model.name,
            architecture=manifest.model.architecture,
            blocks=manifest.model.blocks,
            digest=manifest.model.digest,
            unplanned_bytes=manifest.model.unplanned_bytes,
        ),
        profile=PlanProfile(
            digest=profile.digest,
            device=manifest.device.name,
            seed=profile.loss.seed or 0,
            error=profile.loss.error,
        ),
        budgets=tuple(
            PlanBudget(text=b.text, resource=b.resource, cap=float(cap), batch_size=b.batch_size)
            for b, cap in zip(built.budgets, built.problem.caps, strict=True)
        ),
        promised=promised,
        solver=SolverReport(
            name=solution.solver,
            status="optimal" if solution.status is Status.OPTIMAL else "feasible",
            objective=report.loss,
            lower_bound=_finite(solution.lower_bound),
            gap=_finite(solution.gap),
            shadow_prices=None
            if multipliers is None
            else {b.name: float(price) for b, price in zip(built.budgets, multipliers, strict=True)},
            seconds=solution.seconds,
            columns=built.problem.columns,
        ),
        quantizers={
            label: PlanQuantizer.model_validate(asdict(spec))
            for label, spec in ((label, profile.spec(label)) for label in built.labels if label in used)
        },
        layers=tuple(layers),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `msq plan --json` prints: promises and proof, null for what isn't known, batch sizes as text."""
    report, promised = plan.solver, plan.promised
    return {
        "status": report.status,
        "objective": report.objective,
        "lower_bound": report.lower_bound,
        "gap": report.gap,
        "loss": promised.loss,
        "memory_bytes": promised.memory_bytes,
        "model_bytes": None
        if plan.model.unplanned_bytes is None
        else promised.memory_bytes + plan.model.unplanned_bytes,
        "bits_per_weight": promised.bits_per_weight,
        "latency_us": {str(batch): latency for batch, latency in promised.latency_us.items()},
        "budgets": [budget.model_dump(mode="json") for budget in plan.budgets],
        "constraints": list(plan.constraints),
        "robustness": None if plan.robustness is None else plan.robustness.model_dump(mode="json"),
        "shadow_prices": report.shadow_prices,
        "solver": report.name,
        "solve_seconds": report.seconds,
        "columns": report.columns,
        "model": plan.model.name,
        "device": plan.profile.device,
        "profile_digest": plan.profile.digest,
    }


def _check_promise(built: BuiltProblem, promised: Promise, loss: float) -> None:
    """The tables must say what the solver was told, and the budgets must hold."""
    if abs(promised.loss - loss) > _AGREEMENT * max(loss, promised.loss):
        raise PlanError(f"the tables give a loss of {promised.loss!r}, the solved problem {loss!r}; report this.")
    for budget, cap in zip(built.budgets, built.problem.caps, strict=True):
        used = promised.memory_bytes if budget.batch_size is None else promised.latency_us[budget.batch_size]
        if used is None or used > cap * (1 + CAP_TOLERANCE + _AGREEMENT):
            raise PlanError(f'the tables give {used!r} for "{budget.text}", above its cap {cap!r}; report this.')


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
