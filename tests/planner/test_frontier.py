"""The series of a frontier table, against plans made one by one."""

from __future__ import annotations

import numpy as np
import pytest
from msq.planner.budget import parse_budgets
from msq.planner.errors import InfeasibleBudgetError, PlanError
from msq.planner.frontier import frontier_table
from msq.planner.solve import find_plan


def series(table, name):
    return table[table["series"] == name].reset_index(drop=True)


@pytest.mark.parametrize("resource", ["memory", "latency"])
def test_uniform_schemes_are_those_of_the_uniform_solver(profile, resource) -> None:
    table = frontier_table(profile, resource)
    use = table.columns[2]
    uniform = series(table, "uniform")
    assert set(uniform["label"]) == set(profile.labels)
    for row in uniform.itertuples(index=False):
        amount = f"{row.memory_bytes:.0f}B" if resource == "memory" else f"{row.latency_us * (1 + 1e-12)!r}us"
        budget = parse_budgets([f"{resource}={amount}"])
        plan = find_plan(profile, budget, quantizers=row.label, solver="uniform").plan
        assert plan.promised.loss == pytest.approx(row.loss)
    points = series(table, "frontier")
    assert (np.diff(points[use]) > 0).all() and (np.diff(points["loss"]) < 0).all()
    # nothing lies below the frontier: its hull bounds every plan
    for row in uniform.itertuples(index=False):
        amount = getattr(row, use)
        least = np.interp(amount, points[use], points["loss"])
        assert row.loss >= least * (1 - 1e-9) or amount < points[use].iloc[0]


def test_proven_points_are_plans_of_exact(profile) -> None:
    table = frontier_table(profile, "memory", at=["3bpw", "3.5bpw"])
    exact = series(table, "exact")
    assert exact["label"].tolist() == ["memory=3bpw", "memory=3.5bpw"]
    for row in exact.itertuples(index=False):
        plan = find_plan(profile, parse_budgets([row.label]), rel_gap=1e-9).plan
        assert row.loss == pytest.approx(plan.promised.loss, rel=1e-9)
        assert row.lower_bound == pytest.approx(row.loss, rel=1e-8)
        assert row.memory_bytes <= plan.budgets[0].cap


def test_the_ideal_lies_below_everything_and_plans_are_shown(profile) -> None:
    plan = find_plan(profile, parse_budgets(["memory=3bpw"])).plan
    table = frontier_table(profile, "memory", plans={"mine": plan})
    (shown,) = series(table, "plan").itertuples(index=False)
    assert (shown.label, shown.memory_bytes, shown.loss) == ("mine", plan.promised.memory_bytes, plan.promised.loss)
    ideal = series(table, "ideal")
    assert len(ideal) and (np.diff(ideal["memory_bytes"]) >= 0).all()
    points = series(table, "frontier")
    inside = points[points["memory_bytes"] >= ideal["memory_bytes"].iloc[0]]
    assert (np.interp(inside["memory_bytes"], ideal["memory_bytes"], ideal["loss"]) <= inside["loss"]).all()


def test_what_is_out_of_reach_is_said(profile) -> None:
    with pytest.raises(InfeasibleBudgetError, match="the least that these quantizers reach"):
        frontier_table(profile, "memory", at=["1bpw"])
    with pytest.raises(PlanError, match="memory or latency"):
        frontier_table(profile, "speed")
    with pytest.raises(PlanError, match="unit is missing"):
        frontier_table(profile, "memory", at=["3"])
