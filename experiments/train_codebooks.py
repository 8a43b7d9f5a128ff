"""Train the shipped codebooks on N(0,1) and measure every quantizer's normalised error.

    python -m msq.experiments.train_codebooks --device cuda --out results

writes ``codebooks.safetensors`` and ``gaussian_errors.csv``, both shipped in ``kernels/data``; with ``--families`` it
replaces only their rows in an output folder that holds the others. The shipped tables were made on an NVIDIA H200: all
families with the defaults, then ``--families vq --tiles 65536 --iterations 100``.

Scalar tables are Lloyd-Max levels by numerical iteration; plane tables come from k-means; trellis tables start from
k-means on the half plane (the sign bit of the HYB code mirrors the first coordinate) and are improved by Lloyd
iterations on their own Viterbi assignments: each entry moves to the mean of the pairs it served. `half_tcq` trains one
table on both of its rates.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..kernels.codebooks import codebook_key
from ..kernels.packing import sliding_states
from ..kernels.quantize import coders
from ..kernels.quantizers.base import PairCoder
from ..kernels.quantizers.trellis import TrellisCoder, hybrid_indices
from ..kernels.quantizers.vector import VectorCoder
from ..kernels.specs import PAIRS_PER_TILE, Family, QuantizerSpec, default_palette

_NO_TABLE = torch.empty(0, 1, dtype=torch.float16)


def gaussian_pairs(tiles: int, seed: int, device: str) -> Tensor:
    """``(tiles, 128, 2)`` float32 of N(0,1)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tiles, PAIRS_PER_TILE, 2, generator=generator, device=device)


def lloyd_max(levels: int) -> Tensor:
    """Optimal scalar levels for N(0,1), ``(levels, 1)`` fp16; iterated in float64 to a fixed point."""
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
    table: Tensor = points.half().unsqueeze(1)
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
    count = torch.zeros(len(points), device=values.device, dtype=torch.float64)
    count.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    total = torch.zeros(len(points), 2, device=values.device, dtype=torch.float64).index_add_(0, index, values.double())
    return torch.where(count.unsqueeze(1) > 0, total / count.clamp_min(1).unsqueeze(1), points.double()).float()


def train_trellis(spec: QuantizerSpec, samples: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Lloyd iterations on Viterbi assignments; the rates of `half_tcq` share the table and the samples."""
    points = start
    parts = list(zip(coders(spec), samples.chunk(len(spec.rates)), strict=True))
    index_of, sign_of = (t.to(samples.device) for t in hybrid_indices(spec.state_bits, len(points)))
    for _ in range(iterations):
        entries, values = [], []
        for coder, pairs in parts:
            assert isinstance(coder, TrellisCoder)
            states = sliding_states(coder.encode(pairs, points), coder.width, spec.state_bits).flatten().long()
            folded = pairs.flatten(0, 1).clone()
            folded[:, 0] *= sign_of[states]
            entries.append(index_of[states])
            values.append(folded)
        points = _centroids(points, torch.cat(entries), torch.cat(values))
    return points


def measure(spec: QuantizerSpec, table: Tensor, samples: Tensor) -> float:
    """Normalised error on samples ``(tiles, 128, 2)``; the two rates of `half_tcq` take half of them each."""
    wrong = 0.0
    for coder, pairs in zip(coders(spec), samples.chunk(len(spec.rates)), strict=True):
        if spec.family is Family.INT:
            wrong += _integer_error(coder, pairs)
            continue
        for part in pairs.split(1 << 14):
            wrong += float((coder.decode(coder.encode(part, table), table) - part).double().square().sum())
    return wrong / float(samples.double().square().sum())


def _integer_error(coder: PairCoder, pairs: Tensor) -> float:
    """Squared error of `int` at its best step for a Gaussian (a row of a real layer chooses its own)."""
    best = math.inf
    for step in torch.logspace(-2, 0.3, 240).tolist():
        decoded = coder.decode(coder.encode(pairs / step, _NO_TABLE), _NO_TABLE) * step
        best = min(best, float((decoded - pairs).double().square().sum()))
    return best


def train(spec: QuantizerSpec, samples: Tensor, iterations: int, seed: int) -> Tensor:
    """The fp16 table of one quantizer."""
    if spec.family is Family.INT:
        return _NO_TABLE
    if spec.family is Family.NUQ:
        return lloyd_max(spec.codebook_shape[0])
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(spec.codebook_shape, generator=generator)
    if spec.family is Family.VQ:
        return k_means(samples, (start * math.sqrt(2)).to(samples.device), 4 * iterations).half().cpu()
    start[:, 0].abs_()
    mirrored = samples[: len(samples) // 2].clone()
    mirrored[..., 0].abs_()
    points = k_means(mirrored, start.to(samples.device), iterations)
    return train_trellis(spec, samples, points, iterations).half().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiles", type=int, default=8192, help="training tiles of 256 weights")
    parser.add_argument("--test-tiles", type=int, default=65536, help="tiles the errors are measured on")
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", type=Family, nargs="+", default=list(Family))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables_file, errors_file = arguments.out / "codebooks.safetensors", arguments.out / "gaussian_errors.csv"
    samples = gaussian_pairs(arguments.tiles, arguments.seed, arguments.device)
    fresh = gaussian_pairs(arguments.test_tiles, arguments.seed + 1, arguments.device)
    tables: dict[str, Tensor] = load_file(tables_file) if tables_file.exists() else {}
    errors: dict[QuantizerSpec, tuple[float, int]] = {}
    if errors_file.exists():
        with errors_file.open(newline="") as file:
            for row in csv.DictReader(file):
                spec = QuantizerSpec(Family(row["family"]), float(row["bits"]), int(row["state_bits"]))
                errors[spec] = float(row["gaussian_error"]), int(row["samples"])
    for spec in default_palette():
        if spec.family not in arguments.families:
            continue
        begun = time.perf_counter()
        table = train(spec, samples, arguments.iterations, arguments.seed)
        if table.numel():
            tables[codebook_key(spec)] = table
        for length in [12, 16] if spec.has_trellis else [0]:
            variant = QuantizerSpec(spec.family, spec.bits, length)
            error = measure(variant, table.to(arguments.device), fresh)
            errors[variant] = error, fresh.numel()
            print(f"{variant.label:20s} {error:.6f}  {time.perf_counter() - begun:6.1f} s", flush=True)
        save_file(tables, tables_file)
        with errors_file.open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["family", "bits", "state_bits", "gaussian_error", "samples"])
            order = list(Family)
            for known, (error, count) in sorted(
                errors.items(), key=lambda item: (order.index(item[0].family), item[0])
            ):
                rows.writerow([known.family, f"{known.bits:g}", known.state_bits, f"{error:.6g}", count])


if __name__ == "__main__":
    main()
