"""The demo's whole way, with a palette and texts that take seconds: bytes, order of the models, files."""

from __future__ import annotations

import pytest
from msq.experiments import demo
from msq.planner.errors import PlanError
from msq.planner.executor.load import load_checkpoint
from msq.planner.plan import load_plan
from msq.profiles.engines import Engine


def test_the_demo_compares_three_models_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    for name, value in {"PALETTE": "nuq-[234],vq-2.5", "TOKENS": 512, "_WINDOWS": 4}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "Engine", lambda: Engine(workers=1))
    original, uniform, mixed = demo.run_demo(tmp_path / "demo")
    assert original.evaluation.kl == pytest.approx(0, abs=1e-6) and original.bits_per_weight == 16
    for row in (uniform, mixed):
        assert row.promised_bytes == row.stored_bytes <= uniform.stored_bytes
    assert 0 < mixed.evaluation.kl < uniform.evaluation.kl
    shown = capsys.readouterr().out
    assert "family and bits of every layer" in shown and "fp16 original" in shown and "msq plan" in shown
    plan = load_plan(tmp_path / "demo" / "msq.yaml")
    assert plan.promised.memory_bytes == mixed.stored_bytes
    assert load_checkpoint(tmp_path / "demo" / "msq") is not None
    with pytest.raises(PlanError, match="holds checkpoints of an earlier demo"):
        demo.run_demo(tmp_path / "demo")
