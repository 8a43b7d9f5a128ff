"""Ways to build the same plan: encoded alone, under Hessians of several sources of tokens, tuned after encoding.

    python -m msq.experiments.compare_hessians --text calibration.txt --measure test.txt --out hessians.csv

For each budget: the best uniform scheme and the plan, each built in every way of `--builds`. A build is a source of
tokens for the Hessians and perhaps what is tuned: `plain` (no Hessians), `random`, `self` (what the model writes),
`text` (`--text`), `self+blocks`. Only `text` sees data. Plans come from the profiles of `--profile-kinds`:
sensitivities on random tokens with errors of the weights (`weights`), on what the model writes (`self`), or proxy
errors under Hessians of the text (`proxy`) or of what the model writes (`self-proxy`). Perplexity and KL are measured
on `--measure`.

Every row is written as soon as it is measured, and rows that are in `--out` are not measured again: an interrupted
command goes on when it is repeated. `--work DIR` keeps profiles and tokens, too. Small models leave a GPU idle:
`--processes 6` builds as many checkpoints at a time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..planner.budget import parse_budgets
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.executor.manifest import TuneMethod
from ..planner.executor.tuning import Tuning, parse_tune
from ..planner.plan import Plan
from ..planner.solve import find_plan
from ..profiles.calibration import Calibration, calibration
from ..profiles.errors import ProfileError
from ..profiles.files import write_atomic
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, token_windows
from ..profiles.options import parse_palette
from ..profiles.schema import MANIFEST_FILE, LossMethod, TokenSource
from ..profiles.tables import Profile, load_profile
from .demo import PALETTE, STATE_BITS
from .evaluate import evaluate
from .records import environment, write_csv

_WINDOW = 512
_PLAIN = "plain"
_ON_TOKENS = (TuneMethod.BLOCKS, TuneMethod.MODEL)
_KINDS = {
    "weights": (TokenSource.RANDOM, "weights"),
    "self": (TokenSource.SELF, "weights"),
    "self-proxy": (TokenSource.SELF, "proxy"),
    "proxy": (TokenSource.TEXT, "proxy"),
}
"""Source of the sensitivities and kind of errors, by name of the profile."""
_KEY = ("model", "state_bits", "noise", "tokens", "measured_on", "commit", "budget", "profile", "solver", "built")
"""What tells rows apart."""


@dataclass(frozen=True)
class Build:
    """One row: a plan and how it is built.

    Attributes:
        budget, profile, solver: which plan.
        source: of the Hessians' tokens; None for data-free without Hessians.
        tune: what is fitted after encoding.
    """

    budget: str
    profile: str
    solver: str
    source: TokenSource | None
    tune: TuneMethod | None

    @property
    def name(self) -> str:
        """As in `--builds`."""
        return f"{self.source or _PLAIN}{'' if self.tune is None else f'+{self.tune}'}"


def parse_build(text: str) -> tuple[TokenSource | None, TuneMethod | None]:
    """``plain``, ``self``, ``text+blocks``.

    Raises:
        ProfileError: an unknown source, or blocks without tokens to tune them on.
    """
    source, _, tune = text.partition("+")
    method = parse_tune(tune or "none")
    if source not in (_PLAIN, *TokenSource) or (source == _PLAIN and method in _ON_TOKENS):
        sources = ", ".join((_PLAIN, *TokenSource))
        raise ProfileError(
            f"a build is one of {sources}, perhaps with +layers, and but for {_PLAIN} +blocks or +model; got '{text}'."
        )
    return None if source == _PLAIN else TokenSource(source), method


def builds(arguments: argparse.Namespace) -> list[Build]:
    """All rows, in the order of the options; proxy errors are for builds under Hessians only."""
    found = []
    for budget, built, kind in itertools.product(arguments.budgets, arguments.builds, arguments.profile_kinds):
        source, tune = parse_build(built)
        if source is None and _KINDS[kind][1] == "proxy":
            continue
        found += [Build(budget, kind, solver, source, tune) for solver in arguments.solvers]
    return found


def measured_profile(arguments: argparse.Namespace, directory: Path, kind: str) -> Profile:
    """One of the profiles, made or found."""
    out: Path = arguments.work / f"profile-{kind}"
    if (out / MANIFEST_FILE).exists():
        return load_profile(out)
    source, error = _KINDS[kind]
    from_text = source is TokenSource.TEXT
    settings = ProfileSettings(
        specs=parse_palette(arguments.palette, arguments.state_bits),
        method=LossMethod.CALIBRATION_KL if from_text else LossMethod.DATA_FREE_KL,
        text=arguments.text if from_text else None,
        source=TokenSource.RANDOM if from_text else source,
        tokens=arguments.profile_tokens,
        noise=arguments.noise,
        batch_sizes=(),
        device=arguments.device,
        error=error,
    )
    return run_profile(directory, out, settings, name=arguments.model)


def _tokens_file(work: Path, source: TokenSource) -> Path:
    return work / f"tokens-{source}.safetensors"


def _keep_tokens(arguments: argparse.Namespace, directory: Path, source: TokenSource) -> None:
    """Write the tokens of a source to a file, for all processes."""
    path = _tokens_file(arguments.work, source)
    if path.exists():
        return
    text = arguments.text if source is TokenSource.TEXT else None
    device = choose_device(arguments.device)
    sizes = {"tokens": arguments.tokens, "window": _WINDOW, "seed": 0}
    windows = calibration(directory, text, source=source, device=device, **sizes).windows
    write_atomic(path, save({"windows": windows.contiguous()}))


@cache
def _calibration(work: Path, source: TokenSource, text: str | None) -> Calibration:
    return Calibration(load_file(_tokens_file(work, source))["windows"], source, text)


@cache
def _measured_with(directory: Path, device: str, measure: Path, windows: int | None) -> tuple[nn.Module, Tensor]:
    """The original model and the tokens to measure on; a process keeps them."""
    return load_model(directory, choose_device(device)), token_windows(directory, measure, _WINDOW, windows)


@cache
def _plan(work: Path, build: tuple[str, str, str]) -> Plan:
    kind, budget, solver = build
    return find_plan(load_profile(work / f"profile-{kind}"), parse_budgets([budget]), solver=solver).plan


def measured_row(arguments: argparse.Namespace, build: Build) -> dict[str, object]:
    """Build a plan one way and measure it; runs in a process of its own where there are several."""
    directory, device = resolve_model(arguments.model), arguments.device
    model, windows = _measured_with(directory, device, arguments.measure, arguments.windows or None)
    plan = _plan(arguments.work, (build.profile, build.budget, build.solver))
    tokens = None
    if build.source is not None:
        text = arguments.text.name if build.source is TokenSource.TEXT else None
        tokens = _calibration(arguments.work, build.source, text)
    tuning = None
    if build.tune is not None:
        tuning = Tuning(build.tune, tokens if build.tune in _ON_TOKENS else None)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "checkpoint"
        begun = time.perf_counter()
        applied = apply_plan(directory, plan, out, device=device, hessian=tokens, tuning=tuning)
        seconds = time.perf_counter() - begun
        measured = evaluate(load_checkpoint(out, device=device), windows, reference=model)
        shutil.rmtree(out)
    return {
        "budget": build.budget,
        "profile": build.profile,
        "solver": build.solver,
        "built": build.name,
        "calibration_tokens": 0 if tokens is None else tokens.windows.numel(),
        "bits_per_weight": plan.promised.bits_per_weight,
        "bytes": applied.memory_bytes,
        "promised_loss": plan.promised.loss,
        "kl": measured.kl,
        "perplexity": measured.perplexity,
        "apply_seconds": round(seconds, 1),
        "quantizers": " ".join(sorted(plan.quantizers)),
    }


def _rows(arguments: argparse.Namespace, left: list[Build]) -> Iterator[dict[str, object]]:
    """The rows of builds as they get done; a build that fails is told of, and the others go on.

    Raises:
        ProfileError: in the end, where a build failed.
    """
    failed = 0
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measured_row, arguments, build): build for build in left}
        for done in as_completed(running):
            error = done.exception()
            if error is None:
                yield done.result()
            else:
                failed += 1
                print(f"{running[done]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        raise ProfileError(f"{failed} of {len(left)} builds failed; repeat the command to try them again.")


def _known_rows(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in _KEY)


def _print(rows: list[dict[str, object]]) -> None:
    table = Table(box=None)
    for heading in ("budget", "profile", "solver", "built", "bits", "kl", "perplexity", "seconds"):
        table.add_column(heading)
    for row in rows:
        numbers = [f"{float(str(row[name])):.4f}" for name in ("bits_per_weight", "kl", "perplexity")]
        names = [str(row[name]) for name in ("budget", "profile", "solver", "built")]
        table.add_row(*names, *numbers, str(row["apply_seconds"]))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--measure", type=Path, required=True, help="text that KL and perplexity are measured on")
    parser.add_argument("--work", type=Path, help="directory to keep profiles and tokens in")
    parser.add_argument("--palette", default=PALETTE)
    parser.add_argument("--state-bits", type=int, default=STATE_BITS)
    parser.add_argument("--budgets", nargs="+", default=["memory=3.0bpw", "memory=2.0bpw"])
    parser.add_argument("--builds", nargs="+", default=[_PLAIN, "random", "self", "self+blocks", "text", "text+blocks"])
    parser.add_argument("--profile-kinds", nargs="+", default=["weights"], choices=list(_KINDS))
    parser.add_argument("--solvers", nargs="+", default=["exact", "uniform"])
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of the Hessians and of tuning")
    parser.add_argument("--profile-tokens", type=int, default=16384, help="tokens of the profiles")
    parser.add_argument("--noise", type=float, default=0.1, help="noise of the profiles' sensitivities")
    parser.add_argument("--windows", type=int, default=96, help="windows of 512 tokens to measure on; 0 for all")
    parser.add_argument("--processes", type=int, default=1, help="checkpoints that are built at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="commit to record; default: that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    wanted = builds(arguments)
    directory, device = resolve_model(arguments.model), arguments.device
    with tempfile.TemporaryDirectory() as scratch:
        arguments.work = arguments.work or Path(scratch)
        arguments.work.mkdir(parents=True, exist_ok=True)
        model, windows = _measured_with(directory, device, arguments.measure, arguments.windows or None)
        facts = {
            "noise": arguments.noise,
            "tokens": arguments.tokens,
            "model": Path(arguments.model).name,
            "state_bits": arguments.state_bits,
            "measured_on": f"{arguments.measure.name} {windows.numel()} tokens",
            "original_perplexity": evaluate(model, windows).perplexity,
        } | environment(device, arguments.commit)
        for source in sorted({build.source for build in wanted if build.source is not None}):
            _keep_tokens(arguments, directory, source)
        for kind in arguments.profile_kinds:
            measured_profile(arguments, directory, kind)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        rows = {_key(row): row for row in _known_rows(arguments.out)}

        def key(build: Build) -> tuple[str, ...]:
            plan = {"budget": build.budget, "profile": build.profile, "solver": build.solver, "built": build.name}
            return _key(plan | facts)

        order = {key(build): number for number, build in enumerate(wanted)}
        for found in _rows(arguments, [build for build in wanted if key(build) not in rows]):
            row = found | facts
            rows[_key(row)] = row
            listed = sorted(rows.values(), key=lambda each: order.get(_key(each), len(order)))
            write_csv(arguments.out, list(row), [[each.get(name) for name in row] for each in listed])
            print(
                {name: row[name] for name in ("budget", "profile", "solver", "built", "kl", "perplexity")}, flush=True
            )
    _print([rows[key] for key in order if key in rows])


if __name__ == "__main__":
    main()
