"""Overheads from measured runs."""

from __future__ import annotations

import json

import pytest
from msq.planner.budget import parse_budgets
from msq.planner.calibrate import Run, Step, calibrate, load_run
from msq.planner.errors import PlanError
from msq.planner.solve import find_plan
from msq.profiles.tables import load_profile


def plans(profile):
    """Two plans with different kernels."""
    loose, tight = (parse_budgets([f"memory={bpw}bpw", "latency=10ms"]) for bpw in (4, 3))
    return find_plan(profile, loose).plan, find_plan(profile, tight).plan


def run(plan, **steps_us) -> Run:
    steps = tuple(Step(batch_size=int(name[1:]), step_us=us) for name, us in steps_us.items())
    return Run(device="test device", context=64, plan=plan, steps=steps)


def test_the_overhead_is_the_step_less_its_kernels(profile, tmp_path):
    first, second = plans(profile)
    kernels = [plan.promised.latency_us[1] - 20.0 for plan in (first, second)]
    assert kernels[0] != kernels[1]
    runs = [run(first, b1=kernels[0] + 31.0), run(second, b1=kernels[1] + 35.0)]
    found, steps = calibrate(profile, tmp_path / "profile", runs)
    part = found.manifest.latency
    assert part.overhead_us == {1: pytest.approx(33.0), 8: 30.0}  # batch 8 was not measured
    assert part.overhead_method == "calibrated by 2 measured runs" and part.context == 64
    assert [step.calibrated_us for step in steps] == [pytest.approx(kernels[0] + 33), pytest.approx(kernels[1] + 33)]
    assert steps[0].error == pytest.approx(2 / (kernels[0] + 31))
    again = load_profile(tmp_path / "profile")
    assert again.digest == found.digest != profile.digest
    assert plans(again)[0].promised.latency_us[1] == pytest.approx(first.promised.latency_us[1] + 13)


def test_a_benchmark_file_is_read_with_what_else_it_says(profile, tmp_path):
    plan = plans(profile)[0]
    value = run(plan, b1=50.0, b8=80.0).model_dump(mode="json")
    value |= {"tokens_per_second": 3.0}
    value["steps"][0]["spread_us"] = 1.0
    (tmp_path / "bench.json").write_text(json.dumps(value))
    assert load_run(tmp_path / "bench.json") == run(plan, b1=50.0, b8=80.0)
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(PlanError, match=r"bench\.json is not JSON .*give what `msq benchmark --json` printed"):
        load_run(tmp_path / "bench.json")
    (tmp_path / "bench.json").write_text(json.dumps(value | {"steps": [{"batch_size": 1}]}))
    with pytest.raises(PlanError, match=r"the field 'steps\.0\.step_us' is missing"):
        load_run(tmp_path / "bench.json")
    with pytest.raises(PlanError, match="there is no such file"):
        load_run(tmp_path / "none.json")


def test_runs_that_do_not_fit_are_refused(profile, memory_profile, tmp_path):
    plan = plans(profile)[0]
    directory = tmp_path / "profile"
    before = (directory / "profile.yaml").read_bytes()
    with pytest.raises(PlanError, match="measured on another, the profile on test device"):
        calibrate(profile, directory, [run(plan, b1=50.0).model_copy(update={"device": "another"})])
    with pytest.raises(PlanError, match="of batch size 4; the profile has latencies for 1, 8"):
        calibrate(profile, directory, [run(plan, b4=50.0)])
    with pytest.raises(PlanError, match="less than its kernels do by themselves"):
        calibrate(profile, directory, [run(plan, b1=0.5)])
    with pytest.raises(PlanError, match="different contexts"):
        calibrate(profile, directory, [run(plan, b1=900.0), run(plan, b1=900.0).model_copy(update={"context": 8})])
    layers = [entry.model_copy(update={"implementation": "reference"}) for entry in plan.layers]
    with pytest.raises(PlanError, match="no latency of; plan with this profile"):
        calibrate(profile, directory, [run(plan.model_copy(update={"layers": tuple(layers)}), b1=900.0)])
    with pytest.raises(PlanError, match="has no latencies to calibrate"):
        calibrate(memory_profile, tmp_path / "memory", [run(plan, b1=90.0)])
    assert (directory / "profile.yaml").read_bytes() == before
