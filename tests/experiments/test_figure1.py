"""The first figure from recorded steps: names, promises, chart."""

from __future__ import annotations

import pandas as pd
from msq.experiments.figure1 import draw, figure_table
from msq.experiments.figure_plans import main as plan_rows
from msq.planner.plan import load_plan
from msq.profiles.combine import combine
from msq.profiles.schema import LossMethod, LossPart
from msq.profiles.tables import load_profile, save_profile


def test_the_table_holds_what_was_measured_beside_what_was_promised(tmp_path, monkeypatch):
    gpu = load_profile("h200/llama-3.1-8b")
    loss = LossPart(method=LossMethod.FISHER, error="gaussian", tokens=1024)
    manifest = gpu.manifest.model_copy(update={"loss": loss, "latency": None})
    layers = gpu.layers.assign(sensitivity=0.01 + gpu.layers["block"] / 1000)
    combine(save_profile(tmp_path / "loss", manifest, layers, gpu.quantizers), gpu, tmp_path / "joined")
    arguments = ["--profile", str(tmp_path / "joined"), "--out", str(tmp_path / "plans"), "--uniform", "tcq-3,nuq-3"]
    monkeypatch.setattr("sys.argv", ["figure_plans", *arguments])
    plan_rows()
    rows = [{"row": "fp16 compiled", "batch_size": 1, "step_us": 5600.0}]
    for file in ("nuq-3.yaml", "tcq-3.yaml", "msq.yaml"):
        promised = load_plan(tmp_path / "plans" / file).promised
        rows += [{"row": f"some/{file}", "batch_size": b, "step_us": promised.latency_us[b] * 1.01} for b in (1, 8)]
    facts = {"context": 256, "device": "NVIDIA H200", "driver": "1", "torch": "2", "commit": "abc"}
    table, runs = figure_table(tmp_path / "plans", pd.DataFrame(rows).assign(**facts), tmp_path / "joined")
    assert list(table["row"].unique()) == ["fp16 compiled", "tcq-3", "nuq-3", "msq"] and len(table) == 7
    assert (table["promise_error"].dropna() == round(1 / 1.01 - 1, 4)).all()
    assert (table["calibrated_error"].dropna().abs() < 0.005).all()
    one = table[table["batch_size"] == 1].set_index("row")
    assert (one["times_fp16"] == (5600 / one["step_us"]).round(3)).all()
    assert one.loc["msq", "predicted_loss"] <= one.loc["tcq-3", "predicted_loss"]
    draw(table, runs["msq"].plan, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count('<g id="text_') > 7 * 32  # a text in every cell of the map
