"""Tiny models of every supported architecture, with the tokenizer of the embedded one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def build_tiny_model(architecture: str, directory: Path, **changes) -> Path:
    """Two blocks, 64 wide, biased where the architecture has biases; float16 safetensors; `changes` of the config."""
    import torch
    import transformers
    from msq.profiles.model_source import EMBEDDED

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        architecture,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=2048,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **changes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.half().save_pretrained(directory)
    for path in (EMBEDDED / "ref-tiny-3m").glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    return directory


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model, once for every architecture."""
    return build_tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny Llama."""
    return build_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def msq(monkeypatch, capsys):
    """Runs a command line; returns (exit code, stdout, stderr)."""

    from msq.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run
