from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from msq.planner.budget import parse_budgets
from msq.planner.errors import InfeasibleBudgetError, PlanError
from msq.planner.plan import Plan
from msq.planner.problem_builder import build_problem
from msq.planner.solve import find_plan, plan_json, plan_of
from msq.profiles.schema import ProfileManifest
from msq.profiles.tables import Profile, save_profile
from msq.solvers.registry import get_solver

Tables = dict[str, pd.DataFrame]
Kernel = tuple[tuple[str, ...], str, str]  # layers, quantizer, implementation


def plan_for(profile: Profile, *budgets: str, **arguments: Any) -> Plan:
    return find_plan(profile, parse_budgets(budgets), **arguments).plan


def kernels_of(plan: Plan) -> set[Kernel]:
    return {(entry.pattern, entry.quantizer, entry.implementation) for entry in plan.layers}


def model_latency(plan: Plan, tables: Tables, batch: int, overhead: float) -> float:
    """Latency of a plan, looked up row by row."""
    layers = tables["layers"].set_index("layer")
    total = overhead
    for pattern, label, name in kernels_of(plan):
        members = layers.loc[list(pattern)]
        row = tables["latency"].query(
            "pattern == @roles and out_features == @rows and quantizer == @label and implementation == @name "
            "and batch_size == @batch",
            local_dict={
                "roles": "+".join(members["role"]),
                "rows": members["out_features"].sum(),
                "label": label,
                "name": name,
                "batch": batch,
            },
        )
        total += row["latency_us"].item()
    return total


def block_optimum(profile: Profile, budgets: list[str], block: int) -> float:
    """Least loss for the groups of one block alone, by brute force over partitions and kernels."""
    built = build_problem(profile, parse_budgets(budgets))
    problem = built.problem
    options = []
    for group in range(block * 4, block * 4 + 4):
        columns = np.flatnonzero(problem.group == group).tolist()
        full = (1 << int(problem.group_sizes[group])) - 1
        choices = []
        for size in range(1, int(problem.group_sizes[group]) + 1):
            for picked in itertools.combinations(columns, size):
                masks = [int(problem.mask[c]) for c in picked]
                if sum(masks) == full and all(a & b == 0 for a, b in itertools.combinations(masks, 2)):
                    choices.append((problem.loss[list(picked)].sum(), problem.usage[:, list(picked)].sum(axis=1)))
        options.append(choices)
    best = math.inf
    room = problem.caps - problem.base
    fronts = [(0.0, np.zeros(problem.resources))]
    for choices in options:
        fronts = [(a + b, u + v) for a, u in fronts for b, v in choices if a + b < best and ((u + v) <= room).all()]
    return min((loss for loss, _ in fronts), default=best)


@pytest.fixture
def one_block(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> Profile:
    model = manifest.model.model_copy(update={"blocks": 1})
    offered = "quantizer in ('nuq-2', 'nuq-4', 'tcq-4') and implementation == 'tensor_core'"
    tables = tables | {
        "layers": tables["layers"].query("block == 0"),
        "quantizers": tables["quantizers"].iloc[[0, 1, 4]],
        "errors": tables["errors"].assign(layer="b0.down_proj"),
        "latency": tables["latency"].query(offered),
    }
    return save_profile(tmp_path / "one", manifest.model_copy(update={"model": model}), **tables)


@pytest.mark.parametrize("budgets", [
    ["memory=3.2bpw"],
    ["memory=2.6bpw", "latency=110us"],
    ["latency=100us"],
    ["latency=120us@8", "latency=105us"],
])  # fmt: skip
def test_optimum_of_brute_force(one_block: Profile, budgets: list[str]) -> None:
    best = block_optimum(one_block, budgets, 0)
    assert math.isfinite(best)
    plan = plan_for(one_block, *budgets, solver="scip", rel_gap=1e-9)
    assert plan.promised.loss == pytest.approx(best, rel=1e-7)
    assert plan.solver.status == "optimal"
    heuristic = plan_for(one_block, *budgets)
    assert best * (1 - 1e-9) <= heuristic.promised.loss
    assert heuristic.solver.lower_bound is not None
    assert heuristic.solver.lower_bound <= best * (1 + 1e-9)


def test_promises_are_those_of_the_tables(profile: Profile, tables: Tables) -> None:
    plan = plan_for(profile, "memory=3bpw", "latency=210us", "latency=250us@8")
    errors = tables["errors"].set_index(["layer", "quantizer"])
    quantizers = tables["quantizers"].set_index("quantizer")
    layers = tables["layers"].set_index("layer")
    loss = size = 0.0
    for entry in plan.layers:
        layer, quantizer = layers.loc[entry.layer], quantizers.loc[entry.quantizer]
        weights = layer["out_features"] * layer["in_features"]
        if (entry.layer, entry.quantizer) in errors.index:
            measured = errors.loc[entry.layer, entry.quantizer]
            loss += layer["sensitivity"] * measured["error"]
            size += measured["size_bytes"]
        else:
            loss += layer["sensitivity"] * quantizer["gaussian_error"]
            size += weights * quantizer["bits_per_weight"] / 8 + quantizer["table_bytes"]
    total = (layers["out_features"] * layers["in_features"]).sum()
    assert plan.promised.loss == pytest.approx(loss, rel=1e-12)
    assert plan.promised.memory_bytes == size
    assert plan.promised.bits_per_weight == pytest.approx(8 * size / total, rel=1e-12)
    assert plan.promised.bits_per_weight <= 3
    assert plan.promised.latency_us == {
        1: pytest.approx(model_latency(plan, tables, 1, 20.0), rel=1e-12),
        8: pytest.approx(model_latency(plan, tables, 8, 30.0), rel=1e-12),
    }
    assert plan.promised.latency_us[1] <= 210
    assert plan.promised.latency_us[8] <= 250
    assert [entry.layer for entry in plan.layers] == list(profile.layer_names)
    assert {entry.quantizer for entry in plan.layers} == plan.quantizers.keys()
    assert plan.profile.digest == profile.digest


def test_unbudgeted_batch_without_measurement_is_null(profile: Profile) -> None:
    """vq-3 runs on CUDA cores at batch 1 only."""
    plan = plan_for(profile, "latency=1ms", quantizers="vq-3", implementations=["cuda_core"])
    assert plan.promised.latency_us[1] is not None
    assert plan.promised.latency_us[8] is None


def test_free_fusion_is_the_fastest(profile: Profile, tables: Tables) -> None:
    """With one quantizer everywhere, a loss-neutral latency problem has the same best latency."""
    plan = plan_for(profile, "memory=8bpw", quantizers="nuq-4")
    built = build_problem(profile, parse_budgets(["latency=1s"]), quantizers="nuq-4")
    fastest = get_solver("scip").solve(replace(built.problem, loss=built.problem.usage[0]), rel_gap=0)
    latency = plan.promised.latency_us[1]
    assert latency == pytest.approx(20.0 + fastest.objective, rel=1e-9)
    assert latency == pytest.approx(model_latency(plan, tables, 1, 20.0), rel=1e-12)
    assert any(len(pattern) == 3 for pattern, *_ in kernels_of(plan))


def test_free_fusion_can_be_forbidden(profile: Profile) -> None:
    plan = plan_for(profile, "memory=3bpw", fusion=False)
    assert all(entry.pattern == (entry.layer,) for entry in plan.layers)
    fused = plan_for(profile, "memory=3bpw")
    assert fused.promised.loss == plan.promised.loss
    assert fused.promised.latency_us[1] < plan.promised.latency_us[1]  # type: ignore[operator]


def test_free_fusion_respects_implementations(profile: Profile) -> None:
    plan = plan_for(profile, "memory=3bpw", implementations=["cuda_core"])
    assert {entry.implementation for entry in plan.layers} == {"cuda_core"}


def test_without_latency_the_reference_runs(memory_profile: Profile) -> None:
    plan = plan_for(memory_profile, "memory=3bpw")
    assert {(entry.implementation, len(entry.pattern)) for entry in plan.layers} == {("reference", 1)}
    assert plan.promised.latency_us == {}


def test_unmeasured_layers_run_on_the_reference(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    tables["latency"] = tables["latency"].query("pattern != 'down_proj'")
    profile = save_profile(tmp_path / "p", manifest, **tables)
    plan = plan_for(profile, "memory=3bpw")
    on_reference = {entry.layer for entry in plan.layers if entry.implementation == "reference"}
    assert on_reference == {"b0.down_proj", "b1.down_proj"}
    assert plan.promised.latency_us == {1: None, 8: None}


@pytest.mark.parametrize("arguments", [{}, {"quantizers": "nuq-*"}])
@pytest.mark.parametrize("budget", ["memory=1bpw", "memory=1KiB", "latency=1us", "latency=1000000tps@8"])
def test_reported_reach_can_be_met(profile: Profile, budget: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_for(profile, budget, **arguments)
    message = str(caught.value)
    assert message.startswith(f"{budget} can't be met: the ")
    reach = re.search(r"reach is ([\d.]+)([A-Za-z]+)", message)
    assert reach is not None
    resource, batch = budget.split("=", maxsplit=1)[0], budget.partition("@")[2]
    suffix = f"@{batch}" if batch else ""
    plan_for(profile, f"{resource}={reach[1]}{reach[2]}{suffix}", **arguments)
    tighter = float(reach[1]) * (1.01 if reach[2] == "tps" else 0.99)
    with pytest.raises(InfeasibleBudgetError):
        plan_for(profile, f"{resource}={tighter}{reach[2]}{suffix}", **arguments)


def test_joint_infeasibility(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    """Each budget can be met alone, with the other quantizer: small ones are slow here."""
    small = tables["latency"]["quantizer"].isin(["nuq-2", "tcq-2"])
    tables["latency"].loc[small, "latency_us"] += 100
    profile = save_profile(tmp_path / "p", manifest, **tables)
    budgets = ["memory=2.2bpw", "latency=300us"]
    for budget in budgets:
        plan_for(profile, budget)
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_for(profile, *budgets)
    message = str(caught.value)
    assert message.startswith("memory=2.2bpw and latency=300us can't be met together: each alone could be as tight as")
    factor = re.search(r"by a factor of at least ([\d.]+)", message)
    assert factor is not None
    scale = float(factor[1])
    assert scale > 1.1
    with pytest.raises(InfeasibleBudgetError):  # a bound from below: a little less is still too tight
        plan_for(profile, f"memory={2.2 * scale * 0.99}bpw", f"latency={300 * scale * 0.99}us")


def test_two_budgets_missed_at_once(profile: Profile) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        plan_for(profile, "memory=1bpw", "latency=1us")
    assert "memory=1bpw can't be met" in str(caught.value)
    assert "latency=1us can't be met" in str(caught.value)
    assert "smaller quantizers and faster kernels" in str(caught.value)


def test_unknown_solver(profile: Profile) -> None:
    with pytest.raises(PlanError, match="solver 'lagrangean' doesn't exist; did you mean lagrangian"):
        plan_for(profile, "memory=3bpw", solver="lagrangean")


def test_a_solution_that_does_not_hold_is_refused(profile: Profile) -> None:
    built = build_problem(profile, parse_budgets(["memory=3bpw"]))
    solution = get_solver("lagrangian").solve(built.problem)
    assert solution.columns is not None
    broken = replace(solution, columns=solution.columns[1:])
    with pytest.raises(PlanError, match="the plan of solver 'lagrangian' does not hold: layer 0 of group 0"):
        plan_of(built, broken)


def test_tables_that_disagree_with_the_problem_are_noticed(
    profile: Profile, tmp_path: Path, manifest: ProfileManifest, tables: Tables
) -> None:
    built = build_problem(profile, parse_budgets(["memory=3bpw", "latency=250us"]))
    solution = get_solver("lagrangian").solve(built.problem)
    plan_of(built, solution)
    louder = tables["layers"].assign(sensitivity=tables["layers"]["sensitivity"] * 1.001)
    slower = tables["latency"].assign(latency_us=tables["latency"]["latency_us"] * 10)
    for changed, message in (({"layers": louder}, "the tables give a loss of"), ({"latency": slower}, "above its cap")):
        other = save_profile(tmp_path / "other", manifest, **(tables | changed))
        with pytest.raises(PlanError, match=message):
            plan_of(replace(built, profile=other), solution)


def test_json(profile: Profile) -> None:
    plan = plan_for(profile, "latency=250us", "memory=3bpw", implementations=["cuda_core"])
    value = plan_json(plan)
    wanted = "status objective lower_bound gap memory_bytes bits_per_weight latency_us solver solve_seconds columns"
    assert set(wanted.split()) <= value.keys()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["latency_us"].keys() == {"1", "8"}
    assert value["gap"] == pytest.approx((value["objective"] - value["lower_bound"]) / value["objective"], abs=1e-15)


def test_row_order_does_not_change_the_plan(
    profile: Profile, tmp_path: Path, manifest: ProfileManifest, tables: Tables
) -> None:
    shuffled = {name: frame.sample(frac=1, random_state=3) for name, frame in tables.items()}
    other = save_profile(tmp_path / "shuffled", manifest, **shuffled)
    for budgets in (["memory=3bpw"], ["latency=200us"]):
        first, second = plan_for(profile, *budgets), plan_for(other, *budgets)
        assert first.layers == second.layers
        assert first.promised == second.promised


def test_kernels_are_the_fastest_of_the_chosen_quantizers(profile: Profile) -> None:
    """A latency budget with room to spare doesn't leave slower kernels than no latency budget at all."""
    free = find_plan(profile, parse_budgets(["memory=3bpw"])).plan
    for solver in ("exact", "lagrangian", "scip", "uniform"):
        roomy = find_plan(profile, parse_budgets(["memory=3bpw", "latency=1s"]), solver=solver).plan
        own = {entry.layer: entry.quantizer for entry in roomy.layers}
        if own == {entry.layer: entry.quantizer for entry in free.layers}:
            assert roomy.promised.latency_us[1] == pytest.approx(free.promised.latency_us[1])
        if solver == "exact":
            assert own == {entry.layer: entry.quantizer for entry in free.layers}
