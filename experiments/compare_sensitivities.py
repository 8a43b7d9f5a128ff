"""Three ways to estimate sensitivities, compared: time, ranking of single-layer swaps, and the plans they lead to.

    python -m msq.experiments.compare_sensitivities --text calibration.txt --measure test.txt --out sensitivities.csv

Each way runs on random tokens and on a calibration text. The reference is the measured KL divergence of quantizing
single layers at 2, 3 and 4 bits, on `--measure` and on fresh random tokens: its Spearman correlation with a_l * err,
for each way. Then the plans are built, and their KL and perplexity measured on `--measure`. All ways share one table of
measured errors, so plans differ by sensitivities alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor, nn

from ..kernels.specs import QuantizerSpec
from ..profiles.calibration import calibration
from ..profiles.fisher import measure_fisher
from ..profiles.inventory import LayerInfo, inventory
from ..profiles.job import ProfileSettings, middle_quantizer, run_profile
from ..profiles.journal import Journal
from ..profiles.model_source import resolve_model
from ..profiles.models import choose_device, load_model, token_windows
from ..profiles.options import parse_palette
from ..profiles.sensitivity import Sensitivity, measure_direct, measure_sensitivities
from ..profiles.tables import Profile
from .check_promises import Swap, build_and_measure, single_layer_swaps
from .demo import PALETTE, STATE_BITS
from .records import environment, write_csv

METHODS = ("kl", "fisher", "direct")
_NOISE, _WINDOW, _WINDOWS_PER_GROUP = 0.1, 256, 8


def sensitivities_by(
    method: str,
    model: nn.Module,
    layers: Sequence[LayerInfo],
    tokens: Tensor,
    specs: Sequence[QuantizerSpec],
    journal: Journal,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """One of `METHODS`, with the settings of `msq profile`."""
    shared: dict[str, Any] = {"seed": seed, "windows_per_group": _WINDOWS_PER_GROUP, "journal": journal}
    if method == "fisher":
        return measure_fisher(model, layers, tokens, **shared)
    if method == "direct":
        return measure_direct(model, layers, tokens, spec=middle_quantizer(specs), **shared)
    return measure_sensitivities(model, layers, tokens, noise=_NOISE, **shared)


def ranking(profile: Profile, swaps: Sequence[Swap]) -> tuple[float, float]:
    """Spearman correlation of a_l * err with the measured KL of swaps: on the text, and on random tokens."""
    rows, columns = list(profile.layer_names), list(profile.labels)
    sensitivity = profile.sensitivities
    promised = []
    for swap in swaps:
        row = rows.index(swap.layer)
        promised.append(float(sensitivity[row] * profile.error_matrix[row, columns.index(swap.quantizer)]))
    on_text, on_random = ([getattr(swap, name) for swap in swaps] for name in ("kl_text", "kl_random"))
    return float(spearmanr(promised, on_text).statistic), float(spearmanr(promised, on_random).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ref-tiny-3m")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--measure", type=Path, required=True, help="text that KL and perplexity are measured on")
    parser.add_argument("--palette", default=PALETTE)
    parser.add_argument("--state-bits", type=int, default=STATE_BITS)
    parser.add_argument("--budgets", nargs="+", default=["memory=3.0bpw", "memory=2.5bpw"])
    parser.add_argument("--solver", default="exact")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens that each way sees")
    parser.add_argument("--windows", type=int, default=48, help="windows of 512 tokens that plans are measured on")
    parser.add_argument("--swap-windows", type=int, default=16, help="windows that single-layer swaps are measured on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="commit to record; default: that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    directory, device = resolve_model(arguments.model), arguments.device
    layers = inventory(directory).layers
    specs = parse_palette(arguments.palette, arguments.state_bits)
    windows = token_windows(directory, arguments.measure, 512, arguments.windows)
    model = load_model(directory, choose_device(device))
    facts = {"model": arguments.model, "measured_on": f"{arguments.measure.name}, {windows.numel()} tokens"}
    facts |= environment(device, arguments.commit)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        settings = ProfileSettings(specs=specs, batch_sizes=(), tokens=512, device=device)
        base = run_profile(directory, Path(scratch) / "profile", settings, name=arguments.model)
        swaps = single_layer_swaps(model, directory, base, windows[: arguments.swap_windows])
        for method in METHODS:
            for text in (None, arguments.text):
                tokens = calibration(directory, text, tokens=arguments.tokens, window=_WINDOW, seed=0).windows
                begun = time.perf_counter()
                with Journal(Path(scratch) / f"{method}-{text is None}", {}) as journal:
                    found = sensitivities_by(method, model, layers, tokens, specs, journal)
                seconds = time.perf_counter() - begun
                values = [found[name].value for name in base.layer_names]
                profile = dataclasses.replace(base, layers=base.layers.assign(sensitivity=values))
                on_text, on_random = ranking(profile, swaps)
                row: dict[str, object] = {
                    "method": method,
                    "tokens_from": "random" if text is None else text.name,
                    "tokens": tokens.numel(),
                    "seconds": round(seconds, 2),
                    "swaps": len(swaps),
                    "spearman_text": on_text,
                    "spearman_random": on_random,
                }
                for budget in arguments.budgets:
                    out = Path(scratch) / f"{method} {text is None} {budget}"
                    built = build_and_measure(profile, directory, budget, arguments.solver, out, windows, model, device)
                    names = ("bits per weight", "promised loss", "measured KL", "perplexity")
                    row |= {f"{budget}: {name}": built[name] for name in names}
                results.append(row | facts)
                print({key: value for key, value in row.items() if "bits" not in key}, flush=True)
                write_csv(arguments.out, list(results[0]), [list(result.values()) for result in results])


if __name__ == "__main__":
    main()
