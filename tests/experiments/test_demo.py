"""The demo's whole way, with a palette and texts that take seconds: bytes, order of the models, files."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from msq.experiments import demo
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.planner.errors import PlanError
from msq.planner.executor.load import load_checkpoint
from msq.planner.plan import load_plan
from msq.profiles.engines import Engine
from msq.profiles.schema import MANIFEST_FILE


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


def test_labels_do_not_make_a_profile_the_demos(tmp_path, monkeypatch):
    older = QuantizerSpec(Family.TCQ, 3, demo.STATE_BITS, code=TrellisCode.HYB)  # was called tcq-3-L12
    found = SimpleNamespace(
        labels=("tcq-3-L12",), spec=lambda _: older, manifest=SimpleNamespace(model=SimpleNamespace(name=demo.MODEL))
    )
    monkeypatch.setattr(demo, "PALETTE", "tcq-3")
    monkeypatch.setattr(demo, "load_profile", lambda _: found)
    (tmp_path / MANIFEST_FILE).touch()
    with pytest.raises(PlanError, match="is not the demo's profile"):
        demo._profile(tmp_path, tmp_path)
    found.spec = lambda _: replace(older, table_bits=0, code=TrellisCode.MAD)
    assert demo._profile(tmp_path, tmp_path) is found
