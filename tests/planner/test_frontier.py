"""The series of a frontier table, against plans made one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msq.planner import frontier as module
from msq.planner.budget import parse_budgets
from msq.planner.constraints import parse_constraints
from msq.planner.errors import InfeasibleBudgetError, PlanError
from msq.planner.frontier import frontier_table
from msq.planner.solve import find_plan
from msq.solvers.registry import get_solver
from msq.solvers.solution import Status


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


@pytest.mark.parametrize("resource", ["memory", "latency"])
def test_constraints_on_quantizers_hold_for_every_series(profile, resource) -> None:
    constraints = parse_constraints(["min-bits:down_proj=3", "ban:o_proj=nuq-*"])
    amount = "3.25bpw" if resource == "memory" else "100000us"
    table = frontier_table(profile, resource, at=[amount], constraints=constraints)
    (exact,) = series(table, "exact").itertuples(index=False)
    budget = parse_budgets([f"{resource}={amount}"])
    plan = find_plan(profile, budget, constraints=constraints, rel_gap=1e-9).plan
    assert exact.loss == pytest.approx(plan.promised.loss, rel=1e-8)
    bits = profile.quantizers.set_index("quantizer")["bits_per_weight"]
    allowed = {label for label in profile.labels if bits[label] >= 3 and not label.startswith("nuq-")}
    assert set(series(table, "uniform")["label"]) == allowed
    free, bound = (series(found, "frontier") for found in (frontier_table(profile, resource), table))
    use = table.columns[2]
    assert bound[use].iloc[0] > free[use].iloc[0]
    assert (bound["loss"] >= np.interp(bound[use], free[use], free["loss"]) * (1 - 1e-9)).all()


def test_the_ideal_knows_of_no_constraint(profile) -> None:
    curves = [
        series(frontier_table(profile, "memory", constraints=parse_constraints(texts)), "ideal")
        for texts in ([], ["min-bits:down_proj=4"])
    ]
    free, bound = (curve.set_index("memory_bytes")["loss"] for curve in curves)
    assert 0 < len(bound) < len(free)  # less of it is within reach
    assert bound.equals(free[bound.index])


def test_constraints_that_tie_layers_are_refused_for_a_frontier(profile) -> None:
    for text in ("same:q_proj|k_proj", "distinct=2", "device:down_proj=1GiB"):
        with pytest.raises(PlanError, match="a frontier takes pin, ban, min-bits and max-bits"):
            frontier_table(profile, "memory", constraints=parse_constraints([text]))
    with pytest.raises(InfeasibleBudgetError, match="can't be met under the side constraints"):
        frontier_table(profile, "memory", at=["2bpw"], constraints=parse_constraints(["min-bits:.=3"]))


@pytest.mark.parametrize("bound", [0.0, -np.inf])
def test_what_is_not_proven_is_not_called_exact(profile, monkeypatch, bound) -> None:
    class Hurried:
        def solve(self, problem, **limits):
            assert limits["time_limit"] == 7
            found = get_solver("exact").solve(problem, **limits)
            return dataclasses.replace(found, status=Status.FEASIBLE, lower_bound=bound)

    monkeypatch.setattr(module, "get_solver", lambda name: Hurried())
    table = frontier_table(profile, "memory", at=["3bpw"], time_limit=7)
    assert not len(series(table, "exact"))
    (row,) = series(table, "feasible").itertuples(index=False)
    assert row.label == "memory=3bpw"
    assert row.lower_bound == bound if np.isfinite(bound) else np.isnan(row.lower_bound)


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
    with pytest.raises(PlanError, match=r"at batch size 4 needs a profile that measured it; this one .* 1, 8"):
        frontier_table(profile, "latency", batch_size=4)
    with pytest.raises(PlanError, match="unit is missing"):
        frontier_table(profile, "memory", at=["3"])
    for amount in ("memory=3bpw", "200tps@8"):
        with pytest.raises(PlanError, match=f'^"{amount}": expected an amount alone'):
            frontier_table(profile, "latency", at=[amount])


def test_a_frontier_of_latency_needs_latency(memory_profile) -> None:
    with pytest.raises(PlanError, match=r"batch size 1 needs .* measured no latency\.$"):
        frontier_table(memory_profile, "latency")
