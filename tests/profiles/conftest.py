"""A small profile on disk: two Llama blocks, three quantizers, measured errors and latency."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from msq.profiles.journal import Journal
from msq.profiles.schema import ROLES, ProfileManifest
from msq.profiles.tables import save_profile

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
SHAPES |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@pytest.fixture
def manifest() -> ProfileManifest:
    return ProfileManifest.model_validate(
        {
            "model": {"name": "small", "architecture": "LlamaForCausalLM", "blocks": 2},
            "device": {"name": "test device", "kind": "cpu", "details": {"cores": 2}},
            "loss": {"method": "data_free_kl", "error": "measured", "tokens": 1024, "noise": 0.01, "seed": 0},
            "latency": {"batch_sizes": [1, 8], "overhead_us": {1: 10.5, 8: 12.25}},
        }
    )


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    layers = [
        (f"b{b}.{role}", b, role, *SHAPES[role], f"b{b}.{GROUPS.get(role, role)}", (1 + b) / (3 + i), 1e-3 / 7)
        for b in range(2)
        for i, role in enumerate(ROLES)
    ]
    quantizers = [
        ("nuq-2", "nuq", 2.0, 8, 0.1175),
        ("nuq-4", "nuq", 4.0, 32, 0.0095),
        ("tcq-3", "tcq", 3.0, 2048, 0.0189),
    ]
    latency = [
        (pattern, rows, 64, label, "cuda_core", batch, (i + 1) * batch / 3)
        for pattern, rows in (("q_proj", 64), ("q_proj+k_proj", 96))
        for i, (label, *_) in enumerate(quantizers)
        for batch in (1, 8)
    ]
    names = ["layer", "block", "role", "out_features", "in_features", "fusion_group", "sensitivity", "standard_error"]
    kernels = ["pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size", "latency_us"]
    return {
        "layers": pd.DataFrame(layers, columns=names),
        "quantizers": pd.DataFrame(
            quantizers, columns=["quantizer", "family", "bits_per_weight", "table_bytes", "gaussian_error"]
        ),
        "errors": pd.DataFrame(
            {"layer": ["b0.q_proj"], "quantizer": ["nuq-4"], "error": [0.1 + 0.2], "size_bytes": [2345]}
        ),
        "latency": pd.DataFrame(latency, columns=kernels),
    }


@pytest.fixture
def directory(tmp_path: Path, manifest: ProfileManifest, tables: dict[str, pd.DataFrame]) -> Path:
    save_profile(tmp_path / "profile", manifest, **tables)
    return tmp_path / "profile"


class Interrupting(Journal):
    """A journal whose owner is interrupted after some rows."""

    left = 0

    def add(self, key, row):
        if type(self).left == 0:
            raise KeyboardInterrupt
        type(self).left -= 1
        super().add(key, row)
