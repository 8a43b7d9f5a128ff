"""Overheads from measured runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from msq.planner.budget import parse_budgets
from msq.planner.calibrate import Run, Step, calibrate, fit, load_run
from msq.planner.errors import PlanError
from msq.planner.executor.overhead import ExecutorOverhead
from msq.planner.promise import step_latencies
from msq.planner.solve import find_plan
from msq.profiles.schema import WITHOUT_PRODUCTS
from msq.profiles.shipped import resolve_profile
from msq.profiles.tables import load_profile


def plans(profile):
    """Two plans with different kernels: with fusion, so with fewer products, and without."""
    budgets = parse_budgets(["memory=4bpw", "latency=10ms"])
    return find_plan(profile, budgets).plan, find_plan(profile, budgets, fusion=False).plan


def products(plan) -> int:
    return len({entry.pattern for entry in plan.layers})


def rows_us(plan, batch: int = 1) -> float:
    """Sum of a plan's rows by the fixture's profile, whose overheads are 20 and 30 us."""
    return plan.promised.latency_us[batch] - {1: 20.0, 8: 30.0}[batch]


def run(plan, **steps_us) -> Run:
    steps = tuple(Step(batch_size=int(name[1:]), step_us=us) for name, us in steps_us.items())
    return Run(device="test device", context=64, plan=plan, steps=steps)


def of_an_executor(profile):
    """The profile as an executor measures it: with the overhead of its own step alone, at the context of `run`."""
    measured = {"overhead_method": WITHOUT_PRODUCTS, "context": 64}
    part = profile.manifest.latency.model_copy(update=measured)
    return replace(profile, manifest=profile.manifest.model_copy(update={"latency": part}))


def test_both_terms_are_told_by_runs_of_different_numbers_of_products(profile, tmp_path):
    fused, single = plans(profile)
    assert products(fused) < products(single)
    runs = [run(plan, b1=rows_us(plan) + 33.0 + 0.7 * products(plan)) for plan in (fused, single)]
    found, steps = calibrate(profile, tmp_path / "profile", runs)
    part = found.manifest.latency
    assert part.step_overhead_us == {1: pytest.approx(33.0), 8: 30.0}  # batch 8 was not measured
    assert part.step_product_us == {1: pytest.approx(0.7), 8: 0.0}
    assert part.calibrated.keys() == {1} and part.calibrated[1].runs == 2 and part.calibrated[1].context == 64
    assert part.model_copy(update={"calibrated": None}) == profile.manifest.latency  # what was measured stays
    assert [step.calibrated_us for step in steps] == [pytest.approx(step.measured_us) for step in steps]
    assert [step.promised_us for step in steps] == [fused.promised.latency_us[1], single.promised.latency_us[1]]
    again = load_profile(tmp_path / "profile")
    assert again.digest == found.digest != profile.digest
    assert step_latencies(again, single.layers)[1] == pytest.approx(runs[1].steps[0].step_us)
    # the solver is told the same as the promise says
    cap = f"latency={step_latencies(again, fused.layers)[1] * 1.000001}us"
    planned = find_plan(again, parse_budgets(["memory=4bpw", cap])).plan
    assert planned.promised.loss <= fused.promised.loss * (1 + 1e-9)
    assert planned.promised.latency_us == step_latencies(again, planned.layers)


def test_runs_of_one_number_of_products_move_the_overhead_alone(profile, tmp_path):
    fused, _ = plans(profile)
    runs = [run(fused, b1=rows_us(fused) + gap) for gap in (31.0, 35.0)]
    found, steps = calibrate(profile, tmp_path / "profile", runs)
    part = found.manifest.latency
    assert part.step_overhead_us[1] == pytest.approx(33.0, rel=0.01) and part.step_product_us == {1: 0.0, 8: 0.0}
    assert steps[0].error > 0 > steps[1].error


def test_an_overhead_of_the_executor_counts_as_a_run_without_products(profile, tmp_path):
    fused, single = plans(profile)
    own = of_an_executor(profile)
    found, steps = fit(own, [run(fused, b1=rows_us(fused) + 20.0 + 0.5 * products(fused))])
    assert found.step_overhead_us[1] == pytest.approx(20.0) and found.step_product_us[1] == pytest.approx(0.5)
    assert steps[0].error == pytest.approx(0.0, abs=1e-9)
    quicker = rows_us(single) + 20.0 - 0.2 * products(single)
    found, _ = fit(own, [run(single, b1=quicker)])  # overlaps more than back to back: no term is negative
    assert found.step_product_us[1] == 0.0 and 0 < found.step_overhead_us[1] < 20.0


def test_an_overhead_less_the_products_is_no_run_of_none(profile):
    fused, _ = plans(profile)
    part = profile.manifest.latency.model_copy(
        update={"overhead_method": ExecutorOverhead.methods["cuda"], "context": 64}
    )
    own = replace(profile, manifest=profile.manifest.model_copy(update={"latency": part}))
    found, _ = fit(own, [run(fused, b1=rows_us(fused) + 20.0 + 0.5 * products(fused))])
    assert found.step_product_us[1] == 0.0
    assert found.step_overhead_us[1] == pytest.approx(20.0 + 0.5 * products(fused))


@pytest.mark.parametrize("own", [True, False])
def test_the_same_runs_give_the_same_files_however_often(profile, tmp_path, own):
    fused, single = plans(profile)
    profile = of_an_executor(profile) if own else profile
    runs = [run(plan, b1=rows_us(plan) + 33.7 + 0.71 * products(plan)) for plan in (fused, single)]
    runs.append(run(fused, b1=rows_us(fused) + 40.3 + 0.13 * products(fused)))
    directory = tmp_path / "profile"
    once, _ = calibrate(profile, directory, runs)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    twice, steps = calibrate(load_profile(directory), directory, runs)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before and twice.digest == once.digest
    assert [step.promised_us for step in steps] == pytest.approx([step.calibrated_us for step in steps])
    # other runs replace these, whatever was fitted before; another batch size leaves them
    both = find_plan(profile, parse_budgets(["memory=4bpw", "latency=10ms@8"])).plan
    other = [run(both, b1=rows_us(both) + 29.0, b8=900.0)]
    assert fit(twice, other)[0] == fit(profile, other)[0]
    eighth = fit(twice, [run(both, b8=900.0)])[0]
    assert eighth.calibrated[1] == once.manifest.latency.calibrated[1] and eighth.calibrated[8].runs == 1


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
    with pytest.raises(PlanError, match="less than their kernels do by themselves"):
        calibrate(profile, directory, [run(plan, b1=0.5)])
    with pytest.raises(PlanError, match="different contexts"):
        calibrate(profile, directory, [run(plan, b1=900.0), run(plan, b1=900.0).model_copy(update={"context": 8})])
    with pytest.raises(PlanError, match=r"the run has 8 tokens in the cache, the profile's step 64; .*--context 64"):
        calibrate(of_an_executor(profile), directory, [run(plan, b1=900.0).model_copy(update={"context": 8})])
    for change, said in (({"name": "large"}, "of large "), ({"blocks": 3}, ", 3 blocks")):
        other = plan.model_copy(update={"model": plan.model.model_copy(update=change)})
        with pytest.raises(PlanError, match=f"the run is .*{said}.*the profile of small .*runs of the profile's model"):
            calibrate(profile, directory, [run(other, b1=900.0)])
    layers = [entry.model_copy(update={"implementation": "reference"}) for entry in plan.layers]
    with pytest.raises(PlanError, match="no latency of; plan with this profile"):
        calibrate(profile, directory, [run(plan.model_copy(update={"layers": tuple(layers)}), b1=900.0)])
    with pytest.raises(PlanError, match="has no latencies to calibrate"):
        calibrate(memory_profile, tmp_path / "memory", [run(plan, b1=90.0)])
    assert (directory / "profile.yaml").read_bytes() == before


def test_a_shipped_profile_is_not_written_to(profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("h200/llama-3.1-8b")
    manifest = resolve_profile(name) / "profile.yaml"
    before = manifest.read_bytes()
    for place in (name, manifest.parent):
        with pytest.raises(PlanError, match=r"ships with msq and is not written to; copy .* and calibrate the copy"):
            calibrate(profile, place, [run(plans(profile)[0], b1=900.0)])
    assert not (tmp_path / "h200").exists() and manifest.read_bytes() == before
