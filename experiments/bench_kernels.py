"""Check and time the decode kernels on a CUDA device, and sweep their tunings.

    python -m msq.experiments.bench_kernels --out results/kernels.csv            everything, minutes
    python -m msq.experiments.bench_kernels --out results/kernels.csv --quick    two minutes: what decides most
    python -m msq.experiments.bench_kernels --dry                                compile all of it, on any machine

Rows are written as they are measured, most telling first, until `--seconds` have passed. Kernels: `read` (the floor: a
plain read of the same bytes), `cublas` (fp16), `decode`. Modes of `decode`: `cold` (weights from memory: the number
that counts), `hot` (one weight again and again, from the second-level cache where it fits: what decoding alone would
take), `start` (no rows at all: what a launch takes before it decodes), `without ...` (cold, a part of the kernel left
out: what it costs). All are medians over replays of a CUDA graph.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cuda.decode import KERNEL_CODES, kernel_arguments, new_workspace
from ..kernels.cuda.jit import Kernel, Source, device_arch, load
from ..kernels.cuda.limits import device_limits
from ..kernels.cuda.precompile import compile_all
from ..kernels.cuda.tuning import Tuning
from ..kernels.specs import DEFAULT_STATE_BITS, QuantizerSpec
from ..profiles.device import driver_version
from ..profiles.kernel_timing import Pool, time_launches
from ..profiles.options import parse_palette
from .kernel_checks import check_all, check_sources
from .kernel_sweep import H200, SHAPES, Case, cases, launch_of
from .records import checkout_commit

_POOL_BYTES = 640 << 20
READS = [
    (Source("read.cu", "read_direct", {"UNROLL": unroll, "READ_THREADS": threads}), blocks)
    for unroll, threads, blocks in ((8, 512, 2), (8, 256, 4), (4, 512, 4), (4, 1024, 2))
]
_QUICK = "nuq-[234],vq-[234],int-[234],tcq-[234],tcq-3.5,half-tcq-[23].25,tcq-3-hyb"
_WARM_SECONDS = 0.02
"""Of launches before those of a row that are timed."""
_SETTLING_SECONDS = 1.0
"""The same, for each of `READS`, before the first row: an idle device is up to 8% slower at small launches."""
_SWEPT = ("nuq-2", "nuq-3", "nuq-4", "tcq-2", "tcq-3", "tcq-4", "tcq-3-hyb")


def compile_sources(sources: list[Source], arch: str, processes: int) -> None:
    """Fill the cache of compiled kernels, and say how long one takes."""
    begun = time.perf_counter()
    times = sorted(compile_all(sources, arch, processes))
    print(
        f"{len(times)} kernels for {arch} in {time.perf_counter() - begun:.1f} s with {processes} processes; "
        f"one took {times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s (longest)",
        flush=True,
    )


class Table:
    """The CSV file, written row by row."""

    def __init__(self, path: Path, common: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._common = common
        self._writer: csv.DictWriter[str] | None = None
        self.rows: list[dict[str, object]] = []

    def add(self, kernel: str, what: QuantizerSpec | float, shape: str, batch: int, tuning: Tuning | None, mode: str,
            programmatic: bool, size_bytes: int, measured: tuple[float, float]) -> None:  # fmt: skip
        """One row; `what` is a quantizer, or bits per weight."""
        out_features, in_features = SHAPES[shape]
        row: dict[str, object] = {
            "kernel": kernel,
            "family": what.family if isinstance(what, QuantizerSpec) else "",
            "bits": what.bits if isinstance(what, QuantizerSpec) else what,
            "code": what.code if isinstance(what, QuantizerSpec) and what.has_trellis else "",
            "shape": shape,
            "out_features": out_features,
            "in_features": in_features,
            "batch": batch,
            "mode": mode,
            "programmatic": int(programmatic),
        }
        row |= {name: "" if tuning is None else int(value) for name, value in asdict(tuning or Tuning()).items()}
        row |= {
            "size_bytes": size_bytes,
            "median_us": round(measured[0], 3),
            "spread_us": round(measured[1], 3),
            "gb_per_s": round(size_bytes / measured[0] / 1e3, 1),
        }
        row |= self._common
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()
        self.rows.append(row)


def time_read(
    pool: Pool, size_bytes: int, programmatic: bool, warm_seconds: float = _WARM_SECONDS
) -> tuple[float, float]:
    """The floor: the best of a few plain reads of as many bytes."""
    device = pool.device
    out = torch.zeros(4, dtype=torch.int32, device=device)
    parts = pool.slices(size_bytes)
    best = (float("inf"), 0.0)
    for source, blocks in READS:
        kernel, grid = load(source, device), blocks * device_limits(device.index).multiprocessors
        threads = int(dict(source.macros)["READ_THREADS"])

        def call(part: Tensor, kernel: Kernel = kernel, grid: int = grid, threads: int = threads) -> None:
            kernel.launch(grid, threads, (part, out, size_bytes // 16), programmatic=programmatic)

        best = min(best, time_launches([partial(call, part) for part in parts], warm_seconds=warm_seconds))
    return best


def time_cublas(shape: str, batch: int, device: torch.device) -> tuple[float, float]:
    """torch's fp16 product."""
    out_features, in_features = SHAPES[shape]
    weights = [torch.randn(out_features, in_features, device=device).half() for _ in range(2)]
    while len(weights) * weights[0].numel() * 2 < 3 * 60 << 20:
        weights.append(weights[0].clone())
    x = torch.randn(batch, in_features, device=device).half()
    return time_launches([partial(F.linear, x, weight) for weight in weights], warm_seconds=_WARM_SECONDS)


def time_case(pool: Pool, case: Case) -> tuple[tuple[float, float], int]:
    """Median and spread of a case, and the bytes of its codes."""
    out_features, in_features = SHAPES[case.shape]
    weights = pool.weights(case.spec, out_features, in_features, cold=case.mode != "hot")
    x = torch.randn(case.batch, in_features, device=pool.device).half()
    out = torch.empty(case.batch, out_features, device=pool.device, dtype=torch.float16)
    launch = launch_of(case, device_limits(pool.device.index))
    assert launch is not None  # those that do not fit were left out
    kernel = load(launch.source, pool.device)
    workspace = new_workspace(launch.workspace_words, pool.device) if launch.workspace_words else None
    calls = []
    for weight in weights:
        row_tiles = 0 if case.mode == "start" else None
        arguments = kernel_arguments(x, weight, None, out, workspace, launch, row_tiles=row_tiles)
        calls.append(
            partial(
                kernel.launch,
                launch.grid,
                launch.block,
                arguments,
                shared_bytes=launch.shared_bytes,
                programmatic=case.programmatic,
            )
        )
    return time_launches(calls, warm_seconds=_WARM_SECONDS), sum(units.numel() for units in weights[0].units)


def summary(rows: list[dict[str, object]]) -> str:
    """Sums over the shapes of the best times found, beside the floors."""
    best: dict[tuple[object, ...], dict[object, float]] = {}
    for row in rows:
        if row["mode"] in ("cold", "floor"):
            key: tuple[object, ...] = tuple(
                row[name] for name in ("kernel", "family", "code", "bits", "batch", "programmatic")
            )
            times = best.setdefault(key, {})
            times[row["shape"]] = min(times.get(row["shape"], float("inf")), float(str(row["median_us"])))
    lines = [
        "kernel   family    code bits batch pdl " + "".join(f"{shape:>9}" for shape in SHAPES) + "      sum   / floor"
    ]
    for key, times in best.items():
        if len(times) < len(SHAPES):
            continue
        total = sum(times.values())
        floor = best.get(("read", "", "", key[3], 1, key[5]))
        ratio = f"{total / sum(floor.values()):8.2f}" if floor else ""
        lines.append(
            f"{key[0]!s:8} {key[1]!s:9} {key[2]!s:4} {key[3]!s:>4} {key[4]!s:>5} {key[5]!s:>3} "
            + "".join(f"{times[shape]:9.2f}" for shape in SHAPES)
            + f"{total:9.2f}{ratio}"
        )
    return "\n".join(lines)


def parts(rows: list[dict[str, object]]) -> str:
    """The default tunings' times by mode: what each part of the kernel costs."""
    times: dict[tuple[object, ...], dict[object, object]] = {}
    for row in rows:
        if row["kernel"] == "decode" and row["batch"] == 1 and not row["programmatic"]:
            shapes = times.setdefault((row["family"], row["code"], row["bits"], row["mode"]), {})
            shapes.setdefault(row["shape"], row["median_us"])
    lines = ["family    code bits mode             " + "".join(f"{shape:>9}" for shape in SHAPES)]
    for (family, code, bits, mode), shapes in times.items():
        what = f"{family!s:9} {code!s:4} {bits!s:>4} {mode!s:16} "
        lines.append(what + "".join(f"{shapes.get(s, ''):>9}" for s in SHAPES))
    return "\n".join(lines)


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """What a measurement depends on."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "torch": torch.__version__,
        "commit": commit or checkout_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def measure(arguments: argparse.Namespace, planned: list[Case], bits: list[float]) -> int:
    """Check, time and write; the number of failed checks."""
    device = torch.device("cuda", torch.cuda.current_device())
    begun = time.perf_counter()
    failures = 0 if arguments.no_checks else check_all(device, thorough=not arguments.quick)
    print(f"checks took {time.perf_counter() - begun:.1f} s", flush=True)
    pool = Pool(device, _POOL_BYTES)
    table = Table(arguments.out, environment(device, arguments.commit))
    time_read(pool, 1 << 24, False, _SETTLING_SECONDS)
    for rate, programmatic, shape in itertools.product(bits, (False, True), SHAPES):
        size_bytes = int(SHAPES[shape][0] * SHAPES[shape][1] * rate / 8)
        table.add(
            "read", rate, shape, 1, None, "floor", programmatic, size_bytes, time_read(pool, size_bytes, programmatic)
        )
    for batch, shape in itertools.product((1, 8, 16), SHAPES):
        size_bytes = 2 * SHAPES[shape][0] * SHAPES[shape][1]
        table.add("cublas", 16.0, shape, batch, None, "cold", False, size_bytes, time_cublas(shape, batch, device))
    for done, case in enumerate(planned):
        if time.perf_counter() - begun > arguments.seconds:
            print(f"out of time after {done} of {len(planned)} cases", flush=True)
            break
        measured, size_bytes = time_case(pool, case)
        table.add(
            "decode", case.spec, case.shape, case.batch, case.tuning, case.mode, case.programmatic, size_bytes, measured
        )
    print(parts(table.rows))
    print(summary(table.rows))
    print(f"{len(table.rows)} rows in {arguments.out}, {time.perf_counter() - begun:.1f} s")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.csv"))
    parser.add_argument("--quick", action="store_true", help="fewer quantizers and checks")
    parser.add_argument("--dry", action="store_true", help="compile everything for an H200, run nothing")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no more cases after this long")
    parser.add_argument("--quantizers", default="", help="globs of the labels to time, such as 'tcq-*,tcq-3-hyb'")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of them, those to time")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--commit", help="to be recorded; git's by default")
    arguments = parser.parse_args()
    wanted = arguments.quantizers or (_QUICK if arguments.quick else "*,tcq-[234]-hyb")
    specs = list(parse_palette(wanted, DEFAULT_STATE_BITS))
    if unknown := [spec.label for spec in specs if spec.code not in KERNEL_CODES]:
        parser.error(f"expected quantizers with a kernel; got {', '.join(unknown)}.")
    swept = [spec for spec in specs if spec.label in _SWEPT]
    limits = H200 if arguments.dry else device_limits(torch.cuda.current_device())
    shapes = arguments.shapes.split(",")
    planned = [
        case for case in dict.fromkeys(cases(specs, swept, limits)) if case.shape in shapes and launch_of(case, limits)
    ]
    print(f"{len(planned)} cases of {len(specs)} quantizers", flush=True)
    sources = [source for source, _ in READS] + [
        launch.source for case in planned if (launch := launch_of(case, limits))
    ]
    if not arguments.no_checks:
        sources += check_sources(limits, thorough=not arguments.quick)
    arch = "sm_90" if arguments.dry else device_arch(torch.device("cuda"))
    compile_sources(list(dict.fromkeys(sources)), arch, arguments.processes)
    if not arguments.dry:
        sys.exit(min(measure(arguments, planned, sorted({spec.bits for spec in specs})), 1))


if __name__ == "__main__":
    main()
