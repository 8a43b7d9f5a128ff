"""Time what stands around the decode kernels on a CUDA device: rotations, whole layers, long inputs, first use.

    python -m msq.experiments.bench_layers --out results/layers.csv      under two minutes, kernels in cache or not

Rows (`what`): `rotate`, `rotate_normed`, `rotate_added`, `rotate_gated` (input in the second-level cache, as it is in a
model), `attend` (a step of attention, turning and cache included, keys from memory) beside `sdpa` (torch's attention of
turned queries over the same keys), `divide` (rotations of one row under other divisions of work), `layer` (rotation and
product through the operators, weights from memory), `multiply` (the product alone), `decode`, `dequantize`, `cublas`
(where decoding stops to pay), `host` (the processor's time for one call of an operator), `compile` and `cached` (first
use of a kernel by a process, without and with the file in the cache). Medians over replays of a CUDA graph, but for the
last three.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cuda import attention, hadamard, jit, ops
from ..kernels.cuda.cubin_cache import DIRECTORY_VARIABLE
from ..kernels.cuda.decode import kernel_arguments, new_workspace, ready
from ..kernels.cuda.dequantize import dequantize
from ..kernels.cuda.layout import PreparedWeight
from ..kernels.cuda.rotation_plan import (
    SHARED_LIMIT,
    RotationTables,
    division,
    fuses_norm,
    matrix_table,
    passes,
    rotation_tables,
)
from ..kernels.specs import Family, QuantizerSpec
from ..profiles.kernel_timing import Pool, time_launches
from .bench_kernels import environment
from .kernel_sweep import SHAPES

SIZES = (2048, 4096, 5120, 8192, 11008, 13824, 14336, 28672)
SPECS = (QuantizerSpec(Family.NUQ, 3), QuantizerSpec(Family.TCQ, 3, 16), QuantizerSpec(Family.INT, 4))
_POOL_BYTES = 640 << 20
_WORKSPACE_WORDS = 4 << 20
Row = dict[str, object]


def row(what: str, name: str, batch: int, measured: tuple[float, float], detail: str = "") -> Row:
    return {
        "what": what,
        "name": name,
        "batch": batch,
        "detail": detail,
        "median_us": round(measured[0], 3),
        "spread_us": round(measured[1], 3),
    }


def rotation_calls(size: int, rows: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every rotation of a size, by name."""
    gate, up = torch.randn(2, rows, size, device=device).half()
    weight, tables = torch.rand(size, device=device).half(), rotation_tables(size, 0, device)
    yield "rotate", partial(hadamard.rotate, gate, tables)
    if fuses_norm(size):
        yield "rotate_normed", partial(hadamard.rotate_normed, gate, weight, 1e-5, tables)
        yield "rotate_added", partial(hadamard.rotate_added, gate, up, weight, 1e-5, tables)
    yield "rotate_gated", partial(hadamard.rotate_gated, gate, up, tables)


def rotations(device: torch.device) -> Iterator[Row]:
    for rows, size in itertools.product((1, 8, 16, 2048), SIZES):
        for name, call in rotation_calls(size, rows, device):
            yield row(name, str(size), rows, time_launches([call]))


def attentions(device: torch.device) -> Iterator[Row]:
    """A step of attention as in Llama-3.1-8B, the caches of 32 blocks in turn, so that keys come from memory."""
    heads, key_heads, size = 32, 8, 128
    for batch, context in ((1, 256), (1, 1024), (1, 4096), (1, 32768), (8, 256), (8, 4096), (16, 1024)):
        capacity = context + 16
        caches = torch.randn(32, 2, batch, key_heads, capacity, size, device=device, dtype=torch.float16)
        q = torch.randn(batch, heads * size, device=device).half()
        k, v = torch.randn(2, batch, key_heads * size, device=device).half()
        angles = torch.rand(capacity, size // 2, device=device)
        positions = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
        given = q, k, v, attention.Turning(angles.cos(), angles.sin()), positions
        workspace = attention.new_workspace(heads, key_heads, size, batch, capacity, device)
        torch.cuda.synchronize()
        calls = [partial(attention.attend, *given, *cache, scale=0.1, workspace=workspace) for cache in caches]
        name, detail = "32/8 heads of 128", f"context={context}"
        yield row("attend", name, batch, time_launches(calls), detail)
        turned = q.view(batch, heads, 1, size)
        attend = partial(F.scaled_dot_product_attention, scale=0.1, enable_gqa=True)
        calls = [partial(attend, turned, *cache[..., :context, :]) for cache in caches]
        yield row("sdpa", name, batch, time_launches(calls), detail)


def divisions(device: torch.device) -> Iterator[Row]:
    """One row of single-pass sizes: warps and outputs of a block."""
    for size, warps_k, group in itertools.product((4096, 14336), (1, 2, 4, 8), (1, 2, 4, 8)):
        if 8 * 32 * 4 * warps_k * group > SHARED_LIMIT:
            continue
        (step,) = passes(size, False)
        split = replace(division(step, False), warps_k=warps_k, group=group)
        x, out = torch.randn(2, 1, size, device=device).half()
        tables = rotation_tables(size, 0, device)
        code = hadamard.source(step, split, dtypes=(x.dtype, x.dtype), signs=True, norm=False, gate=False)
        matrix = matrix_table(step, group).to(device)
        arguments = (x, size, None, 0, out, tables.signs, matrix, size**-0.5, 0.0, None, 0, None)
        kernel = jit.load(code, device)
        call = partial(kernel.launch, step.order // group, 32 * warps_k, arguments, programmatic=True)
        yield row("divide", str(size), 1, time_launches([call]), f"warps_k={warps_k} group={group}")


def product_call(x: Tensor, tables: RotationTables | None, weight: PreparedWeight, workspace: Tensor) -> Tensor:
    """A layer as its module runs it."""
    if tables is not None:
        x = torch.ops.msq.rotate(x, tables.signs, list(tables.matrices))
    spec = weight.spec
    y: Tensor = torch.ops.msq.multiply(
        x,
        list(weight.units),
        weight.scales,
        weight.codebook,
        None,
        workspace,
        str(spec.family),
        spec.bits,
        spec.state_bits,
    )
    return y


def layers(device: torch.device) -> Iterator[Row]:
    """Products with and without the rotation before them; rotated and not is the cost of the rotation in place."""
    pool, workspace = Pool(device, _POOL_BYTES), new_workspace(_WORKSPACE_WORDS, device)
    for batch, spec, shape in itertools.product((1, 8), SPECS, SHAPES):
        out_features, in_features = SHAPES[shape]
        weights = pool.weights(spec, out_features, in_features)
        x, tables = torch.randn(batch, in_features, device=device).half(), rotation_tables(in_features, 0, device)
        for what, used in (("multiply", None), ("layer", tables)):
            measured = time_launches([partial(product_call, x, used, weight, workspace) for weight in weights])
            yield row(what, shape, batch, measured, spec.label)


def long_inputs(device: torch.device) -> Iterator[Row]:
    """Where decoding stops to pay, and what long inputs cost beside cuBLAS alone."""
    pool, workspace = Pool(device, _POOL_BYTES), new_workspace(_WORKSPACE_WORDS, device)
    for spec, shape in itertools.product(SPECS, SHAPES):
        out_features, in_features = SHAPES[shape]
        weights = pool.weights(spec, out_features, in_features)
        yield row(
            "dequantize", shape, 0, time_launches([partial(dequantize, weight) for weight in weights]), spec.label
        )
        for batch in (8, ops.DECODE_LIMIT):
            x, y = (torch.randn(batch, n, device=device).half() for n in (in_features, out_features))
            launch, kernel = ready(spec, out_features, in_features, batch, x.dtype, x.get_device(), None)
            calls = [
                partial(
                    kernel.launch,
                    launch.grid,
                    launch.block,
                    kernel_arguments(x, weight, None, y, workspace, launch),
                    shared_bytes=launch.shared_bytes,
                    programmatic=True,
                )
                for weight in weights
            ]
            yield row("decode", shape, batch, time_launches(calls), spec.label)
    for shape, batch in itertools.product(SHAPES, (8, 16, 32, 2048)):
        dense = torch.randn(SHAPES[shape], device=device).half()
        x = torch.randn(batch, SHAPES[shape][1], device=device).half()
        yield row("cublas", shape, batch, time_launches([partial(F.linear, x, dense)]), "weight in cache where it fits")


def host_times(device: torch.device) -> Iterator[Row]:
    """Time of the processor for a call, the device never the slower of the two."""
    workspace = new_workspace(_WORKSPACE_WORDS, device)
    x, tables = torch.randn(1, 512, device=device).half(), rotation_tables(512, 0, device)
    weight = Pool(device, 64 << 20).weights(SPECS[0], 512, 512)[0]
    calls = {
        "rotate": partial(torch.ops.msq.rotate, x, tables.signs, list(tables.matrices)),
        "multiply": partial(product_call, x, None, weight, workspace),
        "torch.add": partial(torch.add, x, x),
    }
    for name, call in calls.items():
        times = []
        for _ in range(30):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(20):
                call()
            times.append((time.perf_counter() - begun) * 1e6 / 20)
        low, middle, high = statistics.quantiles(times, n=4)
        yield row("host", name, 1, (middle, high - low))


def first_uses(device: torch.device) -> Iterator[Row]:
    """Until a kernel can be launched: compiled, and then read from the cache, as another process would."""
    kept = os.environ.get(DIRECTORY_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[DIRECTORY_VARIABLE] = folder
        sources = {"rotate 4096": hadamard.sources(4096, False, torch.float16)[0]}
        for spec in SPECS:
            sources[f"multiply {spec.label}"] = ready(spec, 4096, 4096, 1, torch.float16, device.index or 0, None)[
                0
            ].source
        for name, code in sources.items():
            for what in ("compile", "cached"):
                jit.forget(code)
                for path in Path(folder).rglob("*.cubin") if what == "compile" else ():
                    path.unlink()
                begun = time.perf_counter()
                jit.load(code, device)
                yield row(what, name, 1, ((time.perf_counter() - begun) * 1e6, 0.0))
    if kept is None:
        del os.environ[DIRECTORY_VARIABLE]
    else:
        os.environ[DIRECTORY_VARIABLE] = kept


_PARTS = {
    part.__name__: part for part in (first_uses, layers, rotations, attentions, host_times, divisions, long_inputs)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("layers.csv"))
    parser.add_argument("--seconds", type=float, default=110.0, help="start no further part after this long")
    parser.add_argument("--commit", help="to be recorded; git's by default")
    parser.add_argument("--parts", default=",".join(_PARTS), help="comma-separated")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    common, begun = environment(device, arguments.commit), time.perf_counter()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = None
        for part in (_PARTS[name] for name in arguments.parts.split(",")):
            if time.perf_counter() - begun > arguments.seconds:
                print(f"out of time before {part.__name__}")
                break
            for measured in part(device):
                writer = writer or csv.DictWriter(file, [*measured, *common], lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(measured | common)
                file.flush()
                print(*measured.values(), flush=True)
            print(f"# {part.__name__}: {time.perf_counter() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
