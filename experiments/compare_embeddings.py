"""What it is worth to plan the embedding: models of the same bytes, everything in them counted.

    python -m msq.experiments.compare_embeddings --measure test.txt --out embeddings.csv        half an hour on a core

For every rate of `--rates` the blocks' layers are planned at so many bits per weight and the rest stays as it is
stored; that model's bytes are the budget of the two others: with a head of its own beside the stored embedding, and
with the embedding planned (as one layer with the head, where the two are tied). KL to the original and perplexity are
measured on `--measure`, by default on Python's own help. Profiles lie in `--profiles` and are found again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..planner.budget import parse_budgets
from ..planner.errors import InfeasibleBudgetError
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.plan import Plan
from ..planner.solve import find_plan
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, load_tokenizer, token_windows
from ..profiles.options import parse_palette
from ..profiles.schema import EMBED, HEAD, MANIFEST_FILE
from ..profiles.tables import Profile, load_profile
from .demo import help_text_windows
from .evaluate import evaluate
from .promise_check import stored_bytes
from .records import environment, write_csv

_WINDOW = 512
_PLANNED = {
    "blocks": {"head": False, "embedding": False},
    "blocks, head": {"head": True, "embedding": False},
    "blocks, embedding, head": {"head": True, "embedding": True},
}
"""Rows of a rate: what is planned."""


@dataclass(frozen=True)
class Row:
    """A model.

    Attributes:
        rate: bits per weight of the blocks' layers where nothing else is planned.
        planned: a key of `_PLANNED`.
        model_bytes: all of it: planned layers as stored, the rest as in the original.
        planned_bytes: of the planned layers, as promised and as stored.
        outside: quantizers of embedding and head, where they are planned.
        promised_loss, kl, perplexity: predicted, and measured.
    """

    rate: float
    planned: str
    model_bytes: int
    planned_bytes: int
    bits_per_weight: float
    outside: str
    promised_loss: float
    kl: float
    perplexity: float


def measured_profile(arguments: argparse.Namespace, directory: Path, planned: str) -> Profile:
    """The profile with these layers; made or found."""
    out = arguments.profiles / planned.replace(", ", "-")
    if (out / MANIFEST_FILE).exists():
        return load_profile(out)
    settings = ProfileSettings(
        specs=parse_palette(arguments.palette, arguments.state_bits),
        tokens=arguments.profile_tokens,
        batch_sizes=(),
        device=arguments.device,
        head=_PLANNED[planned]["head"],
        embedding=_PLANNED[planned]["embedding"],
    )
    return run_profile(directory, out, settings, name=arguments.model)


def measure(
    arguments: argparse.Namespace,
    directory: Path,
    profiles: dict[str, Profile],
    rate: float,
    reference: nn.Module,
    windows: Tensor,
) -> Iterator[Row]:
    """The rows of a rate; one whose layers don't fit the bytes is left out with a line that says so."""
    total = 0
    for planned, profile in profiles.items():
        rest = profile.manifest.model.unplanned_bytes
        assert rest is not None
        budget = f"memory={total - rest}B" if total else f"memory={rate}bpw"
        if total and total <= rest:
            print(f"{rate:g} bits, {planned}: the rest alone takes {rest} of {total} bytes")
            continue
        try:
            plan = find_plan(profile, parse_budgets([budget])).plan
        except InfeasibleBudgetError as cause:
            print(f"{rate:g} bits, {planned}: {cause}")
            continue
        total = total or plan.promised.memory_bytes + rest
        yield _row(arguments, directory, rate, planned, plan, rest, reference, windows)


def _row(
    arguments: argparse.Namespace,
    directory: Path,
    rate: float,
    planned: str,
    plan: Plan,
    rest: int,
    reference: nn.Module,
    windows: Tensor,
) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "checkpoint"
        apply_plan(directory, plan, out, device=arguments.device)
        found = evaluate(load_checkpoint(out, device=arguments.device), windows, reference=reference)
        stored = stored_bytes(out, {entry.layer for entry in plan.layers})
    assert found.kl is not None and stored == plan.promised.memory_bytes
    outside = [f"{entry.layer} {entry.quantizer}" for entry in plan.layers if entry.layer in (EMBED, HEAD)]
    promised = plan.promised
    return Row(
        rate,
        planned,
        stored + rest,
        stored,
        round(promised.bits_per_weight, 4),
        "; ".join(outside),
        promised.loss,
        found.kl,
        found.perplexity,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--measure", type=Path, help="UTF-8 text; Python's help topics by default")
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens, at most; 0 for all")
    parser.add_argument("--rates", default="2,2.5,3,3.5,4")
    parser.add_argument("--palette", default="tcq-*,nuq-*,int-8")
    parser.add_argument("--state-bits", type=int, default=12)
    parser.add_argument("--profile-tokens", type=int, default=16384)
    parser.add_argument("--profiles", type=Path, default=Path("embedding-profiles"))
    parser.add_argument("--out", type=Path, default=Path("embeddings.csv"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="to be recorded; git's by default")
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model)
    limit = arguments.windows or None
    if arguments.measure is None:
        windows, measured_on = help_text_windows(load_tokenizer(directory), _WINDOW, limit), "pydoc_data.topics"
    else:
        windows, measured_on = token_windows(directory, arguments.measure, _WINDOW, limit), arguments.measure.name
    reference = load_model(directory, choose_device(arguments.device))
    original = evaluate(reference, windows)
    facts = {
        "model": arguments.model,
        "state_bits": arguments.state_bits,
        "measured_on": f"{measured_on}, {windows.numel()} tokens",
        "original_perplexity": original.perplexity,
        **environment(arguments.device, arguments.commit),
    }
    profiles = {planned: measured_profile(arguments, directory, planned) for planned in _PLANNED}
    rows: list[Row] = []
    for rate in map(float, arguments.rates.split(",")):
        for row in measure(arguments, directory, profiles, rate, reference, windows):
            rows.append(row)
            print(
                f"{row.rate:4g} bits {row.planned:24} {row.model_bytes:>10} bytes  KL {row.kl:.4f}  perplexity "
                f"{row.perplexity:.2f}  {row.outside}",
                flush=True,
            )
            write_csv(arguments.out, [*vars(rows[0]), *facts], [[*vars(one).values(), *facts.values()] for one in rows])


if __name__ == "__main__":
    main()
