"""Check and time the trellis search on a GPU against the batched PyTorch search.

    python -m msq.experiments.bench_encoder --out encoder.csv

Rows of ``--parts``: ``check`` compares costs and codes of every rate; ``rates`` times every rate, and PyTorch at
3 bits in the same run; ``divisions`` times other ways to divide the work; ``windows`` shows what a shorter first search
costs in error; ``layer`` quantizes one 4096 x 14336 layer with all that belongs to it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.codebooks import codebook
from ..kernels.cuda.decode import KERNEL_CODES
from ..kernels.cuda.jit import load
from ..kernels.cuda.limits import device_limits
from ..kernels.cuda.viterbi import Division, divide, encode, shared_bytes, source
from ..kernels.quantize import coders, quantize
from ..kernels.quantizers.trellis import TrellisCoder
from ..kernels.quantizers.viterbi import viterbi_encode, window
from ..kernels.specs import Family, QuantizerSpec, TrellisCode
from .records import environment, write_csv
from .train_codebooks import gaussian_pairs

_HEADER = ["part", "quantizer", "what", "value", "unit"]
_RATES = [1.5 + i / 2 for i in range(8)]
_DIVISIONS = [
    (6, Division(8, 256, 2, 1)),
    (6, Division(8, 256, 4, 1)),
    (6, Division(4, 256, 4, 1)),
    (6, Division(4, 256, 4, 2)),
    (6, Division(8, 512, 2, 1, 1)),
    (6, Division(8, 512, 4, 1, 1)),
    (6, Division(8, 128, 4, 1, 3)),
    (6, Division(8, 128, 4, 1, 4)),
    (6, Division(4, 128, 4, 1, 4)),
    (3, Division(2, 256, 4, 4)),
    (3, Division(2, 512, 4, 2, 1)),
    (3, Division(4, 512, 4, 2, 1)),
    (3, Division(1, 256, 4, 4)),
    (10, Division(8, 256, 2, 1)),
    (10, Division(8, 256, 4, 1)),
]
Row = tuple[str, str, str, float, str]


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call that has run before."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return sorted(times)[repeats // 2]


def coder_of(spec: QuantizerSpec) -> TrellisCoder:
    """The coder of a quantizer of one rate."""
    (coder,) = coders(spec)
    assert isinstance(coder, TrellisCoder)
    return coder


def squared_errors(coder: TrellisCoder, codes: Tensor, pairs: Tensor, table: Tensor) -> Tensor:
    """Of every tile, float64."""
    return (coder.decode(codes, table).double() - pairs.double()).square().sum((1, 2))


def check(device: torch.device) -> Iterator[Row]:
    """Total costs of the kernel and of the reference, relative difference; and the share of tiles with equal codes."""
    specs = [QuantizerSpec(Family.TCQ, bits, 16, code=code) for code in KERNEL_CODES for bits in _RATES]
    specs += [QuantizerSpec(Family.TCQ, bits, 12, code=code) for code in KERNEL_CODES for bits in (1.5, 3, 5)]
    specs += [QuantizerSpec(Family.TCQ, 2, 16, code=code) for code in (TrellisCode.ONE_MAD, TrellisCode.THREE_INST)]
    for spec in specs:
        pairs = gaussian_pairs(320, 1, str(device))
        coder, table = coder_of(spec), codebook(spec).to(device)
        found = coder.encode(pairs, table)
        steps = pairs.reshape(len(pairs), -1, 2 // spec.pair_steps)
        expected = viterbi_encode(steps, coder.points(table, device), coder.step_width)
        if spec.pair_steps == 2:
            expected = expected[:, ::2] | expected[:, 1::2] << coder.step_width
        own, reference = (squared_errors(coder, codes, pairs, table) for codes in (found, expected))
        yield "check", spec.label, "cost against the reference", float(own.sum() / reference.sum()) - 1, "relative"
        yield "check", spec.label, "tiles of equal codes", float((found == expected).all(1).double().mean()), "share"


def rates(device: torch.device, tiles: int) -> Iterator[Row]:
    """Weights a second of every rate of both codes, and of PyTorch at 3 bits."""
    for code, bits in itertools.product(KERNEL_CODES, _RATES):
        spec = QuantizerSpec(Family.TCQ, bits, 16, code=code)
        coder, table, pairs = coder_of(spec), codebook(spec).to(device), gaussian_pairs(tiles, 2, str(device))
        coder.encode(pairs[:64], table)
        speed = pairs.numel() / seconds(lambda: coder.encode(pairs, table)) / 1e6  # noqa: B023
        yield "rates", spec.label, "kernel", speed, "M weights/s"
        if bits == 3:
            few, points = pairs[:8192], coder.points(table, device)
            viterbi_encode(few[:2048], points, 6)
            slow = few.numel() / seconds(lambda: viterbi_encode(few, points, 6), 1) / 1e6  # noqa: B023
            yield "rates", spec.label, "PyTorch", slow, "M weights/s"
            yield "rates", spec.label, "kernel against PyTorch", speed / slow, "times"


def divisions(device: torch.device, tiles: int) -> Iterator[Row]:
    """Other divisions of the work."""
    for code, (width, chosen) in itertools.product(KERNEL_CODES, _DIVISIONS):
        spec = QuantizerSpec(Family.TCQ, width / 2, 16, code=code)
        coder, pairs = coder_of(spec), gaussian_pairs(tiles, 2, str(device))
        points, mirrored = coder.points(codebook(spec).to(device), device), coder.mirrored
        if shared_bytes(16, width, 128, chosen) > device_limits(0).shared_bytes:
            continue
        kernel = load(source(16, width, 128, chosen, mirrored=mirrored), device)
        encode(pairs[:64], points, width, mirrored=mirrored, division=chosen)
        took = seconds(lambda: encode(pairs, points, width, mirrored=mirrored, division=chosen), 1)  # noqa: B023
        best = " *" if chosen == divide(16, width, 128, tiles, device_limits(0)) else ""
        what = f"{chosen} {kernel.registers} registers, {kernel.spilled_bytes} bytes spilled{best}"
        yield "divisions", spec.label, what, pairs.numel() / took / 1e6, "M weights/s"


def windows(device: torch.device, tiles: int) -> Iterator[Row]:
    """Error with shorter first searches against the longest, relative."""
    for code, bits in itertools.product(KERNEL_CODES, _RATES):
        spec = QuantizerSpec(Family.TCQ, bits, 16, code=code)
        coder, table, pairs = coder_of(spec), codebook(spec).to(device), gaussian_pairs(tiles, 3, str(device))
        points, inputs, base = coder.points(table, device) / coder.gain, pairs / coder.gain, 0.0
        for steps in (128, 96, 64, 48, 32, 24, 16):
            codes = encode(inputs, points, coder.width, mirrored=coder.mirrored, seam_steps=steps)
            error = float(squared_errors(coder, codes, pairs, table).sum())
            base = base or error
            used = " *" if steps == window(coder.width) else ""
            yield "windows", spec.label, f"{steps} steps{used}", error / base - 1, "relative"


def layer(device: torch.device) -> Iterator[Row]:
    """A whole layer: rotate, scale, encode, pack, refit; and the peak of GPU memory."""
    weight = torch.randn(4096, 14336, device=device, dtype=torch.bfloat16)
    rates = ((Family.HALF_TCQ, 3.25), (Family.TCQ, 1.5))
    for spec in (QuantizerSpec(*rate, 16, code=code) for code in KERNEL_CODES for rate in rates):
        quantize(weight[:256], spec, rotation_seed=0)
        quantize(weight, spec, rotation_seed=0)
        torch.cuda.reset_peak_memory_stats(device)
        took = seconds(lambda: quantize(weight, spec, rotation_seed=0))  # noqa: B023
        yield "layer", spec.label, "4096 x 14336", 1e3 * took, "ms"
        yield "layer", spec.label, "4096 x 14336", weight.numel() / took / 1e6, "M weights/s"
        yield "layer", spec.label, "peak memory", torch.cuda.max_memory_allocated(device) / 2**30, "GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["check", "rates", "layer"])
    parser.add_argument("--tiles", type=int, default=1 << 15, help="tiles of 256 weights to time")
    parser.add_argument("--commit", default=None)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "check": lambda: check(device),
        "rates": lambda: rates(device, arguments.tiles),
        "divisions": lambda: divisions(device, arguments.tiles // 4),
        "windows": lambda: windows(device, arguments.tiles // 4),
        "layer": lambda: layer(device),
    }
    facts = environment("cuda", arguments.commit)
    rows: list[list[object]] = []
    begun = time.perf_counter()
    for part in arguments.parts:
        for row in parts[part]():
            rows.append([*row[:3], f"{row[3]:.6g}", row[4], *facts.values()])
            print(*row[:3], f"{row[3]:.4g}", row[4], f"[{time.perf_counter() - begun:.0f} s]", sep="  ", flush=True)
            write_csv(arguments.out, [*_HEADER, *facts], rows)


if __name__ == "__main__":
    main()
