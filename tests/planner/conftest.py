"""A synthetic profile of two blocks: random but fixed sensitivities, five quantizers, two kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from msq.profiles.schema import ROLES, ProfileManifest
from msq.profiles.tables import Profile, save_profile

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
SHAPES |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
FUSED = ("q_proj+k_proj", "q_proj+v_proj", "k_proj+v_proj", "q_proj+k_proj+v_proj", "gate_proj+up_proj")
QUANTIZERS = (
    ("nuq-2", "nuq", 2.0, 8, 0.1175),
    ("nuq-4", "nuq", 4.0, 32, 0.0095),
    ("vq-3", "vq", 3.0, 256, 0.0297),
    ("tcq-2", "tcq", 2.0, 64, 0.071),
    ("tcq-4", "tcq", 4.0, 64, 0.0059),
)
KERNEL_COLUMNS = ["pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size", "latency_us"]


def shape(pattern: str) -> tuple[int, int]:
    """(out_features, in_features) of a pattern."""
    shapes = [SHAPES[role] for role in pattern.split("+")]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def layer_rows(blocks: int) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    rows = [
        (f"b{b}.{role}", b, role, *SHAPES[role], f"b{b}.{GROUPS.get(role, role)}", rng.lognormal())
        for b in range(blocks)
        for role in ROLES
    ]
    names = ["layer", "block", "role", "out_features", "in_features", "fusion_group", "sensitivity"]
    return pd.DataFrame(rows, columns=names)


def latency_rows() -> pd.DataFrame:
    """tcq runs on tensor cores only, the others on both; at batch 8 vq-3 was not measured on CUDA cores."""
    rng = np.random.default_rng(8)
    rows = []
    for pattern in (*ROLES, *FUSED):
        out_features, in_features = shape(pattern)
        for label, family, bits, *_ in QUANTIZERS:
            for implementation in ("tensor_core", "cuda_core"):
                for batch in (1, 8):
                    if implementation == "cuda_core" and (family == "tcq" or (label == "vq-3" and batch == 8)):
                        continue
                    us = 2 + out_features * in_features * bits / 2000 * rng.uniform(0.7, 1.3) + batch / 10
                    rows.append((pattern, out_features, in_features, label, implementation, batch, us))
    return pd.DataFrame(rows, columns=KERNEL_COLUMNS)


@pytest.fixture
def manifest() -> ProfileManifest:
    return ProfileManifest.model_validate(
        {
            "model": {"name": "small", "architecture": "LlamaForCausalLM", "blocks": 2},
            "device": {"name": "test device"},
            "loss": {"method": "fisher", "error": "measured", "tokens": 1024},
            "latency": {"batch_sizes": [1, 8], "overhead_us": {1: 20.0, 8: 30.0}},
        }
    )


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    columns = ["quantizer", "family", "bits_per_weight", "table_bytes", "gaussian_error"]
    errors = {"layer": ["b1.down_proj"], "quantizer": ["tcq-4"], "error": [0.0123], "size_bytes": [3333]}
    return {
        "layers": layer_rows(2),
        "quantizers": pd.DataFrame(QUANTIZERS, columns=columns),
        "errors": pd.DataFrame(errors),
        "latency": latency_rows(),
    }


@pytest.fixture
def profile(tmp_path: Path, manifest: ProfileManifest, tables: dict[str, pd.DataFrame]) -> Profile:
    return save_profile(tmp_path / "profile", manifest, **tables)


@pytest.fixture
def memory_profile(tmp_path: Path, manifest: ProfileManifest, tables: dict[str, pd.DataFrame]) -> Profile:
    """The same without latency."""
    del tables["latency"]
    return save_profile(tmp_path / "memory", manifest.model_copy(update={"latency": None}), **tables)
