"""A plan applied under Hessians: error feedback in the checkpoint, what is recorded, what resumes, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msq.kernels.quantize import decode, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.errors import PlanError
from msq.planner.executor.apply import apply_plan, work_directory
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.load import quantized_weights, read_tensors
from msq.planner.executor.manifest import parse_quantization_config, read_manifest
from msq.planner.plan import load_plan
from msq.planner.solve import find_plan
from msq.profiles.calibration import calibration
from msq.profiles.hessians import collect_hessians
from msq.profiles.inventory import inventory
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.models import choose_device, load_config
from msq.profiles.quantizer_errors import read_weight

SPECS = (QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.TCQ, 3, 9))
SETTINGS = ProfileSettings(specs=SPECS, tokens=64, window=32, batch_sizes=())


@pytest.fixture(scope="module")
def plans(tiny_llama, tmp_path_factory):
    """A plan for each kind of error."""
    home = tmp_path_factory.mktemp("profiles")
    found = {}
    for error in ("weights", "proxy"):
        settings = dataclasses.replace(SETTINGS, error=error)
        profile = run_profile(tiny_llama, home / error, settings, name="tiny")
        found[error] = find_plan(profile, parse_budgets(["memory=5bpw"]), solver="lagrangian").plan
    return found


@pytest.fixture
def tokens(tiny_llama):
    return calibration(tiny_llama, None, tokens=640, window=32, seed=0)


def test_the_checkpoint_holds_weights_with_feedback_and_says_so(tiny_llama, plans, tokens, tmp_path):
    plan = plans["weights"]
    applied = apply_plan(tiny_llama, plan, tmp_path / "out", hessian=tokens)
    part = read_manifest(tmp_path / "out").hessian
    assert part is not None and (part.tokens, part.text, part.digest) == (640, None, tokens.digest)
    assert not work_directory(tmp_path / "out").exists()
    info, device = inventory(tiny_llama), choose_device("cpu")
    files = collect_hessians(tiny_llama, info, tokens, tmp_path / "h", digest="d", seed=0, device=device)
    config = parse_quantization_config(load_config(tmp_path / "out").quantization_config, "config.json")
    stored = quantized_weights(config, read_tensors([tmp_path / "out" / "model.safetensors"]))
    entries = {entry.layer: entry for entry in plan.layers}
    for layer in info.layers:
        spec, seed = plan.spec(entries[layer.name].quantizer), input_seed(layer.fusion_group, 0)
        weight, hessian = read_weight(tiny_llama, layer), files.load(layer, device)
        assert torch.equal(
            decode(stored[layer.name]), decode(quantize(weight, spec, rotation_seed=seed, hessian=hessian))
        )
    apply_plan(tiny_llama, plan, tmp_path / "free")
    assert read_manifest(tmp_path / "free").hessian is None
    assert applied.memory_bytes == plan.promised.memory_bytes


def test_a_plan_from_proxy_errors_says_so_and_needs_hessians(tiny_llama, plans, tokens, tmp_path):
    assert plans["weights"].profile.error == "measured" and plans["proxy"].profile.error == "proxy"
    with pytest.raises(PlanError, match="add --hessian"):
        apply_plan(tiny_llama, plans["proxy"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    apply_plan(tiny_llama, plans["proxy"], tmp_path / "out", hessian=tokens)
    assert load_plan(tmp_path / "out" / "plan.yaml").profile.error == "proxy"


def test_an_interrupted_job_finds_its_hessians_again(tiny_llama, plans, tokens, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("msq.profiles.quantize_jobs.quantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(tiny_llama, plans["weights"], tmp_path / "out", hessian=tokens)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    other = calibration(tiny_llama, None, tokens=640, window=32, seed=1)
    with pytest.raises(CheckpointError, match=r"unfinished checkpoint made with other settings \(tokens\)"):
        apply_plan(tiny_llama, plans["weights"], tmp_path / "out", hessian=other)
    monkeypatch.setattr("msq.profiles.hessians.StreamedModel", None)
    apply_plan(tiny_llama, plans["weights"], tmp_path / "out", hessian=tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
