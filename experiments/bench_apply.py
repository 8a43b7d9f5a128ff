"""Time and memory of `msq apply` on models of random weights, whatever their size.

    python -m msq.experiments.bench_apply --model ref-tiny-3m --blocks 4 16 64 --state-bits 12 --out apply.csv
    python -m msq.experiments.bench_apply --model llama-3.1-8b --blocks 2 32 --device cuda --out apply.csv

Each size is written shard by shard, planned with made-up sensitivities and applied by a process of its own, so that its
peak memory is that of its size: resident (with what is mapped of the weights files), and on a GPU what torch allocated
and reserved, and what the whole device had in use at the end (the CUDA context too, and other processes).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..planner.budget import parse_budgets
from ..planner.executor.apply import apply_plan
from ..planner.plan import load_plan, save_plan
from ..planner.solve import find_plan
from ..profiles.device import describe_device
from ..profiles.engines import Engine
from ..profiles.frames import layer_table, model_part, quantizer_table
from ..profiles.inventory import inventory
from ..profiles.models import choose_device
from ..profiles.options import parse_palette
from ..profiles.quantizer_errors import measured_gaussian_error
from ..profiles.schema import LossMethod, LossPart, ProfileManifest
from ..profiles.sensitivity import Sensitivity
from ..profiles.shipped import resolve_config
from ..profiles.tables import save_profile
from .random_weights import write_random_model
from .records import environment, write_csv

_MIB = 1 << 20
_TIDY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give back what is freed, so that a peak tells what is in use and not how the heap is cut up."""


def make_plan(model: Path, home: Path, arguments: argparse.Namespace) -> None:
    """Save a plan for sensitivities drawn from a seed, with the errors that quantizers have on N(0,1)."""
    info = inventory(model)
    drawn = np.random.default_rng(0).lognormal(size=len(info.layers))
    sensitivities = {layer.name: Sensitivity(float(a), 0.0) for layer, a in zip(info.layers, drawn, strict=True)}
    specs = parse_palette(arguments.palette, arguments.state_bits)
    errors = [
        (
            layer.name,
            spec.label,
            measured_gaussian_error(spec, 0),
            spec.size_bytes(layer.out_features, layer.in_features),
        )
        for layer in info.layers
        for spec in specs
    ]
    profile = save_profile(
        home / "profile",
        ProfileManifest(
            model=model_part(info, None),
            device=describe_device(choose_device("cpu")),
            loss=LossPart(method=LossMethod.DATA_FREE_KL, error="measured", tokens=1, noise=0.1, seed=0),
        ),
        layer_table(info.layers, sensitivities),
        quantizer_table(specs, 0),
        errors=pd.DataFrame(errors, columns=["layer", "quantizer", "error", "size_bytes"]),
    )
    save_plan(find_plan(profile, parse_budgets([arguments.budget]), solver="exact").plan, home / "plan.yaml")


def apply_alone(home: Path, device: str, workers: int) -> dict[str, object]:
    """Apply the plan in `home`; what it took, measured in this process."""
    begun = time.perf_counter()
    applied = apply_plan(
        home / "model",
        load_plan(home / "plan.yaml"),
        home / "checkpoint",
        device=device,
        engine=Engine(workers=workers),
    )
    seconds = time.perf_counter() - begun
    weights = inventory(home / "model").planned_parameters
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    row: dict[str, object] = {
        "weights": weights,
        "packed_bytes": applied.memory_bytes,
        "promised_bytes": load_plan(home / "plan.yaml").promised.memory_bytes,
        "apply_seconds": round(seconds, 1),
        "million_weights_per_second": round(weights / seconds / 1e6, 2),
        "peak_resident_mib": max(used) >> 10,  # Linux counts in KiB
    }
    if device.startswith("cuda") and workers == 1:
        free, total = torch.cuda.mem_get_info()
        row |= {
            "peak_gpu_allocated_mib": torch.cuda.max_memory_allocated() // _MIB,
            "peak_gpu_reserved_mib": torch.cuda.max_memory_reserved() // _MIB,
            "gpu_in_use_mib": (total - free) // _MIB,
        }
    return row


def measure(arguments: argparse.Namespace, blocks: int, home: Path) -> dict[str, object]:
    """One size: write, plan, apply in a process of its own."""
    begun = time.perf_counter()
    config, shard_bytes = resolve_config(arguments.model), arguments.shard_mib * _MIB
    size = write_random_model(config, home / "model", blocks, device=arguments.device, shard_bytes=shard_bytes)
    written = time.perf_counter()
    make_plan(home / "model", home, arguments)
    command = [sys.executable, "-m", __spec__.name, "--alone", str(home)]
    command += ["--device", arguments.device, "--workers", str(arguments.workers)]
    if arguments.device.startswith("cuda"):
        torch.cuda.empty_cache()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | _TIDY_HEAP)
    row: dict[str, Any] = {"model": arguments.model, "blocks": blocks, "budget": arguments.budget}
    row |= {"workers": arguments.workers, "model_mib": size // _MIB, "write_model_seconds": round(written - begun, 1)}
    row |= json.loads(done.stdout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m", help="shapes: a config.json or a name that msq ships")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--palette", default="tcq-*,half-tcq-*")
    parser.add_argument("--state-bits", type=int, default=16)
    parser.add_argument("--budget", default="memory=3.25bpw")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard-mib", type=int, default=4096, help="size of the model's weights files")
    parser.add_argument("--directory", type=Path, help="where to work; needs the model's size and half of it")
    parser.add_argument("--commit", help="commit to record; default: that of this checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        print(json.dumps(apply_alone(arguments.alone, arguments.device, arguments.workers)))
        return
    facts = environment(arguments.device, arguments.commit)
    rows: list[dict[str, object]] = []
    for blocks in arguments.blocks:
        home = Path(tempfile.mkdtemp(dir=arguments.directory))
        try:
            rows.append(measure(arguments, blocks, home) | facts)
        finally:
            shutil.rmtree(home)
        print(rows[-1], flush=True)
        if arguments.out is not None:
            write_csv(arguments.out, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
