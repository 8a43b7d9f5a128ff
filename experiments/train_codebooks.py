"""Train the shipped codebooks on N(0,1) and measure every quantizer's normalised error.

    python -m msq.experiments.train_codebooks --device cuda --out results

writes ``codebooks.safetensors`` and ``gaussian_errors.csv``, both shipped in ``kernels/data``; with ``--families`` or
``--quantizers`` it replaces only their rows in an output folder that holds the others. The trellis tables were made on
an NVIDIA H200 with the defaults (commit df7d29c, when the search looked at 64 steps on each side of the seam for 4 to 8
bits a step and 32 above: errors differ from now by 1e-3 at most), the plane tables with ``--families vq --tiles 65536
--iterations 100``. The errors of `1mad` and `3inst` are of 2^20 weights.

Scalar tables are Lloyd-Max levels by numerical iteration; plane tables come from k-means; trellis tables start from
k-means on the half plane (the sign bit of the HYB code mirrors the first coordinate) and are improved by Lloyd
iterations on their own Viterbi assignments: each entry moves to the mean of the pairs it served. Every iteration draws
new samples, so that nothing is fitted to one of them; the last third draws four times as many. `half_tcq` trains one
table on both of its rates.

Trellis codes without a table have nothing to train, only errors to measure: those of `mad`, whose constants come from
`search_mad`, with ``--quantizers "tcq-?,tcq-?.5,half-tcq-*5"``. Those of `1mad` and `3inst`, with ``--quantizers
"tcq-*-1mad,tcq-*-3inst"``, are also measured over a range of scales, which are printed.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..kernels.codebooks import codebook_key, rounded, row_spec
from ..kernels.quantize import coders
from ..kernels.quantizers.base import PairCoder
from ..kernels.quantizers.codes import table_indices
from ..kernels.quantizers.trellis import TrellisCoder
from ..kernels.quantizers.vector import VectorCoder
from ..kernels.specs import (
    PAIRS_PER_TILE,
    TILE,
    Family,
    QuantizerSpec,
    TrellisCode,
    every_quantizer,
    match_labels,
)

NO_TABLE = torch.empty(0, 1, dtype=torch.float16)
_AT_ONCE = 1 << 14
"""Tiles that are encoded at once."""


def gaussian_pairs(tiles: int, seed: int, device: str) -> Tensor:
    """``(tiles, 128, 2)`` float32 of N(0,1)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tiles, PAIRS_PER_TILE, 2, generator=generator, device=device)


def lloyd_max(levels: int) -> Tensor:
    """Optimal scalar levels for N(0,1), ``(levels, 1)`` float64, iterated to a fixed point."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    points = math.sqrt(3) * normal.icdf((torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(200_000):
        edges = torch.cat([-infinity, (points[1:] + points[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        updated = -density.diff() / normal.cdf(edges).diff()
        moved = float((updated - points).abs().max())
        points = updated
        if moved < 1e-9:
            break
    table: Tensor = points.unsqueeze(1)
    return table


def k_means(samples: Tensor, points: Tensor, iterations: int) -> Tensor:
    """Lloyd iterations in the plane: ``samples (n, 128, 2)``, ``points (entries, 2)`` -> ``(entries, 2)``."""
    coder = VectorCoder(len(points).bit_length() - 1)
    flat = samples.flatten(0, 1)
    for _ in range(iterations):
        points = _centroids(points, coder.encode(samples, points).flatten().long(), flat)
    return points


def _centroids(points: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Mean of the values that each entry served; an unused entry stays."""
    count = torch.bincount(index, minlength=len(points)).unsqueeze(1)
    totals = [torch.bincount(index, weights=column.double(), minlength=len(points)) for column in values.unbind(1)]
    return torch.where(count > 0, torch.stack(totals, 1) / count.clamp_min(1), points.double()).float()


def train_trellis(spec: QuantizerSpec, start: Tensor, tiles: int, iterations: int, seed: int) -> Tensor:
    """Lloyd iterations on Viterbi assignments; the rates of `half_tcq` share the table and the samples."""
    points, device = start, start.device
    index_of, sign_of = table_indices(spec.code, spec.state_bits, len(points), device)
    for iteration in range(iterations):
        many = 4 * tiles if 3 * iteration >= 2 * iterations else tiles
        samples = gaussian_pairs(many, seed + 1000 + iteration, str(device))
        entries, values = [], []
        for coder, pairs in zip(coders(spec), samples.chunk(len(spec.rates)), strict=True):
            assert isinstance(coder, TrellisCoder)
            states = coder.states(coder.encode(pairs, points.half())).flatten()
            folded = pairs.flatten(0, 1)
            folded[:, 0] *= sign_of[states]
            entries.append(index_of[states])
            values.append(folded)
        points = _centroids(points, torch.cat(entries), torch.cat(values))
    return points


def measure(spec: QuantizerSpec, table: Tensor, samples: Tensor) -> float:
    """Normalised error on samples ``(tiles, 128, 2)``; the two rates of `half_tcq` share them as they share columns."""
    wrong = 0.0
    for coder, pairs in zip(coders(spec), samples.split(list(spec.segment_tiles(TILE * len(samples)))), strict=True):
        if spec.family is Family.INT:
            wrong += _integer_error(coder, pairs)
        else:
            wrong += squared_error(coder, table, pairs)
    return wrong / float(samples.double().square().sum())


def squared_error(coder: PairCoder, table: Tensor, pairs: Tensor) -> float:
    """Sum over all weights of ``(tiles, 128, 2)``."""
    parts = pairs.split(_AT_ONCE)
    return sum(float((coder.decode(coder.encode(p, table), table) - p).double().square().sum()) for p in parts)


def _integer_error(coder: PairCoder, pairs: Tensor) -> float:
    """Squared error of `int` at its best step for a Gaussian (a row of a real layer chooses its own)."""
    best = math.inf
    for step in torch.logspace(-2, 0.3, 240).tolist():
        decoded = coder.decode(coder.encode(pairs / step, NO_TABLE), NO_TABLE) * step
        best = min(best, float((decoded - pairs).double().square().sum()))
    return best


def train(spec: QuantizerSpec, device: str, tiles: int, iterations: int, seed: int) -> Tensor:
    """The fp16 table of one quantizer, as it is stored."""
    if not spec.table_bytes:
        return NO_TABLE
    if spec.family is Family.NUQ:
        return rounded(spec, lloyd_max(spec.codebook_shape[0]))
    start = torch.randn(spec.codebook_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    samples = gaussian_pairs(tiles, seed, device)
    if spec.family is Family.VQ:
        return rounded(spec, k_means(samples, start * math.sqrt(2), 4 * iterations)).cpu()
    if spec.code is TrellisCode.HYB:
        samples[..., 0].abs_()
        start[:, 0].abs_()
        start = k_means(samples[: len(samples) // 2], start, 24)
    return train_trellis(spec, start, tiles, iterations, seed).half().cpu()


def best_scale(spec: QuantizerSpec, samples: Tensor) -> tuple[float, float]:
    """(factor, error): what the scale of a code of single weights should be multiplied by, and its error then."""
    # to divide the samples is the same
    tried = [(measure(spec, NO_TABLE, samples / scale), scale) for scale in (0.76 + 0.02 * i for i in range(22))]
    error, scale = min(tried)
    return scale, error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiles", type=int, default=16384, help="training tiles of 256 weights")
    parser.add_argument("--test-tiles", type=int, default=65536, help="tiles the errors are measured on")
    parser.add_argument("--iterations", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", type=Family, nargs="+", default=list(Family))
    parser.add_argument("--quantizers", default="*", help="globs on labels")
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 16], help="trellis lengths to measure")
    parser.add_argument(
        "--lookup-tables", action="store_true", help="also train tables of all states (lut.safetensors)"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    output = _Output(arguments.out)
    fresh = gaussian_pairs(arguments.test_tiles, arguments.seed + 1, arguments.device)
    specs = list(every_quantizer())
    if arguments.lookup_tables:
        specs += [QuantizerSpec(Family.TCQ, 1.5 + i / 2, 16, code=TrellisCode.LUT) for i in range(8)]
    chosen = match_labels([spec.label for spec in specs], arguments.quantizers)
    for spec in (s for s in specs if s.label in chosen and s.family in arguments.families):
        begun = time.perf_counter()
        if spec.pair_steps == 2:
            scale, error = best_scale(spec, fresh[: 1 + len(fresh) // 16])
            print(f"{spec.label:20s} {scale:.2f} x scale: {error:.6f}", flush=True)
        key = codebook_key(spec)
        if key not in output.fresh:
            output.keep(key, train(spec, arguments.device, arguments.tiles, arguments.iterations, arguments.seed))
        lookup = spec.code is TrellisCode.LUT
        for length in arguments.lengths if spec.has_trellis and not lookup else [spec.state_bits]:
            variant = replace(spec, state_bits=length)
            error = measure(variant, output.fresh[key].to(arguments.device), fresh)
            output.errors[variant] = error, fresh.numel()
            print(f"{variant.label:20s} {error:.6f}  {time.perf_counter() - begun:6.1f} s", flush=True)
        output.save()


class _Output:
    """The files in the output folder, with what they held before."""

    def __init__(self, folder: Path) -> None:
        self._tables_file, self._errors_file = folder / "codebooks.safetensors", folder / "gaussian_errors.csv"
        self._lookup_file = folder / "lut.safetensors"
        self.fresh: dict[str, Tensor] = {}
        self._tables: dict[str, Tensor] = load_file(self._tables_file) if self._tables_file.exists() else {}
        self.errors: dict[QuantizerSpec, tuple[float, int]] = {}
        if self._errors_file.exists():
            with self._errors_file.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.errors[row_spec(row)] = float(row["gaussian_error"]), int(row["samples"])

    def keep(self, key: str, table: Tensor) -> None:
        self.fresh[key] = table

    def save(self) -> None:
        made = {key: table for key, table in self.fresh.items() if table.numel()}
        lookup = {key: table for key, table in made.items() if f".{TrellisCode.LUT}." in key}
        shipped = {key: table for key, table in sorted((self._tables | made).items()) if key not in lookup}
        save_file(shipped, self._tables_file)
        if lookup:
            save_file(lookup, self._lookup_file)
        with self._errors_file.open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["family", "bits", "state_bits", "table_bits", "code", "gaussian_error", "samples"])
            order = list(Family)
            for spec, (error, count) in sorted(self.errors.items(), key=lambda e: (order.index(e[0].family), e[0])):
                fields = (spec.family, f"{spec.bits:g}", spec.state_bits, spec.table_bits, spec.code)
                rows.writerow([*fields, f"{error:.6g}", count])


if __name__ == "__main__":
    main()
