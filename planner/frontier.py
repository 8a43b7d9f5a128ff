"""The Pareto frontier of loss against one resource, as a table."""

from __future__ import annotations

import pandas as pd

from ..profiles.tables import Profile
from ..solvers.errors import SolverError
from ..solvers.frontier import frontier
from .budget import parse_budget
from .errors import PlanError
from .problem_builder import build_problem

_UNBOUNDED = {"memory": "memory=1e18B", "latency": "latency=1e12s"}
"""Budgets that cap nothing: the frontier has every cap on it."""


def frontier_table(
    profile: Profile,
    resource: str,
    *,
    batch_size: int = 1,
    quantizers: str | None = None,
    implementations: tuple[str, ...] | None = None,
    fusion: bool = True,
) -> pd.DataFrame:
    """Every break point of the Lagrangian frontier, from the least use to the least loss.

    Args:
        resource: "memory" or "latency".
        batch_size: for latency.

    Returns:
        Columns ``memory_bytes`` and ``bits_per_weight``, or ``latency_us`` and ``tokens_per_second``; then ``loss``
        and ``price``, the loss saved per byte or µs on the way to the point (none for the first).

    Raises:
        PlanError: an unknown resource, or input that `build_problem` refuses.
    """
    if resource not in _UNBOUNDED:
        raise PlanError(f'a frontier is of memory or latency; got "{resource}".')
    text = _UNBOUNDED[resource] + (f"@{batch_size}" if resource == "latency" else "")
    built = build_problem(
        profile, [parse_budget(text)], quantizers=quantizers, implementations=implementations, fusion=fusion
    )
    try:
        points = frontier(built.problem, 0)
    except SolverError as cause:
        raise PlanError(f"{cause}.") from cause
    table = pd.DataFrame({"use": points.usage, "per": points.usage, "loss": points.loss, "price": points.price})
    table["price"] = table["price"].where(table["price"] < float("inf"))
    if resource == "memory":
        table["per"] = 8 * points.usage / int(profile.layer_weights.sum())
        return table.rename(columns={"use": "memory_bytes", "per": "bits_per_weight"})
    table["per"] = batch_size * 1e6 / points.usage
    return table.rename(columns={"use": "latency_us", "per": "tokens_per_second"})
