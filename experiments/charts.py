"""Charts of frontiers and comparisons, as PNG or SVG, with matplotlib (extra ``report``)."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ..profiles.files import check_writable, write_atomic
from ..solvers.base import CONTRADICTION_TOLERANCE
from .compare import Comparison
from .errors import ChartError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = ("png", "svg", "pdf")
_AXES = {
    "memory_bytes": ("bits_per_weight", "bits per weight"),
    "latency_us": ("latency_us", "latency of a decoding step (µs)"),
}
_LEAST_GAP = 1e-10
"""Where gaps of proven optima are drawn."""


def check_chart(path: Path) -> None:
    """Refuses a chart that can't be drawn, before hours are spent on its data.

    Raises:
        ChartError: the file can't be written, matplotlib is missing, or the name doesn't end as a known format.
    """
    check_writable(path, ChartError)
    if path.suffix.lstrip(".").lower() not in _FORMATS:
        raise ChartError(f"{path}: expected a chart's name to end in .{', .'.join(_FORMATS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as cause:
        raise ChartError("charts need matplotlib, which is not installed; pip install 'msq[report]'.") from cause


def frontier_chart(table: pd.DataFrame, path: Path, title: str) -> None:
    """Loss against memory or latency, from `frontier_table`.

    Raises:
        ChartError: see `check_chart`, or the file can't be written.
    """
    check_chart(path)
    use = next(name for name in _AXES if name in table)
    column, label = _AXES[use]
    figure, (axes,) = new_figure(1)
    for series, part in table.groupby("series", sort=False):
        x, y = part[column], part["loss"]
        if series == "frontier":
            axes.plot(x, y, color="black", linewidth=1.2, label=f"mixed schemes ({len(part)} break points)")
        elif series == "ideal":
            axes.plot(x, y, color="grey", linestyle=":", label="ideal Gaussian quantizers (water-filling)")
        elif series == "uniform":
            axes.plot(x, y, "o", color="tab:orange", markersize=3, label="one quantizer everywhere")
        elif series == "exact":
            axes.plot(x, y, "D", color="tab:green", markersize=5, label="proven optimum at a budget")
        elif series == "feasible":
            axes.plot(x, y, "D", color="tab:green", markersize=5, fillstyle="none", label="best found at a budget")
        else:
            axes.plot(x, y, "*", color="tab:red", markersize=13, label=f"plan {', '.join(part['label'])}")
    axes.set(xlabel=label, ylabel="predicted loss", yscale="log", title=title)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def comparison_chart(rows: Sequence[Comparison], path: Path, title: str) -> None:
    """Gap against time of every solver, a panel for every problem.

    A plan's gap is its distance to the best bound of all, or to the best plan where there is no bound. Bounds above a
    plan that the checker accepts are wrong and left out.

    Raises:
        ChartError: see `check_chart`, or the file can't be written.
    """
    check_chart(path)
    problems = list(dict.fromkeys(row.budgets for row in rows))
    figure, panels = new_figure(len(problems))
    seconds = [row.seconds for row in rows if row.seconds]
    span = (min(seconds, default=0.1) / 2, max(seconds, default=10.0) * 5)
    for budgets, axes in zip(problems, panels, strict=True):
        own = [row for row in rows if row.budgets == budgets]
        reference, kind = _reference(own)
        for row in own:
            if row.objective is None or row.seconds is None or not row.objective:
                continue
            gap = max(1 - reference / row.objective, _LEAST_GAP)
            (point,) = axes.plot(row.seconds, gap, "o" if row.gap is not None else "x", markersize=6)
            axes.annotate(
                row.solver, (row.seconds, gap), xytext=(4, 4), textcoords="offset points", fontsize=7,
                color=point.get_color(),
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=span, ylim=(_LEAST_GAP / 2, 2), title=budgets)
        axes.set(xlabel="seconds", ylabel=f"distance to the best {kind}, relative")
        axes.grid(visible=True, which="major", linewidth=0.3)
    figure.suptitle(f"{title} (circles: with a bound, crosses: without)", fontsize=9)
    save_figure(figure, path)


def _reference(rows: Sequence[Comparison]) -> tuple[float, str]:
    """The loss that plans of one problem are measured against, and what it is: "bound" or "plan"."""
    best = min((row.objective for row in rows if row.objective is not None and row.within_caps), default=float("inf"))
    credible = best + CONTRADICTION_TOLERANCE * abs(best)
    bounds = [row.lower_bound for row in rows if row.lower_bound is not None and row.lower_bound <= credible]
    return (max(bounds), "bound") if bounds else (best, "plan")


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure without any window system, and its panels side by side, three in a row."""
    from matplotlib.figure import Figure

    width = min(panels, 3)
    height = -(-panels // width)
    figure = Figure(figsize=(6.4 if panels == 1 else 4.8 * width, 4.4 * height), layout="constrained")
    axes = list(figure.subplots(height, width, squeeze=False).ravel())
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def save_figure(figure: Figure, path: Path) -> None:
    """Write whole or not at all; the same data gives the same bytes."""
    import matplotlib as mpl

    suffix = path.suffix.lstrip(".").lower()
    buffer = BytesIO()
    dated = {"svg": "Date", "pdf": "CreationDate"}
    metadata = {dated[suffix]: None} if suffix in dated else None
    with mpl.rc_context({"svg.hashsalt": "msq"}):
        figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue(), ChartError)
