"""The profiling job on tiny models: what it writes, that it resumes, that it measures what it says."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import torch
from msq.kernels.quantize import normalized_error, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.profiles import job as job_module
from msq.profiles.blockwise import BlockwiseModel, token_kl
from msq.profiles.calibration import calibration
from msq.profiles.errors import ProfileError
from msq.profiles.hessians import collect_hessians
from msq.profiles.inventory import inventory
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.journal import JOURNAL_FILE, Journal
from msq.profiles.models import choose_device, load_model
from msq.profiles.quantizer_errors import read_weight
from msq.profiles.schema import LossMethod
from msq.profiles.sensitivity import measure_sensitivities
from msq.profiles.tables import load_profile
from safetensors.torch import load_file, save_file

from .conftest import Interrupting

SPECS = (QuantizerSpec(Family.INT, 4), QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.TCQ, 2, 9))
SETTINGS = ProfileSettings(specs=SPECS, tokens=256, window=32, windows_per_group=4, batch_sizes=(1, 2), context=8)


def test_a_profile_of_every_architecture_is_whole(tiny_model, tmp_path):
    profile = run_profile(tiny_model, tmp_path / "p", SETTINGS, name="tiny")
    again = load_profile(tmp_path / "p")
    assert again.digest == profile.digest and not (tmp_path / "p" / JOURNAL_FILE).exists()
    assert len(profile.layers) == 15 and (profile.layers["sensitivity"] > 0).all()
    assert (profile.layers["standard_error"] > 0).all()
    assert profile.errors is not None and len(profile.errors) == 15 * len(SPECS)
    for row in profile.errors.itertuples():
        layer = profile.layers.set_index("layer").loc[row.layer]
        assert row.size_bytes == profile.spec(row.quantizer).size_bytes(layer.out_features, layer.in_features)
    # 7 subsets of q, k, v; o; 3 of gate, up; down; the head. k and v differ in role, so all are distinct.
    assert profile.latency is not None and len(profile.latency) == 13 * len(SPECS) * 2
    same_shape = profile.latency.groupby(["out_features", "in_features", "quantizer", "batch_size"])["latency_us"]
    assert (same_shape.min() == same_shape.max()).all()  # each product is measured once
    assert profile.manifest.latency is not None and set(profile.manifest.latency.overhead_us) == {1, 2}


def test_sensitivity_is_the_kl_of_the_whole_model_per_unit_of_noise(tiny_model, tmp_path):
    layers = inventory(tiny_model).layers
    model = load_model(tiny_model, choose_device("cpu"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tokens = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(0))
    with Journal(tmp_path / "j", {}) as journal:
        found = measure_sensitivities(model, layers, tokens, noise=0.1, seed=3, windows_per_group=2, journal=journal)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    with torch.no_grad():
        original = [model(part).logits for part in tokens.split(2)]
        for layer in (layers[0], layers[6], layers[9]):
            weight = model.get_parameter(f"{layer.name}.weight")
            values = []
            for index, part in enumerate(tokens.split(2)):
                draw = torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(input_seed(f"{layer.name}:{index}", 3))
                )
                kept = weight.data
                weight.data = kept + 0.1 * kept.norm() / draw.norm() * draw
                values.append(float(token_kl(original[index], model(part).logits).mean()))
                weight.data = kept
            assert found[layer.name].value == pytest.approx(sum(values) / len(values) / 0.01, rel=1e-3)


def test_resuming_from_a_block_equals_the_whole_pass(tiny_model):
    model = load_model(tiny_model, choose_device("cpu"))
    blockwise = BlockwiseModel(model)
    tokens = torch.randint(2048, (2, 12))
    recording = blockwise.record(tokens)
    with torch.no_grad():
        expected = model(tokens).logits
    for block in range(2):
        assert torch.allclose(blockwise.logits(blockwise.resume(recording, block)), expected, atol=1e-5)
    assert float(blockwise.kl_per_window(recording, recording.hidden[-1]).abs().max()) < 1e-6


def test_errors_are_those_of_the_quantized_weights(tiny_llama, tmp_path):
    profile = run_profile(tiny_llama, tmp_path / "p", SETTINGS, name="tiny")
    assert profile.errors is not None
    table = profile.errors.set_index(["layer", "quantizer"])["error"]
    for layer in inventory(tiny_llama).layers[:3]:
        weight = read_weight(tiny_llama, layer)
        for spec in SPECS:
            quantized = quantize(weight, spec, rotation_seed=input_seed(layer.fusion_group, 0))
            assert table[layer.name, spec.label] == normalized_error(weight, quantized)


def test_proxy_errors_are_those_of_quantization_under_the_hessians(tiny_llama, tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_sizes=(), error="proxy", tokens=640)
    profile = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    assert profile.errors is not None and profile.manifest.loss.error == "proxy"
    assert not (tmp_path / "p" / "hessians").exists()
    table = profile.errors.set_index(["layer", "quantizer"])["error"]
    info = inventory(tiny_llama)
    tokens = calibration(tiny_llama, None, tokens=640, window=32, seed=0)
    files = collect_hessians(tiny_llama, info, tokens, tmp_path / "h", digest="d", seed=0, device=choose_device("cpu"))
    for layer in info.layers[:4]:
        weight = read_weight(tiny_llama, layer)
        hessian = files.load(layer, choose_device("cpu"))
        for spec in SPECS:
            seed = input_seed(layer.fusion_group, 0)
            aware = quantize(weight, spec, rotation_seed=seed, hessian=hessian)
            assert table[layer.name, spec.label] == normalized_error(weight, aware, hessian)
            assert table[layer.name, spec.label] < normalized_error(
                weight, quantize(weight, spec, rotation_seed=seed), hessian
            )


def test_an_interrupted_proxy_job_keeps_its_hessians(tiny_llama, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, batch_sizes=(), error="proxy")
    undisturbed = run_profile(tiny_llama, tmp_path / "whole", settings, name="tiny")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("msq.profiles.quantize_jobs.quantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    monkeypatch.undo()
    assert len(list((tmp_path / "p" / "hessians").glob("*.safetensors"))) == 3
    monkeypatch.setattr("msq.profiles.hessians.StreamedModel", None)
    profile = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    pd.testing.assert_frame_equal(profile.errors, undisturbed.errors)


@pytest.mark.parametrize("rows", [0, 1, 9, 28, 30, 60])
def test_an_interrupted_job_goes_on_without_measuring_rows_twice(tiny_llama, tmp_path, monkeypatch, rows):
    undisturbed = run_profile(tiny_llama, tmp_path / "whole", SETTINGS, name="tiny")
    monkeypatch.setattr(job_module, "Journal", Interrupting)
    Interrupting.left = rows
    with pytest.raises(KeyboardInterrupt):
        run_profile(tiny_llama, tmp_path / "p", SETTINGS, name="tiny")
    monkeypatch.undo()
    path = tmp_path / "p" / JOURNAL_FILE
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    assert len(lines) == rows
    finished = {tuple(json.loads(line)[0]): json.loads(line)[1] for line in lines}
    profile = run_profile(tiny_llama, tmp_path / "p", SETTINGS, name="tiny")
    pd.testing.assert_frame_equal(profile.layers, undisturbed.layers)
    pd.testing.assert_frame_equal(profile.errors, undisturbed.errors)
    for key, row in finished.items():
        if key[0] == "latency":
            kept = profile.latency.query("out_features == @key[1] and in_features == @key[2] and quantizer == @key[3]")
            assert (kept["latency_us"][kept["batch_size"] == key[5]] == round(row[0], 3)).all() and len(kept)


def test_a_job_does_not_go_on_from_another_quantizer_of_the_same_label(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "Journal", Interrupting)
    Interrupting.left = 3
    with pytest.raises(KeyboardInterrupt):
        run_profile(tiny_llama, tmp_path / "p", SETTINGS, name="tiny")
    monkeypatch.undo()
    path = tmp_path / "p" / JOURNAL_FILE
    head, *rows = path.read_text().splitlines(keepends=True)
    job = json.loads(head)
    (trellis,) = (fields for fields in job["quantizers"] if fields["family"] == "tcq")
    trellis |= {"code": "hyb", "table_bits": 9}
    path.write_text("".join([json.dumps(job) + "\n", *rows]))
    with pytest.raises(ProfileError, match=r"made with other settings \(quantizers\)"):
        run_profile(tiny_llama, tmp_path / "p", SETTINGS, name="tiny")


def test_a_finished_profile_is_not_overwritten_unless_asked(tiny_llama, tmp_path):
    settings = ProfileSettings(specs=SPECS[:2], tokens=64, window=32, batch_sizes=())
    first = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    with pytest.raises(ProfileError, match=r"already holds a profile.*--restart"):
        run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    assert run_profile(tiny_llama, tmp_path / "p", settings, name="tiny", restart=True).digest == first.digest


def test_calibration_reads_the_text(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short text about nothing, told again and again. " * 60)
    settings = ProfileSettings(
        specs=SPECS[:1], method=LossMethod.CALIBRATION_KL, text=text, tokens=96, window=32, batch_sizes=()
    )
    profile = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    assert profile.manifest.loss.text == "text.txt" and profile.manifest.loss.tokens == 96
    assert profile.latency is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_bad_weight_is_refused(tiny_llama, tmp_path, value):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProfileError, match=r"up_proj.*NaN or infinite"):
        run_profile(model, tmp_path / "p", SETTINGS, name="tiny")
    assert not (tmp_path / "p").exists()


def test_a_model_that_lacks_a_tensor_is_not_loaded(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProfileError, match=r"has no weight 'model\.norm\.weight'"):
        load_model(model, choose_device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": 0.0}, "noise between 0 and 1"),
        ({"tokens": 8}, "at least two windows"),
        ({"specs": ()}, "at least one quantizer"),
        ({"batch_sizes": (1, 1)}, "distinct batch sizes"),
        ({"method": LossMethod.CALIBRATION_KL}, "calibration needs a text"),
        ({"device": "tpu9"}, "device"),
        ({"error": "outputs"}, "weights or proxy; got 'outputs'"),
    ],
)
def test_bad_settings_are_refused(tiny_llama, tmp_path, changes, message):
    fields = {"specs": SPECS, "tokens": 256, "window": 32} | changes
    with pytest.raises(ProfileError, match=message):
        run_profile(tiny_llama, tmp_path / "p", ProfileSettings(**fields), name="tiny")
    assert not (tmp_path / "p").exists()


def test_a_missing_or_broken_tokenizer_is_one_sentence(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words " * 200)
    settings = ProfileSettings(specs=SPECS[:1], method=LossMethod.CALIBRATION_KL, text=text, tokens=64, window=32)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ProfileError, match="can't load the tokenizer"):
        run_profile(model, tmp_path / "p", settings, name="tiny")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ProfileError, match="has no tokenizer"):
        run_profile(model, tmp_path / "p", settings, name="tiny")
