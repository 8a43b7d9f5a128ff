"""Hessians from a streamed model: what they are, that they resume, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from msq.kernels.rotation import input_seed, rotate
from msq.profiles import hessians as hessians_module
from msq.profiles.blockwise import BlockwiseModel
from msq.profiles.calibration import calibration
from msq.profiles.errors import ProfileError
from msq.profiles.hessians import collect_hessians
from msq.profiles.inventory import inventory
from msq.profiles.models import choose_device, load_model
from msq.profiles.streaming import StreamedModel
from safetensors.torch import load_file, save_file

CPU = choose_device("cpu")


def collect(model_dir, directory, *, tokens=160, digest="d", seed=3):
    windows = calibration(model_dir, None, tokens=tokens, window=20, seed=0)
    return collect_hessians(model_dir, inventory(model_dir), windows, directory, digest=digest, seed=seed, device=CPU)


def test_a_streamed_pass_equals_the_whole_model(tiny_model, monkeypatch):
    monkeypatch.setattr("msq.profiles.streaming._TOKENS_AT_ONCE", 48)  # batches of 2, 2 and 1 windows
    tokens = torch.randint(2048, (5, 20), generator=torch.Generator().manual_seed(0))
    recording = BlockwiseModel(load_model(tiny_model, CPU)).record(tokens)
    streamed = StreamedModel(tiny_model, tokens, CPU)
    while streamed.block < streamed.blocks:
        assert torch.allclose(torch.cat(streamed.hidden), recording.hidden[streamed.block], atol=1e-5)
        streamed.advance({})
        assert all(parameter.is_meta for parameter in streamed._decoder.layers.parameters())
    assert torch.allclose(torch.cat(streamed.hidden), recording.hidden[-1], atol=1e-5)


def test_hessians_are_the_second_moments_of_the_rotated_inputs(tiny_model, tmp_path):
    files = collect(tiny_model, tmp_path / "h")
    model = load_model(tiny_model, CPU)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("_proj") or name == "lm_head":
            module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.__setitem__(name, inputs[0]))
    with torch.no_grad():
        model(calibration(tiny_model, None, tokens=160, window=20, seed=0).windows)
    for layer in inventory(tiny_model).layers:
        rows = rotate(seen[layer.name].flatten(0, 1), input_seed(layer.fusion_group, 3))
        expected = rows.T @ rows
        found = files.load(layer, CPU)
        assert found.rotation_seed == input_seed(layer.fusion_group, 3)
        assert torch.allclose(found.matrix, expected / expected.diagonal().mean(), rtol=1e-3, atol=1e-4)


class _Interruptions:
    """`write_atomic` that is interrupted before some write."""

    def __init__(self, left: int) -> None:
        self.left, self.write = left, hessians_module.write_atomic

    def __call__(self, *arguments):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.write(*arguments)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_an_interrupted_job_goes_on_and_ends_with_the_same_files(tiny_llama, tmp_path, monkeypatch, writes):
    collect(tiny_llama, tmp_path / "whole")
    monkeypatch.setattr(hessians_module, "write_atomic", _Interruptions(writes))
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_llama, tmp_path / "h")
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "h").iterdir()}
    assert len(before) == 1 + writes
    collect(tiny_llama, tmp_path / "h")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "h").iterdir()) and len(names) == 4
    for name in names:
        assert (tmp_path / "h" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    monkeypatch.setattr(hessians_module, "StreamedModel", None)  # a finished job runs nothing
    collect(tiny_llama, tmp_path / "h")


def test_a_text_is_read_from_its_beginning(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text("A short text about nothing, told again and again. " * 60)
    found = calibration(tiny_llama, tmp_path / "text.txt", tokens=70, window=32, seed=0)
    assert found.windows.shape == (2, 32) and found.text == "text.txt"
    with pytest.raises(ProfileError, match="at least one window of 32; got 31"):
        calibration(tiny_llama, tmp_path / "text.txt", tokens=31, window=32, seed=0)
    for text in (tmp_path / "text.txt", None):
        with pytest.raises(ProfileError, match=r"windows of at most the 256 tokens that .* reads; got 257"):
            calibration(tiny_llama, text, tokens=600, window=257, seed=0)


@pytest.mark.parametrize("changes", [{"tokens": 180}, {"digest": "e"}, {"seed": 4}])
def test_files_of_another_job_are_refused(tiny_llama, tmp_path, changes):
    collect(tiny_llama, tmp_path / "h")
    with pytest.raises(ProfileError, match=r"Hessians made with other settings \((tokens|model|seed)\)"):
        collect(tiny_llama, tmp_path / "h", **changes)


def test_a_directory_of_other_files_is_refused(tiny_llama, tmp_path):
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "letter.txt").write_text("Dear")
    with pytest.raises(ProfileError, match="holds other files"):
        collect(tiny_llama, tmp_path / "h")


def test_damaged_files_are_one_sentence(tiny_llama, tmp_path):
    files = collect(tiny_llama, tmp_path / "h")
    path = files.path(1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ProfileError, match="can't read the Hessian of"):
        files.load(inventory(tiny_llama).layers[-2], CPU)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProfileError, match=r"up_proj.*NaN or infinite"):
        collect(model, tmp_path / "other")
