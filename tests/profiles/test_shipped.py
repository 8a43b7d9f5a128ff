"""Latency profiles that ship with msq: whole, of the shapes they name, and of use for a plan without a GPU."""

from __future__ import annotations

import pytest
from msq.planner.budget import parse_budgets
from msq.planner.solve import find_plan
from msq.profiles.combine import combine
from msq.profiles.inventory import inventory_of_config
from msq.profiles.latency import kernel_shapes
from msq.profiles.schema import LossMethod, LossPart
from msq.profiles.shipped import profile_names, resolve_config
from msq.profiles.tables import load_profile, save_profile


def test_the_h200_ships():
    assert "h200/llama-3.1-8b" in profile_names()


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_is_whole(name):
    profile = load_profile(name)
    part = profile.manifest.latency
    info = inventory_of_config(resolve_config(name.partition("/")[2]), head=True)
    assert profile.manifest.loss is None and part.head_us is not None and profile.manifest.source
    assert profile.manifest.model.total_parameters == info.total_parameters
    assert list(profile.layer_names) == [layer.name for layer in info.layers]
    shapes = {(shape.pattern, shape.out_features, shape.in_features) for shape in kernel_shapes(info.layers)}
    rows = profile.latency
    assert set(rows[["pattern", "out_features", "in_features"]].itertuples(index=False, name=None)) == shapes
    assert part.overhead_method == "decoding step without products"  # measured; what was fitted stands beside it
    assert {"driver", "cuda", "sm_clock_mhz"} <= profile.manifest.device.details.keys()
    assert "throttled" not in rows  # none was
    assert len(rows) == len(shapes) * len(profile.labels) * len(part.batch_sizes)


def test_losses_measured_anywhere_plan_for_it(tmp_path):
    gpu = load_profile("h200/llama-3.1-8b")
    blocks = gpu.layers[gpu.layers["role"] != "lm_head"]
    loss = LossPart(method=LossMethod.FISHER, error="gaussian", tokens=1024)
    manifest = gpu.manifest.model_copy(update={"loss": loss, "latency": None})
    layers = blocks.assign(sensitivity=0.01 + blocks["block"] / 1000)
    save_profile(tmp_path / "loss", manifest, layers, gpu.quantizers)
    joined = combine(load_profile(tmp_path / "loss"), gpu, tmp_path / "joined", sensitivities={"lm_head": 2.0})
    assert joined.manifest.model.unplanned_bytes == gpu.manifest.model.unplanned_bytes
    plan = find_plan(joined, parse_budgets(["memory=3.25bpw", "latency=560tps", "latency=3200tps@8"])).plan
    assert plan.promised.bits_per_weight <= 3.25 and plan.promised.latency_us[1] <= 1e6 / 560
    assert plan.promised.latency_us[8] <= 8e6 / 3200 and plan.solver.status == "optimal"
    assert plan.profile.device == "NVIDIA H200"
    without = combine(load_profile(tmp_path / "loss"), gpu, tmp_path / "plain head").manifest.latency
    part = gpu.manifest.latency
    assert part.calibrated is not None and without.step_product_us == part.step_product_us
    for name in ("overhead_us", "step_overhead_us"):  # as measured and as calibrated, both with the plain head
        assert getattr(without, name) == {b: us + part.head_us[b] for b, us in getattr(part, name).items()}
