"""The paper's first figure from measured steps: throughput, bits, predicted loss, and a map of the mixed plan.

    python -m msq.experiments.figure1 --plans plans --decode decode.csv --profile joined --out results/figure1.csv

`--plans` is what `figure_plans` wrote, `--decode` what `bench_decode` measured of these plans (several files add up),
`--profile` what the plans were made from. The table has a row for every scheme and batch size: `promised_us` is the
plan's own figure, `calibrated_us` that of the profile with its two terms fitted to these runs (`planner.calibrate`). A
chart goes beside the table, as SVG.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..planner.calibrate import Run, Step, fit
from ..planner.plan import Plan, load_plan
from ..profiles.tables import load_profile
from .bench_decode import FP16_COMPILED
from .charts import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIXED = "msq"
_FEWEST, _MOST = 1.5, 6.0
"""Bits at the ends of the map's colours."""


def measured_runs(plans: Path, decode: pd.DataFrame) -> dict[str, Run]:
    """The measured plans, by the names that `figure_plans` gave them, in its order."""
    runs = {}
    for name, file in pd.read_csv(plans / "plans.csv")[["row", "file"]].itertuples(index=False):
        rows = decode[[Path(row).name == file for row in decode["row"]]]
        if len(rows):
            steps = tuple(Step(batch_size=b, step_us=us) for b, us in rows[["batch_size", "step_us"]].to_numpy())
            context = int(rows["context"].iloc[0])
            run = {
                "device": rows["device"].iloc[0],
                "context": context,
                "plan": load_plan(plans / file),
                "steps": steps,
            }
            runs[name] = Run.model_validate(run)
    return runs


def figure_table(plans: Path, decode: pd.DataFrame, profile_dir: Path) -> tuple[pd.DataFrame, dict[str, Run]]:
    """A row for every scheme and batch size, fp16 first."""
    profile = load_profile(profile_dir)
    runs = measured_runs(plans, decode)
    _, steps = fit(profile, list(runs.values()))
    names = list(runs)
    fp16 = decode[decode["row"] == FP16_COMPILED].set_index("batch_size")["step_us"].to_dict()
    facts = decode[["device", "driver", "torch", "commit"]].iloc[0].to_dict()
    rows: list[dict[str, Any]] = [
        {"row": FP16_COMPILED, "batch_size": batch, "bits_per_weight": 16.0, "step_us": us}
        for batch, us in fp16.items()
    ]
    for step in steps:
        promised = runs[names[step.run]].plan.promised
        rows.append(
            {
                "row": names[step.run],
                "batch_size": step.batch_size,
                "bits_per_weight": round(promised.bits_per_weight, 4),
                "predicted_loss": promised.loss,
                "products": len({entry.pattern for entry in runs[names[step.run]].plan.layers}),
                "step_us": step.measured_us,
                "promised_us": round(step.promised_us, 1),
                "calibrated_us": round(step.calibrated_us, 1),
            }
        )
    table = pd.DataFrame(rows)
    table["tokens_per_second"] = (1e6 * table["batch_size"] / table["step_us"]).round(1)
    table["times_fp16"] = (table["batch_size"].map(fp16) / table["step_us"]).round(3)
    table["promise_error"] = (table["promised_us"] / table["step_us"] - 1).round(4)
    table["calibrated_error"] = (table["calibrated_us"] / table["step_us"] - 1).round(4)
    for name, value in facts.items():
        table[name] = value
    return table, runs


def draw(table: pd.DataFrame, plan: Plan, path: Path) -> None:
    """Bars of throughput at every batch size, and the map of a plan."""
    batches = sorted(table["batch_size"].unique())
    figure, panels = new_figure(len(batches) + 1)
    for axes, batch in zip(panels, batches, strict=False):
        _bars(axes, table[table["batch_size"] == batch], f"batch {batch}")
    _map(panels[-1], plan)
    figure.suptitle(f"{plan.model.name} shapes on {table['device'].iloc[0]}, random weights", fontsize=9)
    save_figure(figure, path)


def _bars(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    bars = axes.barh(rows["row"], rows["tokens_per_second"], color="tab:blue")
    texts = []
    for speed, bits, loss in rows[["tokens_per_second", "bits_per_weight", "predicted_loss"]].to_numpy(float):
        texts.append(f" {speed:.0f} ({bits:.2f} bits{'' if math.isnan(loss) else f', loss {loss:.3f}'})")
    axes.bar_label(bars, texts, fontsize=6)
    axes.set_xlim(0, float(rows["tokens_per_second"].max()) * 1.9)
    axes.set(xlabel="tokens per second", title=title)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)


def _map(axes: Axes, plan: Plan) -> None:
    """Blocks down, layers across: bits as colour, the family's first letter in the cell, fused layers underlined."""
    inside = [entry for entry in plan.layers if any(part.isdigit() for part in entry.layer.split("."))]
    outside = [entry for entry in plan.layers if entry not in inside]
    roles = list(dict.fromkeys(entry.layer.rpartition(".")[2] for entry in inside))
    blocks = plan.model.blocks
    bits = [[float("nan")] * len(roles) for _ in range(blocks)]
    for entry in inside:
        block = int(next(part for part in entry.layer.split(".") if part.isdigit()))
        column, quantizer = roles.index(entry.layer.rpartition(".")[2]), plan.quantizers[entry.quantizer]
        bits[block][column] = quantizer.bits
        letter = f"{quantizer.family[0]}{quantizer.bits:g}" + ("+" if entry.layer != entry.pattern[0] else "")
        axes.text(column, block, letter, ha="center", va="center", fontsize=4.5)
    image = axes.imshow(bits, cmap="coolwarm", vmin=_FEWEST, vmax=_MOST, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="bits")
    axes.set_xticks(range(len(roles)), [role.removesuffix("_proj") for role in roles], fontsize=7)
    axes.set_ylabel("block")
    rest = "".join(f", {entry.layer} {entry.quantizer}" for entry in outside)
    axes.set_title(f"{_MIXED}: family and bits, + joined to its left{rest}", fontsize=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True, help="directory of figure_plans")
    parser.add_argument("--decode", type=Path, nargs="+", required=True, help="tables of bench_decode")
    parser.add_argument("--profile", type=Path, required=True, help="that the plans were made from")
    parser.add_argument("--out", type=Path, required=True, help="CSV; the chart goes beside it as SVG")
    chosen = parser.parse_args(arguments)
    decode = pd.concat([pd.read_csv(path, dtype={"commit": str}) for path in chosen.decode], ignore_index=True)
    table, runs = figure_table(chosen.plans, decode, chosen.profile)
    table.to_csv(chosen.out, index=False, lineterminator="\n")
    draw(table, runs[_MIXED].plan, chosen.out.with_suffix(".svg"))
    print(table.drop(columns=["device", "driver", "torch", "commit"]).to_string(index=False))


if __name__ == "__main__":
    main()
