"""Checkpoints through transformers: load, generate, save again; and how msq registers itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.load import load_checkpoint, read_tensors
from msq.planner.executor.manifest import parse_quantization_config
from msq.planner.executor.transformers_plugin import MsqQuantizer, to_device

from .conftest import hand_made_plan

ASSIGNMENT = {
    ("q_proj", "v_proj"): QuantizerSpec(Family.NUQ, 4),
    ("k_proj",): QuantizerSpec(Family.INT, 4),
    ("o_proj",): QuantizerSpec(Family.HALF_TCQ, 3.25, 9),
    ("gate_proj", "up_proj"): QuantizerSpec(Family.VQ, 3),
    ("down_proj",): QuantizerSpec(Family.TCQ, 2.5, 9, code=TrellisCode.HYB),
    ("lm_head",): QuantizerSpec(Family.NUQ, 5),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "out"
    apply_plan(tiny_model, hand_made_plan(tiny_model, ASSIGNMENT), out)
    return out


def load(directory, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


def assert_same_tensors(saved: Path, checkpoint: Path) -> None:
    """The same names, dtypes and bits, in however many files and whatever order."""
    mine, theirs = (read_tensors(sorted(folder.glob("*.safetensors"))) for folder in (saved, checkpoint))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_from_pretrained_gives_the_model_of_load_checkpoint(checkpoint):
    model, expected = load(checkpoint, dtype=torch.float32), load_checkpoint(checkpoint)
    assert isinstance(model.hf_quantizer, MsqQuantizer)
    tokens = torch.randint(2048, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens[:1], **settings), expected.generate(tokens[:1], **settings))


def test_a_config_without_codes_has_those_there_were_before_codes(checkpoint):
    written = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    usual = parse_quantization_config(written, "config.json")
    assert {fields["code"] for fields in written["quantizers"].values()} == {TrellisCode.HYB, TrellisCode.MAD}
    for fields in written["quantizers"].values():
        if fields["code"] == TrellisCode.HYB:
            del fields["code"], fields["table_bits"]
    older = parse_quantization_config(written, "config.json")
    assert all(older.spec(layer) == usual.spec(layer) for layer in usual.layers)


def test_saving_gives_the_stored_tensors_and_saving_again_the_same_files(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir()) and "model.safetensors" in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert_same_tensors(tmp_path / "first", checkpoint)


def test_what_transformers_saved_runs_from_the_command_line_too(checkpoint, tmp_path):
    from msq.experiments.evaluate import load_any

    load(checkpoint).save_pretrained(tmp_path / "saved")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(load_any(tmp_path / "saved")(tokens).logits, load_any(checkpoint)(tokens).logits)
    with pytest.raises(CheckpointError, match="tensor_core kernels need a CUDA device"):
        load_any(tmp_path / "saved", implementation="tensor_core")


def test_a_loaded_model_changes_implementation_and_still_saves_the_same(checkpoint, tmp_path):
    model = load(checkpoint)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = model(tokens).logits
        to_device(model, "cpu", implementation="reference")
        assert torch.equal(model(tokens).logits, before)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", checkpoint)
    with pytest.raises(CheckpointError, match="can't run on tensor_core: tensor_core kernels need a CUDA device"):
        to_device(model, "cpu", implementation="tensor_core")
    with pytest.raises(CheckpointError, match="from_pretrained loaded"):
        to_device(torch.nn.Linear(2, 2), "cpu")


def test_a_model_over_several_devices_is_refused(checkpoint):
    quantizer = load(checkpoint).hf_quantizer
    with pytest.raises(CheckpointError, match=r"device_map names \['0', 'cpu'\]"):
        quantizer._process_model_before_weight_loading(torch.nn.Module(), device_map={"a": 0, "b": "cpu"})


@pytest.mark.parametrize("imports", ["msq, transformers", "transformers.quantizers, msq"])
def test_importing_msq_is_enough_whatever_comes_first(imports, tmp_path):
    code = f"import sys, {imports}\n"
    code += "from transformers.quantizers import auto\nprint(sorted({'msq'} & set(auto.AUTO_QUANTIZER_MAPPING)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['msq']", done.stderr


def test_public_names_are_there():
    import msq

    assert msq.to_device is to_device and "Decoder" in dir(msq)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = msq.nonsense
