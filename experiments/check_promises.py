"""Whether the planner's promises hold on a real model: bytes, mixed against uniform, promised against measured KL.

    python -m msq.experiments.check_promises --out results.csv

For the embedded model (or `--model`): plan `--budget` with the best uniform scheme and as a mix, build both and measure
their KL to the original; then quantize single layers of the original, each in several ways, and correlate the promised
loss a_l * err with the measured KL. The text is Python's help topics unless `--text` is given.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..kernels.quantize import dequantize, quantize
from ..kernels.rotation import input_seed
from ..planner.budget import parse_budgets
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.solve import make_plan
from ..profiles.blockwise import BlockwiseModel
from ..profiles.inventory import inventory
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, load_tokenizer, token_windows
from ..profiles.options import parse_palette
from ..profiles.quantizer_errors import read_weight
from ..profiles.schema import MANIFEST_FILE
from ..profiles.tables import Profile, load_profile
from .demo import help_text_windows
from .evaluate import evaluate

_SWAP_BITS = (2.0, 3.0)
"""Rates of the single-layer swaps: of each, the first quantizer of the palette that has it."""


@contextmanager
def swapped(layer: nn.Linear, values: Tensor) -> Iterator[None]:
    """Other weights for a layer inside a `with` block."""
    original = layer.weight.data
    layer.weight.data = values.to(original.dtype)
    try:
        yield
    finally:
        layer.weight.data = original


def single_layer_swaps(model: nn.Module, directory: Path, profile: Profile, windows: Tensor) -> list[dict[str, object]]:
    """Promised loss and measured KL of quantizing one layer at a time, other layers untouched."""
    blockwise = BlockwiseModel(model)
    recording = blockwise.record(windows)
    labels = [
        next(label for label in profile.labels if profile.spec(label).bits == bits)
        for bits in _SWAP_BITS
        if any(profile.spec(label).bits == bits for label in profile.labels)
    ]
    seed = profile.manifest.loss.seed or 0
    sensitivity = dict(zip(profile.layers["layer"], profile.layers["sensitivity"], strict=True))
    assert profile.errors is not None
    error = {(row.layer, row.quantizer): row.error for row in profile.errors.itertuples()}
    rows: list[dict[str, object]] = []
    for layer in inventory(directory).layers:
        weight = read_weight(directory, layer)
        for label in labels:
            quantized = quantize(weight, profile.spec(label), rotation_seed=input_seed(layer.fusion_group, seed))
            with swapped(cast(nn.Linear, model.get_submodule(layer.name)), dequantize(quantized)):
                changed = blockwise.resume(recording, layer.block)
            measured = float(blockwise.kl_per_window(recording, changed).mean())
            promised = sensitivity[layer.name] * error[layer.name, label]
            rows.append({"layer": layer.name, "quantizer": label, "promised": promised, "measured_kl": measured})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--profile", type=Path, help="use this profile; else one is made with --palette")
    parser.add_argument("--palette", default="tcq-*,half-tcq-*,nuq-*")
    parser.add_argument("--state-bits", type=int, default=12)
    parser.add_argument("--budget", default="memory=3.0bpw")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        profile = _profile(arguments, directory, Path(scratch) / "profile")
        model = load_model(directory, choose_device("cpu"))
        windows = (
            help_text_windows(load_tokenizer(directory), 512, arguments.windows)
            if arguments.text is None
            else token_windows(directory, arguments.text, 512, arguments.windows)
        )
        results: list[tuple[str, object]] = _facts(arguments, windows)
        kl = {}
        for solver in ("uniform", "scip"):
            plan = make_plan(profile, parse_budgets([arguments.budget]), solver=solver)
            applied = apply_plan(directory, plan, Path(scratch) / solver)
            measured = evaluate(load_checkpoint(Path(scratch) / solver), windows, reference=model)
            kl[solver] = measured.kl or 0.0
            stored = applied.memory_bytes
            results += [
                (f"{solver}: quantizers", " ".join(sorted(plan.quantizers))),
                (f"{solver}: promised bytes", plan.promised.memory_bytes),
                (f"{solver}: bytes on disk", stored),
                (f"{solver}: promised loss", plan.promised.loss),
                (f"{solver}: measured KL", measured.kl),
                (f"{solver}: perplexity", measured.perplexity),
            ]
        results.append(("KL of the plan over KL of the best uniform scheme", kl["scip"] / kl["uniform"]))
        swaps = single_layer_swaps(model, directory, profile, windows)
        correlation = spearmanr([row["promised"] for row in swaps], [row["measured_kl"] for row in swaps]).statistic
        results += [("single-layer swaps", len(swaps)), ("Spearman of promised and measured KL", float(correlation))]
    with arguments.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["fact", "value"])
        table.writerows(results)
        table.writerows(
            [f"swap {r['layer']} {r['quantizer']}", f"{r['promised']:.6g} {r['measured_kl']:.6g}"] for r in swaps
        )
    for name, value in results:
        print(f"{name}: {value}")


def _profile(arguments: argparse.Namespace, directory: Path, scratch: Path) -> Profile:
    if arguments.profile is not None and (arguments.profile / MANIFEST_FILE).exists():
        return load_profile(arguments.profile)
    settings = ProfileSettings(specs=parse_palette(arguments.palette, arguments.state_bits), batch_sizes=())
    return run_profile(directory, arguments.profile or scratch, settings, name=arguments.model)


def _facts(arguments: argparse.Namespace, windows: Tensor) -> list[tuple[str, object]]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    text = "pydoc_data.topics" if arguments.text is None else arguments.text.name
    return [
        ("model", arguments.model),
        ("budget", arguments.budget),
        ("text", f"{text}, {windows.numel()} tokens"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("commit", commit.stdout.strip() or "not in a git checkout"),
    ]


if __name__ == "__main__":
    main()
