"""The commands around profiles: shapes alone, losses from here and latencies from there, calibration by a benchmark."""

from __future__ import annotations

import json

import pytest
from msq.profiles.tables import load_profile

OPTIONS = ("--quantizers", "nuq-2,nuq-4", "--batch-sizes", "1,2")


def test_from_shapes_to_a_calibrated_plan(msq, tiny_llama, tmp_path):
    loss, latency, joined = (tmp_path / name for name in ("loss", "latency", "joined"))
    code, out, _ = msq(
        "profile", tiny_llama, "--out", loss, "--quantizers", "nuq-2,nuq-4", "--batch-sizes", "none",
        "--tokens", 64, "--window", 32, "--no-head",
    )  # fmt: skip
    assert code == 0 and "profile of 14 layers" in out
    config = tiny_llama / "config.json"
    code, out, _ = msq(
        "profile", config, "--latency-only", "--out", latency, *OPTIONS, "--context", 8, "--device", "cpu", "--json"
    )
    facts = json.loads(out)
    assert (
        code == 0
        and facts["rows"] == 13 * 2 * 2
        and facts["throttled"] == 0
        and set(facts["overhead_us"]) == {"1", "2"}
    )
    code, _, err = msq("plan", "--profile", latency, "--budget", "memory=3bpw")
    assert code == 2 and "join it with a loss profile of the model by `msq combine`" in err
    code, _, err = msq("combine", "--loss", loss, "--latency", latency, "--out", joined, "--sensitivity", "lm_head=x")
    assert code == 2 and 'expected one "LAYER=VALUE"' in err and not joined.exists()
    code, _, _ = msq("combine", "--loss", loss, "--latency", latency, "--out", joined, "--sensitivity", "lm_head=0.5")
    assert code == 0 and load_profile(joined).sensitivities[-1] == 0.5
    code, _, err = msq("combine", "--loss", loss, "--latency", latency, "--out", joined)
    assert code == 2 and "exists already" in err
    plan, bench = tmp_path / "plan.yaml", tmp_path / "bench.json"
    planned = ("plan", "--profile", joined, "--budget", "memory=5bpw", "--no-fusion")  # as many products in both plans
    assert msq(*planned, "--out", plan)[0] == 0
    code, out, _ = msq("benchmark", config, "--plan", plan, "--batch-size", "1,2", "--context", 8, "--json")
    assert code == 0
    value = json.loads(out)
    for step in value["steps"]:  # more than any kernel takes, however busy this machine was when they were measured
        step["step_us"] += 1e8
    bench.write_text(json.dumps(value))
    measured = {step["batch_size"]: step["step_us"] for step in value["steps"]}
    code, out, err = msq(*planned, "--calibrate", bench, "--json")
    part = load_profile(joined).manifest.latency
    assert code == 0 and {step.runs for step in part.calibrated.values()} == {1} and part.context == 8
    promised = {int(batch): us for batch, us in json.loads(out)["latency_us"].items()}
    assert promised == pytest.approx(measured) and err.count("calibrated") == 2


def test_shapes_that_do_not_exist_are_one_sentence(msq, tmp_path):
    code, _, err = msq("profile", "llama-3.1-8", "--latency-only", "--out", tmp_path / "p", "--device", "cpu")
    assert code == 2 and "did you mean llama-3.1-8b" in err and not (tmp_path / "p").exists()
