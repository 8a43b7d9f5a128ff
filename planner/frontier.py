"""Loss against one resource, as a table: the Pareto frontier, plans at budgets, and what to compare them with.

The series of the table:

- ``frontier``: every break point of the Lagrangian frontier, from the least use to the least loss;
- ``exact``: plans at chosen budgets, proven optimal, which may lie between break points;
- ``feasible``: plans at chosen budgets that the time limit left unproven;
- ``uniform``: one quantizer everywhere, with the kernels and fusions that use least of the resource;
- ``ideal``: Theorem 3.1 of Q-Palette, ideal Gaussian quantizers at water-filling rates, tables, scales and side
  constraints left out (memory only);
- ``plan``: plans made before, as they promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..profiles.tables import Profile
from ..solvers.errors import SolverError
from ..solvers.frontier import Frontier, frontier
from ..solvers.problem import Problem
from ..solvers.registry import get_solver
from ..solvers.solution import Status
from ..solvers.water_filling import ideal_curve
from .budget import Budget, parse_budget
from .constraints import Constrained, Constraint, constrain
from .errors import PlanError
from .infeasible import no_plan
from .plan import Plan
from .problem_builder import build_problem

_UNBOUNDED = {"memory": "memory=1e18B", "latency": "latency=1e12s"}
"""Budgets that cap nothing: the frontier has every cap on it."""
_TIES = ("same", "distinct", "device")
"""Side constraints that no price of one resource settles layer by layer."""


def frontier_table(
    profile: Profile,
    resource: str,
    *,
    batch_size: int = 1,
    at: Sequence[str] = (),
    plans: Mapping[str, Plan] | None = None,
    quantizers: str | None = None,
    implementations: tuple[str, ...] | None = None,
    fusion: bool = True,
    constraints: Sequence[Constraint] = (),
    time_limit: float = 60.0,
) -> pd.DataFrame:
    """The series of the module.

    Args:
        resource: "memory" or "latency".
        batch_size: for latency.
        at: amounts such as ``3.25bpw`` or ``200tps``, at which the best plans are wanted.
        plans: plans by label.
        quantizers, implementations, fusion: see `build_problem`.
        constraints: that say which quantizers layers may take (pin, ban, min-bits, max-bits).
        time_limit: seconds for each plan at a budget.

    Returns:
        Columns ``series`` and ``label``; ``memory_bytes`` and ``bits_per_weight``, or ``latency_us`` and
        ``tokens_per_second``; ``loss``; ``lower_bound`` (of plans at budgets); ``price``, the loss saved per byte or µs
        on the way to a break point (none for the first).

    Raises:
        PlanError: an unknown resource, a batch size that was not measured, a constraint of another kind, or input that
            `build_problem` or `constrain` refuses.
        InfeasibleBudgetError: an amount is out of reach.
    """
    if resource not in _UNBOUNDED:
        raise PlanError(f'a frontier is of memory or latency; got "{resource}".')
    if resource == "latency" and batch_size not in profile.batch_sizes:
        sizes = ", ".join(map(str, profile.batch_sizes))
        raise PlanError(
            f"a frontier of latency at batch size {batch_size} needs a profile that measured it; this one measured "
            + (f"batch size {sizes}." if sizes else "no latency.")
        )
    for constraint in constraints:
        if constraint.kind in _TIES:
            raise PlanError(
                f'"{constraint.text}": a frontier takes pin, ban, min-bits and max-bits; plan at single budgets with '
                "`msq plan`, which takes all constraints."
            )
    for amount in at:
        if "=" in amount or "@" in amount:
            raise PlanError(
                f'"{amount}": expected an amount alone, such as 3.25bpw or 200tps: resource and batch size are of all.'
            )
    suffix = f"@{batch_size}" if resource == "latency" and batch_size > 1 else ""
    selection = {"quantizers": quantizers, "implementations": implementations, "fusion": fusion}
    built = build_problem(profile, [parse_budget(_UNBOUNDED[resource] + suffix)], **selection)  # type: ignore[arg-type]
    constrained = constrain(built, constraints)
    budgets = [parse_budget(f"{resource}={amount}{suffix}") for amount in at]
    try:
        points = frontier(constrained.problem, 0)
        series = [
            pd.DataFrame({"series": "frontier", "use": points.usage, "loss": points.loss, "price": points.price}),
            *(_best(constrained, budget, points, time_limit) for budget in budgets),
            _uniform(constrained),
        ]
        if resource == "memory":
            use, loss = ideal_curve(built.problem)
            reached = (use >= points.usage[0]) & (use <= points.usage[-1])
            series.append(pd.DataFrame({"series": "ideal", "use": use[reached], "loss": loss[reached]}))
    except SolverError as cause:
        raise PlanError(f"{cause}.") from cause
    series.append(_promised(plans or {}, resource, batch_size))
    table = pd.concat([part for part in series if len(part)], ignore_index=True)
    return _spelled(table, resource, batch_size, int(profile.layer_weights.sum()))


def _spelled(table: pd.DataFrame, resource: str, batch_size: int, weights: int) -> pd.DataFrame:
    """Final names and order of the columns."""
    names = {"memory": ("memory_bytes", "bits_per_weight"), "latency": ("latency_us", "tokens_per_second")}
    use, per = names[resource]
    table = table.reindex(columns=["series", "label", "use", "loss", "lower_bound", "price"])
    table["label"] = table["label"].fillna("")
    table["price"] = table["price"].where(table["price"] < float("inf"))
    table["lower_bound"] = table["lower_bound"].where(table["lower_bound"] > float("-inf"))
    table.insert(3, per, 8 * table["use"] / weights if resource == "memory" else batch_size * 1e6 / table["use"])
    return table.rename(columns={"use": use})


def _best(constrained: Constrained, budget: Budget, points: Frontier, time_limit: float) -> pd.DataFrame:
    """The best plan at a budget that time allows, started from the break point below it."""
    resolved = budget.resolve(int(constrained.built.profile.layer_weights.sum()))
    if resolved.cap is None:
        raise PlanError(f'the budget "{budget.text}" has no cap; report this.')
    problem = replace(constrained.problem, caps=np.array([resolved.cap]))
    below = int(np.searchsorted(points.usage, resolved.cap, side="right")) - 1
    warm = points.columns(below) if below >= 0 else None
    solution = get_solver("exact").solve(problem, time_limit=time_limit, rel_gap=1e-9, warm_start=warm)
    if solution.columns is None:
        capped = replace(constrained, built=replace(constrained.built, budgets=(resolved,)), problem=problem)
        raise no_plan(capped, solution, time_limit)
    use = float(problem.base[0] + problem.usage[0, solution.columns].sum())
    series = "exact" if solution.status is Status.OPTIMAL else "feasible"
    row = {"series": series, "label": budget.text, "use": use, "loss": solution.objective}
    return pd.DataFrame([row | {"lower_bound": solution.lower_bound}])


def _uniform(constrained: Constrained) -> pd.DataFrame:
    """Every quantizer that can run all layers alone."""
    problem: Problem = constrained.problem
    prohibitive = float(problem.usage[0].sum()) + 1.0
    rows = []
    for choice, label in enumerate(constrained.built.labels):
        own = problem.choice == choice
        use, columns = problem.structure.evaluate(np.where(own, problem.usage[0], prohibitive))
        if own[columns].all():
            row = {"series": "uniform", "label": label, "use": float(problem.base[0]) + use}
            rows.append(row | {"loss": float(problem.loss[columns].sum())})
    return pd.DataFrame(rows)


def _promised(plans: Mapping[str, Plan], resource: str, batch_size: int) -> pd.DataFrame:
    rows = []
    for label, plan in plans.items():
        promised = plan.promised
        use = promised.memory_bytes if resource == "memory" else promised.latency_us.get(batch_size)
        if use is None:
            raise PlanError(f"{label} promises no latency at batch size {batch_size}; leave it out of this frontier.")
        rows.append({"series": "plan", "label": label, "use": float(use), "loss": promised.loss})
    return pd.DataFrame(rows)
