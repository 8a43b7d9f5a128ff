"""What `apply` refuses of a model, what it leaves behind then, and what it passes over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.errors import PlanError
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.load import load_checkpoint
from msq.profiles.calibration import calibration
from msq.profiles.engines import Engine
from msq.profiles.errors import CorruptModelError, ProfileError
from msq.profiles.job import model_digest
from safetensors.torch import load_file, save_file

from .conftest import hand_made_plan

NUQ = QuantizerSpec(Family.NUQ, 3)
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A model to damage, alone in its directory's parent."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def plan_for(model: Path):
    return hand_made_plan(model, {(role,): NUQ for role in ROLES})


def change(model: Path, **tensors: torch.Tensor) -> None:
    path = model / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.1.mlp.up_proj.weight", (96, 64)), ("model.embed_tokens.weight", (2048, 64))]
)
@pytest.mark.parametrize("with_hessian", [False, True])
def test_a_bad_weight_leaves_nothing_behind(model, tmp_path, name, shape, value, with_hessian):
    plan = plan_for(model)
    change(model, **{name: torch.ones(shape).half().index_fill(0, torch.tensor([5]), value)})
    hessian = calibration(model, None, tokens=64, window=32, seed=0) if with_hessian else None
    with pytest.raises(CorruptModelError, match="NaN or infinite"):
        apply_plan(model, plan, tmp_path / "out", hessian=hessian)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_bad_weight_that_a_worker_finds_leaves_nothing_behind(model, tmp_path):
    plan = plan_for(model)
    change(model, **{"model.layers.1.mlp.up_proj.weight": torch.full((96, 64), float("nan"))})
    with pytest.raises(CorruptModelError, match=r"up_proj: .*NaN or infinite"):
        apply_plan(model, plan, tmp_path / "out", engine=Engine(workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_tokenizer_is_refused_before_work(model, tmp_path, content):
    plan = plan_for(model)
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ProfileError, match="can't load the tokenizer"):
        apply_plan(model, plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_for_other_weights_says_so_whatever_the_sizes(model, tmp_path):
    plan = plan_for(model)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"digest": model_digest(model)})})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    blocks = range(2)
    change(
        model,
        **{
            f"model.layers.{b}.mlp.{role}.weight": torch.ones(128, 64)
            for b in blocks
            for role in ("gate_proj", "up_proj")
        },
        **{f"model.layers.{b}.mlp.down_proj.weight": torch.ones(64, 128) for b in blocks},
    )
    with pytest.raises(PlanError, match="the plan was made for weights with digest"):
        apply_plan(model, plan, tmp_path / "out")


def test_stored_rotary_frequencies_are_left_out(model, tmp_path):
    change(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    apply_plan(model, plan_for(model), tmp_path / "out")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("planned", [False, True])
def test_a_tied_head_that_is_stored_too_does_no_harm(model, tmp_path, planned):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    change(model, **{"lm_head.weight": load_file(model / "model.safetensors")["model.embed_tokens.weight"].clone()})
    roles = ROLES if planned else ROLES[:-1]
    plan = hand_made_plan(model, {(role,): NUQ for role in roles}, head=planned)
    apply_plan(model, plan, tmp_path / "out")
    with torch.inference_mode():
        assert load_checkpoint(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()
