"""The main job end to end on the embedded model, in minutes on two cores: profile, plan, apply, evaluate.

Three models are compared: the original, the best uniform scheme that fits 3 bits per weight, and the mixed-scheme plan
that may use no byte more than that uniform scheme does. The text is Python's own help (`pydoc_data.topics`), so nothing
is downloaded. Trellises have a state of 12 bits instead of 16, which encodes 16 times faster on a CPU at a little more
distortion; the palette is the trellis-coded and scalar families up to 4 and 5 bits.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..planner.budget import parse_budgets
from ..planner.errors import PlanError
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.plan import Plan, save_plan
from ..planner.solve import find_plan
from ..profiles.engines import Engine
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, load_tokenizer, windows_of
from ..profiles.options import parse_palette
from ..profiles.schema import MANIFEST_FILE
from ..profiles.tables import Profile, load_profile
from .evaluate import Evaluation, evaluate
from .plan_map import plan_map

MODEL = "ref-tiny-3m"
PALETTE = "tcq-[123]*,tcq-4,half-tcq-[23]*,nuq-[2345]"
STATE_BITS = 12
BUDGET = "memory=3.0bpw"
TOKENS = 8192
"""Tokens that the sensitivities see."""
_WINDOW, _WINDOWS = 512, 48


@dataclass(frozen=True)
class DemoRow:
    """One model of the comparison; byte counts are of the planned layers."""

    name: str
    bits_per_weight: float
    promised_bytes: int | None
    stored_bytes: int
    promised_loss: float | None
    evaluation: Evaluation


def help_text_windows(tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Python's help topics as windows of tokens, ``(windows, length)``."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return windows_of(tokenizer, text, length, limit, "pydoc_data.topics")


def run_demo(out: Path) -> list[DemoRow]:
    """Run the job, print what it finds, and leave profile, plans and checkpoints in `out`.

    Raises:
        PlanError: `out` holds checkpoints of an earlier demo, or another profile.
    """
    if (out / "msq").exists() or (out / "uniform").exists():
        raise PlanError(f"{out} holds checkpoints of an earlier demo; remove it or choose another --out.")
    begun = time.perf_counter()
    console = Console()
    directory = resolve_model(MODEL)
    console.print(
        f"{MODEL}: palette {PALETTE}, trellis state of {STATE_BITS} bits (16 is the default; 12 encodes faster)"
    )
    profile = _profile(directory, out / "profile")
    uniform = find_plan(profile, parse_budgets([BUDGET]), solver="uniform").plan
    same_bytes = parse_budgets([f"memory={uniform.promised.memory_bytes}B"])
    mixed = find_plan(profile, same_bytes).plan
    reference = load_model(directory, choose_device("cpu"))
    windows = help_text_windows(load_tokenizer(directory), _WINDOW, _WINDOWS)
    weights = int(profile.layer_weights.sum())
    original = evaluate(reference, windows, reference=reference)
    rows = [DemoRow("fp16 original", 16.0, None, 2 * weights, None, original)]
    for name, found in (("uniform", uniform), ("msq", mixed)):
        save_plan(found, out / f"{name}.yaml")
        applied = apply_plan(directory, found, out / name)
        result = evaluate(load_checkpoint(out / name), windows, reference=reference)
        shown = f"uniform {found.layers[0].quantizer}" if name == "uniform" else "msq plan"
        promised = found.promised
        rows.append(
            DemoRow(shown, promised.bits_per_weight, promised.memory_bytes, applied.memory_bytes, promised.loss, result)
        )
    _report(console, rows, mixed, windows)
    console.print(
        f"profile, plans and checkpoints are in {out}; {time.perf_counter() - begun:.0f} s in all.\n"
        f'next: msq generate {out / "msq"} --prompt "The"'
    )
    return rows


def _profile(directory: Path, out: Path) -> Profile:
    """Measure, or load what an earlier run has measured."""
    settings = ProfileSettings(specs=parse_palette(PALETTE, STATE_BITS), tokens=TOKENS)
    if (out / MANIFEST_FILE).exists():
        found = load_profile(out)
        specs = {found.spec(label) for label in found.labels}
        if specs != set(settings.specs) or found.manifest.model.name != MODEL:
            raise PlanError(f"{out} is not the demo's profile; remove it or choose another --out.")
        return found
    return run_profile(directory, out, settings, name=MODEL, engine=Engine())  # a process for each core


def _report(console: Console, rows: list[DemoRow], plan: Plan, windows: Tensor) -> None:
    console.print(plan_map(plan))
    table = Table(box=None, title_justify="left", title=f"\n{MODEL} on {windows.numel()} tokens of pydoc_data.topics")
    table.add_column("model", no_wrap=True)
    for heading in ("bits", "promised bytes", "on disk", "KL", "perplexity"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.3f}",
            "-" if row.promised_bytes is None else str(row.promised_bytes),
            str(row.stored_bytes),
            f"{row.evaluation.kl:.4f}",
            f"{row.evaluation.perplexity:.2f}",
        )
    console.print(table)
    uniform, mixed = rows[1].evaluation.kl, rows[2].evaluation.kl
    if uniform and mixed is not None:
        console.print(
            f"KL of the msq plan is {mixed / uniform:.2f} of the uniform scheme's (Python {platform.python_version()})"
        )
