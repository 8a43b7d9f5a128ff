"""Latency profiles of this GPU for the models whose shapes ship with msq, as they are shipped in `profiles/gpus`.

    python -m msq.experiments.profile_gpu --out gpus/h200               all models, minutes
    python -m msq.experiments.profile_gpu --out out --models llama-3.1-8b --quantizers "nuq-3,tcq-3"

Models that are finished already are left alone, and an interrupted one goes on from its journal. The table printed last
has the time of a decoder block's four fused products for a few quantizers, and what a step takes beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..planner.executor.overhead import ExecutorOverhead
from ..profiles.latency_job import LatencySettings, run_latency_profile
from ..profiles.options import parse_batch_sizes, parse_palette
from ..profiles.schema import HEAD, MANIFEST_FILE
from ..profiles.shipped import resolve_config
from ..profiles.tables import Profile, load_profile

MODELS = "llama-3.1-8b,qwen2.5-7b,llama-3.2-1b,llama-3.1-70b"
_BLOCK = ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj")
_SHOWN = ("nuq-2", "nuq-3", "nuq-4", "vq-3", "int-4", "tcq-2", "tcq-3", "tcq-4", "half-tcq-3.25")


def summary(name: str, profile: Profile, seconds: float) -> Table:
    """Times of a block by quantizer and batch size, µs."""
    part = profile.manifest.latency
    assert part is not None and profile.latency is not None
    table = Table(title=f"{name} on {profile.manifest.device.name}, {seconds:.0f} s", title_justify="left", box=None)
    columns = ("batch", "quantizer", *_BLOCK, "block", HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    fastest = profile.latency.groupby(["batch_size", "quantizer", "pattern"])["latency_us"].min().to_dict()
    for batch in profile.batch_sizes:
        for label in [label for label in _SHOWN if label in profile.labels]:
            times = [fastest.get((batch, label, pattern)) for pattern in (*_BLOCK, HEAD)]
            shown = ["-" if us is None else f"{us:.2f}" for us in times]
            known = [us for us in times[:-1] if us is not None]
            block = f"{sum(known):.2f}" if len(known) == len(_BLOCK) else "-"
            table.add_row(str(batch), label, *shown[:-1], block, shown[-1])
    lines = []
    for batch in profile.batch_sizes:
        head = "" if part.head_us is None else f", an unquantized head {part.head_us[batch]:.0f} us"
        lines.append(f"overhead at batch {batch}: {part.overhead_us[batch]:.0f} us{head}")
    marked = int(profile.latency["throttled"].sum()) if "throttled" in profile.latency else 0
    details = profile.manifest.device.details
    clocks = ", ".join(f"{key} {value}" for key, value in details.items() if "clock" in key or "temperature" in key)
    lines.append(f"{len(profile.latency)} rows, {marked} throttled; {clocks or 'clocks unknown'}")
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for a profile of each model")
    parser.add_argument("--models", default=MODELS, help="comma-separated, most important first")
    parser.add_argument("--quantizers", help="globs of labels; default: all")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--overhead", choices=("executor", "stock"), default="executor", help="whose decoding step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further model after this long")
    arguments = parser.parse_args()
    settings = LatencySettings(
        specs=parse_palette(arguments.quantizers, 16),
        batch_sizes=parse_batch_sizes(arguments.batch_sizes),
        context=arguments.context,
        device=arguments.device,
    )
    console = Console(width=140)
    begun = time.perf_counter()
    tables, failed = [], []
    for name in arguments.models.split(","):
        started, out = time.perf_counter(), arguments.out / name
        if (out / MANIFEST_FILE).exists():
            profile = load_profile(out)
        elif started - begun > arguments.seconds:
            console.print(f"no time left for {name}")
            continue
        else:
            overhead = None if arguments.overhead == "stock" else ExecutorOverhead()
            try:
                profile = run_latency_profile(resolve_config(name), out, settings, overhead=overhead)
            except Exception as cause:  # the other models are worth measuring; finished rows are in the journal
                console.print(f"{name} failed ({type(cause).__name__}: {cause}); run again to go on from {out}")
                failed.append(name)
                continue
        tables.append(summary(name, profile, time.perf_counter() - started))
    for table in tables:
        console.print(table)
    console.print(f"{time.perf_counter() - begun:.0f} s in all; profiles in {arguments.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
