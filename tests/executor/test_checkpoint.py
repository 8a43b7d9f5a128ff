"""From a plan to a checkpoint and back, on every architecture, and what a damaged checkpoint says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from msq.kernels.quantize import decode, dequantize, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.errors import PlanError
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.generate import generate_text
from msq.planner.executor.load import load_checkpoint, quantized_weights, read_tensors
from msq.planner.executor.manifest import parse_quantization_config
from msq.planner.executor.shards import ShardWriter, TensorSlot, stored_pieces, stored_tensors
from msq.planner.plan import Plan, load_plan
from msq.planner.solve import find_plan
from msq.profiles.inventory import inventory
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.models import choose_device, load_model, load_tokenizer
from msq.profiles.quantizer_errors import read_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SPECS = (
    QuantizerSpec(Family.NUQ, 2),
    QuantizerSpec(Family.VQ, 3),
    QuantizerSpec(Family.NUQ, 4),
    QuantizerSpec(Family.INT, 8),
)


@pytest.fixture(scope="module")
def built(tiny_model, tmp_path_factory) -> tuple[Path, Plan, Path]:
    """Model, plan with fusions and several quantizers, checkpoint."""
    home = tmp_path_factory.mktemp("built")
    settings = ProfileSettings(specs=SPECS, tokens=64, window=32, batch_sizes=(1,), context=4)
    measured = run_profile(tiny_model, home / "profile", settings, name="tiny")
    assert measured.latency is not None and measured.manifest.latency is not None
    # As if every kernel took a millisecond, whatever this machine is busy with: of the 14 layers four must fuse.
    profile = dataclasses.replace(measured, latency=measured.latency.assign(latency_us=1000.0))
    cap = measured.manifest.latency.overhead_us[1] + 10_000
    plan = find_plan(profile, parse_budgets(["memory=5.5bpw", f"latency={cap}us"])).plan
    apply_plan(tiny_model, plan, home / "checkpoint")
    return tiny_model, plan, home / "checkpoint"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(built[2], tmp_path / "copy"))


def test_promised_bytes_are_the_bytes_on_disk_and_in_memory(built):
    _, plan, checkpoint = built
    names = {f"{entry.layer}." for entry in plan.layers}
    stored = load_file(checkpoint / "model.safetensors")
    packed = {k: t for k, t in stored.items() if any(k.startswith(n) for n in names) and not k.endswith(".bias")}
    assert sum(t.numel() * t.element_size() for t in packed.values()) == plan.promised.memory_bytes
    whole = sum(t.numel() * t.element_size() for t in stored.values())
    assert whole == plan.promised.memory_bytes + plan.model.unplanned_bytes
    assert load_plan(checkpoint / "plan.yaml") == plan


def test_loaded_weights_equal_the_encoded_ones_bit_for_bit(built):
    model_dir, plan, checkpoint = built
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    weights = quantized_weights(
        parse_quantization_config(config, "config.json"), read_tensors([checkpoint / "model.safetensors"])
    )
    entries = {entry.layer: entry for entry in plan.layers}
    for layer in inventory(model_dir).layers:
        spec = plan.spec(entries[layer.name].quantizer)
        fresh = quantize(read_weight(model_dir, layer), spec, rotation_seed=input_seed(layer.fusion_group, 0))
        assert torch.equal(decode(weights[layer.name]), decode(fresh))


def test_the_checkpoint_runs_as_the_model_with_quantized_weights(built):
    model_dir, plan, checkpoint = built
    assert any(len(entry.pattern) > 1 for entry in plan.layers)
    expected = load_model(model_dir, choose_device("cpu"))
    for layer in inventory(model_dir).layers:
        spec = plan.spec(next(entry.quantizer for entry in plan.layers if entry.layer == layer.name))
        fresh = quantize(read_weight(model_dir, layer), spec, rotation_seed=input_seed(layer.fusion_group, 0))
        expected.get_parameter(f"{layer.name}.weight").data = dequantize(fresh)
    tokens = torch.randint(2048, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = expected(tokens).logits
        for fused in (True, False):
            found = load_checkpoint(checkpoint, fused=fused)
            assert torch.allclose(found(tokens).logits, logits, atol=1e-3)
    with torch.no_grad(), torch.device("cpu"):
        generated = expected.generate(tokens[:1], max_new_tokens=8, do_sample=False)
        assert torch.equal(
            load_checkpoint(checkpoint).generate(tokens[:1], max_new_tokens=8, do_sample=False), generated
        )


def test_generation_goes_on_from_a_prompt(built):
    text = generate_text(load_checkpoint(built[2]), load_tokenizer(built[2]), "The", 5)
    assert isinstance(text, str)
    with pytest.raises(CheckpointError, match="expected a prompt of 1 to"):
        generate_text(load_checkpoint(built[2]), load_tokenizer(built[2]), "", 5)
    with pytest.raises(CheckpointError, match="expected a prompt of 1 to"):
        generate_text(load_checkpoint(built[2]), load_tokenizer(built[2]), "word " * 300, 5)


def test_applying_twice_gives_identical_files(built, tmp_path):
    model_dir, plan, checkpoint = built
    apply_plan(model_dir, plan, tmp_path / "again")
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((checkpoint / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_nothing_is_left_when_applying_fails(built, tmp_path, monkeypatch):
    model_dir, plan, _ = built
    promised = plan.promised.model_copy(update={"memory_bytes": plan.promised.memory_bytes + 1})
    with pytest.raises(CheckpointError, match="promised"):
        apply_plan(model_dir, plan.model_copy(update={"promised": promised}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        apply_plan(model_dir, plan, tmp_path / "taken")


def test_a_plan_for_other_weights_is_refused(built, tmp_path):
    model_dir, plan, _ = built
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"digest": "0" * 64})})
    with pytest.raises(PlanError, match="digest 000000000000"):
        apply_plan(model_dir, other, tmp_path / "out")
    fewer = plan.model_copy(update={"layers": plan.layers[1:]})
    with pytest.raises(PlanError, match="is in the model but not planned"):
        apply_plan(model_dir, fewer, tmp_path / "out")


def test_a_truncated_file_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has digest .* cut short"):
        load_checkpoint(copy)


def test_a_weights_file_that_the_manifest_does_not_list_is_refused(copy):
    save_file({"model.norm.weight": torch.zeros(64)}, copy / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"z\.safetensors is not listed"):
        load_checkpoint(copy)


def test_a_tensor_that_no_layer_knows_is_refused(built):
    config = json.loads((built[2] / "config.json").read_text())["quantization_config"]
    tensors = load_file(built[2] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(CheckpointError, match=f"{name} has the unknown tensor zeros"):
        quantized_weights(parse_quantization_config(config, "config.json"), tensors | {f"{name}.zeros": torch.ones(2)})


def test_a_codebook_that_the_quantizer_cannot_have_is_refused():
    weight = quantize(torch.randn(32, 64), SPECS[0], rotation_seed=1)
    layers = {"a.b": SimpleNamespace(out_features=32, in_features=64, rotation_seed=1)}
    quantization = SimpleNamespace(layers=layers, spec=lambda _: weight.spec)
    stored = {f"a.b.{name}": tensor for name, tensor in weight.tensors()}
    assert torch.equal(quantized_weights(quantization, stored)["a.b"].codebook, weight.codebook)
    stored["a.b.codebook"] = (weight.codebook * 1.01).half()
    with pytest.raises(CheckpointError, match=r"a\.b: expected a codebook .* 1/32 .* Apply the plan again"):
        quantized_weights(quantization, stored)


def test_tensors_that_are_not_finite_or_named_twice_are_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "a.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="'a' holds NaN"):
        read_tensors([tmp_path / "a.safetensors"])
    with pytest.raises(CheckpointError, match="'b' is in"):
        read_tensors([tmp_path / "b.safetensors"] * 2)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.yaml", "tokenizer.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_checkpoint(copy)


def test_what_is_no_checkpoint_says_so(copy, tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        load_checkpoint(tmp_path / "nowhere")
    (copy / "msq.yaml").write_text("schema_version: 1\nextra: 2\n")
    with pytest.raises(CheckpointError, match=r"unknown field 'extra'|missing"):
        load_checkpoint(copy)
    (copy / "msq.yaml").write_text("schema_version: 7\n")
    with pytest.raises(CheckpointError, match="upgrade msq"):
        load_checkpoint(copy)


def test_a_config_that_disagrees_with_itself_is_refused(built):
    config = json.loads((built[2] / "config.json").read_text())["quantization_config"]
    for change, message in [
        (lambda c: c.update(quant_method="gptq"), "quant_method is 'gptq'"),
        (lambda c: next(iter(c["layers"].values())).update(quantizer="nuq-9"), "unknown quantizer 'nuq-9'"),
        (lambda c: next(iter(c["layers"].values())).update(pattern=["elsewhere"]), "pattern"),
        (lambda c: c.update(surprise=1), "unknown field 'surprise'"),
    ]:
        damaged = json.loads(json.dumps(config))
        change(damaged)
        with pytest.raises(CheckpointError, match=message):
            parse_quantization_config(damaged, "config.json")


def test_large_models_are_written_in_shards_that_load_as_one(tmp_path):
    tensors = {f"layer{i}.weight": torch.randn(8, 8) for i in range(5)}
    listed = [TensorSlot(name, "F32", (8, 8)) for name in tensors]
    with ShardWriter(tmp_path, listed, shard_bytes=600) as writer:
        for name in reversed(tensors):  # in any order, in pieces
            writer.write(name, tensors[name].split(3))
        writer.finish()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 256 and set(index["weight_map"]) == set(tensors)
    assert all(
        torch.equal(t, tensors[name]) for name, t in read_tensors(sorted(tmp_path.glob("*.safetensors"))).items()
    )


def test_files_written_in_pieces_are_those_of_the_safetensors_library(tmp_path, monkeypatch):
    monkeypatch.setattr("msq.planner.executor.shards._PIECE_BYTES", 64)
    tensors = {
        "codes": torch.arange(15, dtype=torch.uint8).view(5, 3),
        "rows": torch.randn(7, 33).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(3.5),
        "counts": torch.arange(9).view(3, 3),
        "none": torch.empty(0, 4),
        "halves": torch.randn(11).half(),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    listed = stored_tensors(tmp_path / "theirs")
    assert {tensor.name: tensor.size_bytes for tensor in listed} == {
        name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()
    }
    with ShardWriter(tmp_path, listed) as writer:
        for tensor in listed:
            writer.write(tensor.name, stored_pieces(tmp_path / "theirs", tensor))
        writer.finish()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_that_is_missing_or_of_another_size_is_refused(tmp_path):
    with ShardWriter(tmp_path, [TensorSlot("a", "F16", (4, 4))]) as writer:
        with pytest.raises(CheckpointError, match=r"'a' was not"):
            writer.finish()
        with pytest.raises(CheckpointError, match=r"expected 'a' as F16 .* 32 bytes; got 24"):
            writer.write("a", [torch.zeros(3, 4).half()])
