"""Data-free quantization against quantization under Hessians, at the same budgets.

    python -m msq.experiments.compare_hessians --text calibration.txt --measure test.txt --out hessians.csv

For each budget: the best uniform scheme and the plan from errors of the weights, each built data-free, under Hessians
of random tokens and under Hessians of the calibration text; and both from proxy errors, built under the latter.
Perplexity and KL are measured on `--measure`. With `--profiles DIR` the profiles are kept and found again. Small models
leave a GPU idle: `--processes 5` builds as many schemes at a time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..planner.budget import parse_budgets
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.plan import Plan
from ..planner.solve import find_plan
from ..profiles.calibration import Calibration, calibration
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, token_windows
from ..profiles.options import parse_palette
from ..profiles.schema import MANIFEST_FILE, LossMethod
from ..profiles.tables import Profile, load_profile
from .demo import PALETTE, STATE_BITS
from .evaluate import evaluate
from .records import environment, write_csv

_WINDOW = 512


def measured_profile(arguments: argparse.Namespace, directory: Path, out: Path, error: str) -> Profile:
    """The profile of one kind of error, with sensitivities on the text for proxy errors; made or found."""
    if (out / MANIFEST_FILE).exists():
        return load_profile(out)
    proxy = error == "proxy"
    settings = ProfileSettings(
        specs=parse_palette(arguments.palette, arguments.state_bits),
        method=LossMethod.CALIBRATION_KL if proxy else LossMethod.DATA_FREE_KL,
        text=arguments.text if proxy else None,
        tokens=arguments.profile_tokens,
        noise=arguments.noise,
        batch_sizes=(),
        device=arguments.device,
        error=error,
    )
    return run_profile(directory, out, settings, name=arguments.model)


@dataclass(frozen=True)
class _Scheme:
    """One plan, to be built in several ways."""

    error: str
    budget: str
    solver: str


def build(
    directory: Path, plan: Plan, out: Path, hessian: Calibration | None, windows: Tensor, model: nn.Module, device: str
) -> dict[str, object]:
    """Apply a plan one way and measure it."""
    begun = time.perf_counter()
    applied = apply_plan(directory, plan, out, device=device, hessian=hessian)
    seconds = time.perf_counter() - begun
    measured = evaluate(load_checkpoint(out, device=device), windows, reference=model)
    shutil.rmtree(out)
    source = "data-free" if hessian is None else f"hessian of {hessian.text or 'random tokens'}"
    return {
        "built": source,
        "calibration_tokens": 0 if hessian is None else hessian.windows.numel(),
        "bits_per_weight": plan.promised.bits_per_weight,
        "bytes": applied.memory_bytes,
        "promised_loss": plan.promised.loss,
        "kl": measured.kl,
        "perplexity": measured.perplexity,
        "apply_seconds": round(seconds, 1),
        "quantizers": " ".join(sorted(plan.quantizers)),
    }


def build_scheme(arguments: argparse.Namespace, home: Path, scheme: _Scheme) -> list[dict[str, object]]:
    """One scheme in all the ways it is built; a row each. Runs in a process of its own where there are several."""
    directory, device = resolve_model(arguments.model), arguments.device
    model = load_model(directory, choose_device(device))
    windows = token_windows(directory, arguments.measure, _WINDOW, arguments.windows or None)
    plan = find_plan(load_profile(home / scheme.error), parse_budgets([scheme.budget]), solver=scheme.solver).plan
    random, text = (
        calibration(directory, source, tokens=arguments.tokens, window=_WINDOW, seed=0)
        for source in (None, arguments.text)
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for hessian in (None, random, text) if scheme.error == "weights" else (text,):
            row: dict[str, object] = {"budget": scheme.budget, "errors": scheme.error, "solver": scheme.solver}
            row |= build(directory, plan, Path(scratch) / "checkpoint", hessian, windows, model, device)
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--measure", type=Path, required=True, help="text that KL and perplexity are measured on")
    parser.add_argument("--profiles", type=Path, help="directory to keep the profiles in")
    parser.add_argument("--palette", default=PALETTE)
    parser.add_argument("--state-bits", type=int, default=STATE_BITS)
    parser.add_argument("--budgets", nargs="+", default=["memory=3.0bpw", "memory=2.0bpw"])
    parser.add_argument("--errors", nargs="+", default=["weights", "proxy"], choices=["weights", "proxy"])
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of the Hessians")
    parser.add_argument("--profile-tokens", type=int, default=16384, help="tokens of the profiles")
    parser.add_argument("--noise", type=float, default=0.1, help="noise of the profiles' sensitivities")
    parser.add_argument("--windows", type=int, default=96, help="windows of 512 tokens to measure on; 0 for all")
    parser.add_argument("--processes", type=int, default=1, help="schemes that are built at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="commit to record; default: that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    directory, device = resolve_model(arguments.model), arguments.device
    windows = token_windows(directory, arguments.measure, _WINDOW, arguments.windows or None)
    original = evaluate(load_model(directory, choose_device(device)), windows)
    facts = {
        "noise": arguments.noise,
        "model": Path(arguments.model).name,
        "state_bits": arguments.state_bits,
        "measured_on": f"{arguments.measure.name}, {windows.numel()} tokens",
        "original_perplexity": original.perplexity,
    } | environment(device, arguments.commit)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = arguments.profiles or Path(scratch)
        for error in arguments.errors:
            measured_profile(arguments, directory, home / error, error)
        schemes = [
            _Scheme(*parts) for parts in itertools.product(arguments.errors, arguments.budgets, ("uniform", "exact"))
        ]
        with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for rows in pool.map(partial(build_scheme, arguments, home), schemes):
                results += [row | facts for row in rows]
                write_csv(arguments.out, list(results[0]), [list(result.values()) for result in results])


if __name__ == "__main__":
    main()
