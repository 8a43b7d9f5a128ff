"""A latency profile on a CUDA device: kernels in graphs, the executor's overhead, what is known of the GPU."""

from __future__ import annotations

import json

import pytest
import torch
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.overhead import ExecutorOverhead
from msq.profiles.latency_job import LatencySettings, run_latency_profile
from msq.profiles.model_source import EMBEDDED
from msq.profiles.schema import EMBEDDING_ROLES

pytestmark = pytest.mark.gpu
SPECS = (QuantizerSpec(Family.INT, 4), QuantizerSpec(Family.NUQ, 3), QuantizerSpec(Family.TCQ, 3, 16))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("executor", [True, False])
def test_a_profile_with_the_embedding(tmp_path, executor, tied):
    config = json.loads((EMBEDDED / "ref-tiny-3m" / "config.json").read_text())
    (tmp_path / "tiny.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    settings = LatencySettings(specs=SPECS, batch_sizes=(1, 8), context=32, embedding=True)
    overhead = ExecutorOverhead() if executor else None
    profile = run_latency_profile(tmp_path / "tiny.json", tmp_path / "p", settings, overhead=overhead)
    rows = profile.latency[profile.latency["pattern"].isin(EMBEDDING_ROLES)]
    assert set(rows["implementation"]) == {"tensor_core" if tied else "lookup"} and len(rows) == 3 * 2
    assert all(us > 0 for us in profile.manifest.latency.embedding_us.values())


@pytest.mark.parametrize("executor", [True, False])
def test_a_profile_of_a_small_model(tmp_path, executor):
    config = json.loads((EMBEDDED / "ref-tiny-3m" / "config.json").read_text())
    (tmp_path / "wide.json").write_text(json.dumps(config | {"hidden_size": 512, "intermediate_size": 1024}))
    settings = LatencySettings(specs=SPECS, batch_sizes=(1, 8, 32), context=32)
    overhead = ExecutorOverhead() if executor else None
    profile = run_latency_profile(tmp_path / "wide.json", tmp_path / "p", settings, overhead=overhead)
    assert set(profile.latency["implementation"]) == {"tensor_core"} and len(profile.latency) == 13 * 3 * 3
    part, device = profile.manifest.latency, profile.manifest.device
    assert all(us > 0 for us in (*part.overhead_us.values(), *part.head_us.values()))
    assert device.name == torch.cuda.get_device_name() and {"driver", "cuda"} <= device.details.keys()
