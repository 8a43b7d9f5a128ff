"""Whether the planner's promises hold on a real model: bytes, mixed against uniform, promised against measured KL.

    python -m msq.experiments.check_promises --out results.csv

For the embedded model (or `--model`): plan `--budget` with the best uniform scheme and as a mix, build both and measure
their KL to the original; then quantize single layers of the original at 2, 3 and 4 bits, and correlate the promised
loss a_l * err with the measured KL. The text is Python's help topics unless `--text` is given.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, cast

from scipy.stats import spearmanr
from torch import Tensor, nn

from ..kernels.quantize import dequantize, quantize
from ..kernels.rotation import input_seed
from ..planner.budget import parse_budgets
from ..planner.executor.apply import apply_plan
from ..planner.executor.load import load_checkpoint
from ..planner.solve import find_plan
from ..profiles.blockwise import BlockwiseModel
from ..profiles.inventory import inventory, outside_blocks
from ..profiles.job import ProfileSettings, run_profile
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, load_tokenizer, random_windows, token_windows
from ..profiles.options import parse_palette
from ..profiles.quantizer_errors import read_weight
from ..profiles.schema import MANIFEST_FILE
from ..profiles.tables import Profile, load_profile
from .demo import PALETTE, STATE_BITS, help_text_windows
from .evaluate import evaluate
from .records import environment, write_csv

_SWAP_BITS = (2.0, 3.0, 4.0)
"""Rates of the single-layer swaps: of each, the palette's quantizer of least error on N(0,1)."""
_FRESH_SEED = 1_000_003
"""Seed of the random tokens on which swaps are measured besides the text."""


@dataclass(frozen=True)
class Swap:
    """One layer quantized, the others untouched: promised loss, and KL measured on the text and on random tokens."""

    layer: str
    quantizer: str
    promised: float
    kl_text: float
    kl_random: float


def single_layer_swaps(model: nn.Module, directory: Path, profile: Profile, windows: Tensor) -> list[Swap]:
    """Quantize every layer alone at each of `_SWAP_BITS`."""
    blockwise = BlockwiseModel(model)
    fresh = random_windows(cast(Any, model).config.vocab_size, len(windows), windows.shape[1], _FRESH_SEED)
    device = next(model.parameters()).device
    recordings = [blockwise.record(tokens.to(device)) for tokens in (windows, fresh)]
    table = profile.quantizers.sort_values("gaussian_error")
    labels = [table["quantizer"][table["bits_per_weight"] == bits].iloc[0] for bits in _SWAP_BITS]
    seed = profile.loss.seed or 0
    sensitivity = dict(zip(profile.layer_names, profile.sensitivities, strict=True))
    rows, columns = list(profile.layer_names), list(profile.labels)
    swaps = []
    for layer in inventory(directory, **outside_blocks(profile.layer_names)).layers:
        weight = read_weight(directory, layer).to(device)
        for label in labels:
            quantized = quantize(weight, profile.spec(label), rotation_seed=input_seed(layer.fusion_group, seed))
            changed = dequantize(quantized)
            kl = [float(blockwise.kl_of_change(recording, layer, changed).mean()) for recording in recordings]
            error = float(profile.error_matrix[rows.index(layer.name), columns.index(label)])
            swaps.append(Swap(layer.name, label, float(sensitivity[layer.name]) * error, *kl))
    return swaps


def build_and_measure(
    profile: Profile,
    directory: Path,
    budget: str,
    solver: str,
    out: Path,
    windows: Tensor,
    model: nn.Module,
    device: str,
) -> dict[str, object]:
    """Plan, build and measure one scheme: promised and stored bytes, promised loss, KL, perplexity."""
    plan = find_plan(profile, parse_budgets([budget]), solver=solver).plan
    applied = apply_plan(directory, plan, out, device=device)
    measured = evaluate(load_checkpoint(out, device=device), windows, reference=model)
    return {
        "bits per weight": plan.promised.bits_per_weight,
        "promised bytes": plan.promised.memory_bytes,
        "bytes on disk": applied.memory_bytes,
        "promised loss": plan.promised.loss,
        "measured KL": measured.kl,
        "perplexity": measured.perplexity,
        "quantizers": " ".join(sorted(plan.quantizers)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--profile", type=Path, help="use this profile; else one is made with --palette")
    parser.add_argument("--palette", default=PALETTE)
    parser.add_argument("--state-bits", type=int, default=STATE_BITS)
    parser.add_argument("--budgets", nargs="+", default=["memory=3.0bpw"])
    parser.add_argument("--solver", default="scip")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens; 0 for all")
    parser.add_argument("--swap-windows", type=int, default=32, help="windows that single-layer swaps are measured on")
    parser.add_argument("--commit", help="commit to record; default: that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model)
    model = load_model(directory, choose_device(arguments.device))
    limit = arguments.windows or None
    windows = (
        help_text_windows(load_tokenizer(directory), 512, limit)
        if arguments.text is None
        else token_windows(directory, arguments.text, 512, limit)
    )
    results = _facts(arguments, windows)
    with tempfile.TemporaryDirectory() as scratch:
        profile = _profile(arguments, directory, Path(scratch) / "profile")
        original = evaluate(model, windows)
        results.append(("original: perplexity", original.perplexity))
        for budget in arguments.budgets:
            kl = {}
            for solver in ("uniform", arguments.solver):
                out = Path(scratch) / f"{solver} {budget}"
                row = build_and_measure(profile, directory, budget, solver, out, windows, model, arguments.device)
                results += [(f"{budget} {solver}: {name}", value) for name, value in row.items()]
                kl[solver] = cast(float, row["measured KL"])
            results.append(
                (f"{budget}: KL of the plan over that of the uniform scheme", kl[arguments.solver] / kl["uniform"])
            )
            write_csv(arguments.out, ["fact", "value"], results)
        swaps = single_layer_swaps(model, directory, profile, windows[: arguments.swap_windows])
    promised = [swap.promised for swap in swaps]
    on_text, on_random = ([getattr(swap, name) for swap in swaps] for name in ("kl_text", "kl_random"))
    results += [
        ("single-layer swaps", len(swaps)),
        ("Spearman of promised and measured KL, text", float(spearmanr(promised, on_text).statistic)),
        ("Spearman of promised and measured KL, random tokens", float(spearmanr(promised, on_random).statistic)),
    ]
    write_csv(arguments.out, ["fact", "value"], results)
    names = [field.name for field in fields(Swap)]
    write_csv(arguments.out.with_name(f"{arguments.out.stem}_swaps.csv"), names, [astuple(swap) for swap in swaps])
    for name, value in results:
        print(f"{name}: {value}")


def _profile(arguments: argparse.Namespace, directory: Path, scratch: Path) -> Profile:
    if arguments.profile is not None and (arguments.profile / MANIFEST_FILE).exists():
        return load_profile(arguments.profile)
    specs = parse_palette(arguments.palette, arguments.state_bits)
    settings = ProfileSettings(specs=specs, batch_sizes=(), device=arguments.device)
    return run_profile(directory, arguments.profile or scratch, settings, name=arguments.model)


def _facts(arguments: argparse.Namespace, windows: Tensor) -> list[tuple[str, object]]:
    text = "pydoc_data.topics" if arguments.text is None else arguments.text.name
    return [
        ("model", arguments.model),
        ("text", f"{text}, {windows.numel()} tokens"),
        *environment(arguments.device, arguments.commit).items(),
    ]


if __name__ == "__main__":
    main()
