"""Tuning after encoding: what changes in a checkpoint and what doesn't, that it helps, that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msq.experiments.evaluate import evaluate
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.planner.executor import model_tuning
from msq.planner.executor import tuning as tuning_module
from msq.planner.executor.apply import apply_plan, work_directory
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.load import load_checkpoint
from msq.planner.executor.manifest import CalibrationPart, TuneMethod, read_manifest
from msq.planner.executor.tuning import Tuning, parse_tune
from msq.profiles.calibration import calibration
from msq.profiles.models import choose_device, load_model
from safetensors.torch import load_file, save_file

from ..conftest import build_tiny_model
from .conftest import hand_made_plan

ASSIGNMENT = {
    ("q_proj", "k_proj", "v_proj"): QuantizerSpec(Family.TCQ, 2, 9, code=TrellisCode.HYB),
    ("o_proj",): QuantizerSpec(Family.INT, 3),
    ("gate_proj", "up_proj"): QuantizerSpec(Family.NUQ, 2),
    ("down_proj",): QuantizerSpec(Family.HALF_TCQ, 2.25, 9),  # no table to tune
    ("lm_head",): QuantizerSpec(Family.NUQ, 4),
}
COARSE = QuantizerSpec(Family.NUQ, 2)


def tokens_of(model_dir: Path):
    return calibration(model_dir, None, tokens=1024, window=32, seed=0)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}


def test_tuned_blocks_are_closer_to_the_original_and_take_the_same_bytes(tiny_model, tmp_path):
    plan, tokens = hand_made_plan(tiny_model, ASSIGNMENT), tokens_of(tiny_model)
    plain = apply_plan(tiny_model, plan, tmp_path / "plain", hessian=tokens)
    tuned = apply_plan(tiny_model, plan, tmp_path / "tuned", hessian=tokens, tuning=Tuning(TuneMethod.BLOCKS, tokens))
    assert not work_directory(tmp_path / "tuned").exists()
    assert tuned.memory_bytes == plain.memory_bytes == plan.promised.memory_bytes
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    ends = (".scales", ".codebook", "norm.weight", ".bias")
    assert changed and all(name.startswith("model.layers.") and name.endswith(ends) for name in changed)
    assert all(any(name.endswith(end) for name in changed) for end in ends[:3])
    part = read_manifest(tmp_path / "tuned").tuning
    assert part.method is TuneMethod.BLOCKS and part.tokens == CalibrationPart.of(tokens) and len(part.losses) == 2
    assert all(end < begin for begin, end in part.losses)
    reference = load_model(tiny_model, choose_device("cpu"))
    fresh = calibration(tiny_model, None, tokens=1024, window=32, seed=1).windows
    first, second = (
        evaluate(load_checkpoint(tmp_path / name), fresh, reference=reference).kl for name in ("plain", "tuned")
    )
    assert second < 0.98 * first


def test_layers_are_fitted_without_tokens(tiny_llama, tmp_path):
    plan = hand_made_plan(tiny_llama, ASSIGNMENT)
    apply_plan(tiny_llama, plan, tmp_path / "plain")
    apply_plan(tiny_llama, plan, tmp_path / "tuned", tuning=Tuning(TuneMethod.LAYERS))
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"scales", "codebook"}
    part = read_manifest(tmp_path / "tuned").tuning
    assert (part.method, part.tokens, part.losses) == (TuneMethod.LAYERS, None, ())
    load_checkpoint(tmp_path / "tuned")  # fused as planned: the layers of a pattern have one codebook


def test_an_interrupted_tuning_goes_on_to_the_same_files(tiny_llama, tmp_path, monkeypatch):
    plan, tokens = hand_made_plan(tiny_llama, ASSIGNMENT), tokens_of(tiny_llama)
    how = {"hessian": tokens, "tuning": Tuning(TuneMethod.BLOCKS, tokens)}
    apply_plan(tiny_llama, plan, tmp_path / "whole", **how)
    tune_block = tuning_module.tune_block

    def interrupted(model, *arguments):
        if model.block == 1:
            raise KeyboardInterrupt
        return tune_block(model, *arguments)

    monkeypatch.setattr(tuning_module, "tune_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(tiny_llama, plan, tmp_path / "out", **how)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"made with other settings \(tuning\)"):
        apply_plan(tiny_llama, plan, tmp_path / "out", hessian=tokens)
    done = []

    def counted(model, *arguments):
        done.append(model.block)
        return tune_block(model, *arguments)

    monkeypatch.setattr(tuning_module, "tune_block", counted)
    apply_plan(tiny_llama, plan, tmp_path / "out", **how)
    assert done == [1]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_whole_model_is_tuned_and_an_interrupted_job_goes_on(tiny_llama, tmp_path, monkeypatch):
    plan, tokens = hand_made_plan(tiny_llama, ASSIGNMENT), tokens_of(tiny_llama)
    how = {"hessian": tokens, "tuning": Tuning(TuneMethod.MODEL, tokens)}
    apply_plan(tiny_llama, plan, tmp_path / "whole", **how)
    part = read_manifest(tmp_path / "whole").tuning
    assert part.method is TuneMethod.MODEL and len(part.losses) == 2 and part.kl[1] < 0.98 * part.kl[0]
    original, tuned = load_file(tiny_llama / "model.safetensors"), tensors(tmp_path / "whole")
    assert not torch.equal(original["model.norm.weight"], tuned["model.norm.weight"])
    assert torch.equal(original["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    reference = load_model(tiny_llama, choose_device("cpu"))
    found = evaluate(load_checkpoint(tmp_path / "whole"), tokens.windows, reference=reference).kl
    assert abs(found - part.kl[1]) < 0.01 * found
    keep = model_tuning._keep

    def interrupted(*arguments):
        keep(*arguments)
        if arguments[2] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_tuning, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(tiny_llama, plan, tmp_path / "out", **how)
    epochs = []
    monkeypatch.setattr(model_tuning, "_keep", lambda *arguments: (epochs.append(arguments[2]), keep(*arguments)))
    apply_plan(tiny_llama, plan, tmp_path / "out", **how)
    assert epochs == list(range(3, model_tuning.EPOCHS + 1))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("tied", [False, True])
def test_tuning_leaves_an_embedding_as_encoded_and_makes_up_for_it(tied, tmp_path, monkeypatch):
    model_dir = build_tiny_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    plan, tokens = hand_made_plan(model_dir, ASSIGNMENT | {("embed_tokens",): COARSE}), tokens_of(model_dir)
    inputs, tune_block = {}, tuning_module.tune_block

    def noted(model, module, weights, shared, changed, target):
        inputs[model.block] = torch.cat(changed)
        return tune_block(model, module, weights, shared, changed, target)

    monkeypatch.setattr(tuning_module, "tune_block", noted)
    apply_plan(model_dir, plan, tmp_path / "plain")
    apply_plan(model_dir, plan, tmp_path / "tuned", tuning=Tuning(TuneMethod.MODEL, tokens))
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "embed_tokens" in name} <= same
    assert ("lm_head.scales" in before) is not tied and "lm_head.scales" not in same
    model = load_checkpoint(tmp_path / "tuned")
    assert torch.allclose(inputs[0], model.model.embed_tokens(tokens.windows), atol=1e-6)
    part = read_manifest(tmp_path / "tuned").tuning
    assert len(part.losses) == 2 and part.kl[1] < part.kl[0]
    found = evaluate(model, tokens.windows, reference=load_model(model_dir, choose_device("cpu"))).kl
    assert abs(found - part.kl[1]) < 0.01 * found


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_tuning_that_does_not_help_is_dropped(stored, tmp_path, monkeypatch):
    model_dir = build_tiny_model("qwen2", tmp_path / "model")
    weights = {name: tensor.to(stored) for name, tensor in tensors(model_dir).items()}
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    plan, tokens = hand_made_plan(model_dir, ASSIGNMENT), tokens_of(model_dir)
    apply_plan(model_dir, plan, tmp_path / "layers", tuning=Tuning(TuneMethod.LAYERS))
    for module in ("block_tuning", "model_tuning"):
        monkeypatch.setattr(f"msq.planner.executor.{module}.LEARNING_RATE", 10.0)
    apply_plan(model_dir, plan, tmp_path / "model-tuned", tuning=Tuning(TuneMethod.MODEL, tokens))
    part = read_manifest(tmp_path / "model-tuned").tuning
    assert all(begin == end for begin, end in (*part.losses, part.kl))
    assert (tmp_path / "model-tuned" / "model.safetensors").read_bytes() == (
        tmp_path / "layers" / "model.safetensors"
    ).read_bytes()


def test_what_users_may_ask_for(tiny_llama):
    assert parse_tune("none") is None and parse_tune("blocks") is TuneMethod.BLOCKS
    with pytest.raises(CheckpointError, match="--tune is one of none, layers, blocks, model; got 'all'"):
        parse_tune("all")
    with pytest.raises(CheckpointError, match="needs tokens"):
        Tuning(TuneMethod.BLOCKS)
    with pytest.raises(CheckpointError, match="takes no tokens"):
        Tuning(TuneMethod.LAYERS, tokens_of(tiny_llama))
