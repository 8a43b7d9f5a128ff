"""Comparisons: answers held against each other, and charts of them."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
from msq.experiments.charts import comparison_chart, frontier_chart
from msq.experiments.compare import Comparison, contradictions
from msq.experiments.errors import ChartError

ROWS = [
    Comparison("b", "good", "optimal", 1.0, 1.0, 0.0, True, 0.1),
    Comparison("b", "heuristic", "feasible", 1.1, None, None, True, 0.01),
    Comparison("b", "wrong bound", "optimal", 1.2, 1.2, 0.0, True, 0.3),
    Comparison("b", "wrong proof", "infeasible", seconds=0.2),
    Comparison("b", "broken", "failed", remark="it crashed"),
]


def test_contradictions_are_remarked() -> None:
    marked = {row.solver: row.remark for row in contradictions(ROWS)}
    assert marked["good"] == marked["heuristic"] == ""
    assert "is above the plan of good, 1" in marked["wrong bound"]
    assert marked["wrong proof"] == "it says infeasible, good has a plan"
    assert marked["broken"] == "it crashed"
    assert contradictions(ROWS[3:]) == ROWS[3:]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_charts_are_written_and_the_same_twice(tmp_path, suffix) -> None:
    frame = {"label": "", "bits_per_weight": 3.0, "memory_bytes": 1e6, "loss": 0.1, "price": 1.0}
    names = ("frontier", "exact", "uniform", "ideal", "plan")
    table = pd.DataFrame([frame | {"series": name, "label": name} for name in names])
    for attempt in ("one", "two"):
        frontier_chart(table, tmp_path / f"{attempt}.{suffix}", "title")
        comparison_chart(ROWS, tmp_path / f"{attempt}-compare.{suffix}", "title")
    for name in ("", "-compare"):
        first = (tmp_path / f"one{name}.{suffix}").read_bytes()
        assert len(first) > 5000 and first == (tmp_path / f"two{name}.{suffix}").read_bytes()
    if suffix == "svg":
        assert "wrong bound" in (tmp_path / "one-compare.svg").read_text().replace("<!-- ", "").replace(" -->", "")


def test_what_a_chart_needs_is_said(tmp_path, monkeypatch) -> None:
    with pytest.raises(ChartError, match=r"expected a chart's name to end in \.png"):
        comparison_chart(ROWS, tmp_path / "chart.txt", "title")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ChartError, match=r"pip install 'msq\[report\]'"):
        comparison_chart(ROWS, tmp_path / "chart.png", "title")
    assert not list(tmp_path.iterdir())
