"""Comparisons: answers held against each other, and charts of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from msq.experiments import compare as module
from msq.experiments.charts import _reference, check_chart, comparison_chart, frontier_chart
from msq.experiments.compare import Comparison, Trial, contradictions, out_of_reach
from msq.experiments.errors import ChartError
from msq.solvers.isolated import Isolated
from msq.solvers.problem import Problem
from msq.solvers.solution import Limit, Solution, Status

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
    bound = Comparison("b", "no plan", "unknown", lower_bound=2.0)
    assert "is above the plan of good" in contradictions([*ROWS, bound])[-1].remark


def test_a_budget_is_out_of_reach_if_that_is_proven_and_nobody_has_a_plan() -> None:
    assert out_of_reach(ROWS[3:]) and not out_of_reach(ROWS) and not out_of_reach(ROWS[4:])


PROBLEM = Problem(
    group=np.zeros(2, np.int64), mask=np.ones(2, np.int64), choice=np.arange(2), loss=np.array([4.0, 1.0]),
    usage=np.array([[1.0, 2.0]]), caps=np.array([3.0]), base=np.zeros(1), group_sizes=np.ones(1, np.int32),
    resource_names=("memory",), choice_names=("a", "b"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (("unknown", None, np.inf, 0.5), {"status": "unknown", "objective": None, "lower_bound": 0.5, "gap": None}),
        (("unknown", None, np.inf, -np.inf), {"status": "unknown", "lower_bound": None}),
        (("infeasible", None, np.inf, np.inf), {"status": "infeasible", "lower_bound": None, "gap": None}),
        (("feasible", [1], 1.0, -np.inf), {"objective": 1.0, "lower_bound": None, "gap": None, "within_caps": True}),
        (("feasible", [1], 1.0, 0.75), {"objective": 1.0, "lower_bound": 0.75, "gap": 0.25, "within_caps": True}),
        ("exact crashed (exit code 7)", {"status": "failed", "remark": "exact crashed (exit code 7)"}),
        ("solver 'exact' can't", {"status": "refused", "remark": "solver 'exact' can't", "lower_bound": None}),
    ],
)
def test_a_row_says_what_came_out(monkeypatch, done, expected) -> None:
    if isinstance(done, str):
        found = Isolated(None, done, 1.0, 0.0, 0, refused="can't" in done)
    else:
        status, columns, objective, bound = done
        plan = None if columns is None else np.array(columns)
        solution = Solution(plan, objective, bound, Status(status), Limit.NONE, "exact", 1.0)
        found = Isolated(solution, "", 1.0, 0.5, 10**8)
    monkeypatch.setattr(module, "solve_isolated", lambda *_, **__: found)
    built = SimpleNamespace(budgets=[SimpleNamespace(text="memory=3B")])
    row = Trial(SimpleNamespace(built=built, problem=PROBLEM), "exact").run()
    assert row.budgets == "memory=3B" and {name: getattr(row, name) for name in expected} == expected


def test_a_backend_that_is_not_installed_is_a_row() -> None:
    built = SimpleNamespace(budgets=[SimpleNamespace(text="memory=3B")])
    row = Trial(SimpleNamespace(built=built, problem=PROBLEM), "exact", ("moon",)).run()
    assert (row.status, row.remark, row.seconds) == ("unavailable", "pip install moon", None)


def test_wrong_bounds_are_no_reference() -> None:
    assert _reference(ROWS) == (1.0, "bound")
    assert _reference([*ROWS[1:3], Comparison("b", "no plan", "unknown", lower_bound=0.9)]) == (0.9, "bound")
    assert _reference(ROWS[1:3]) == (1.1, "plan")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_charts_are_written_and_the_same_twice(tmp_path, suffix) -> None:
    frame = {"label": "", "bits_per_weight": 3.0, "memory_bytes": 1e6, "loss": 0.1, "price": 1.0}
    names = ("frontier", "exact", "feasible", "uniform", "ideal", "plan")
    table = pd.DataFrame([frame | {"series": name, "label": name} for name in names])
    for attempt in ("one", "two"):
        frontier_chart(table, tmp_path / f"{attempt}.{suffix}", "title")
        comparison_chart(ROWS, tmp_path / f"{attempt}-compare.{suffix}", "title")
    for name in ("", "-compare"):
        first = (tmp_path / f"one{name}.{suffix}").read_bytes()
        assert len(first) > 5000 and first == (tmp_path / f"two{name}.{suffix}").read_bytes()
    if suffix == "svg":
        assert "wrong bound" in (tmp_path / "one-compare.svg").read_text().replace("<!-- ", "").replace(" -->", "")
        legend = (tmp_path / "one.svg").read_text()
        assert "proven optimum at a budget" in legend and "best found at a budget" in legend


def test_what_a_chart_needs_is_said(tmp_path, monkeypatch) -> None:
    with pytest.raises(ChartError, match=r"expected a chart's name to end in \.png"):
        comparison_chart(ROWS, tmp_path / "chart.txt", "title")
    with pytest.raises(ChartError, match="does not exist"):
        check_chart(tmp_path / "none" / "chart.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ChartError, match=r"pip install 'msq\[report\]'"):
        comparison_chart(ROWS, tmp_path / "chart.png", "title")
    assert not list(tmp_path.iterdir())
