"""Tokens per second of whole models on a CUDA device, from shapes alone: fp16, uniform schemes, plans, no products.

    python -m msq.experiments.bench_decode --out results/decode.csv --plans a.yaml,b.yaml      a few minutes
    python -m msq.experiments.bench_decode --rows "no-op,nuq-3,a.yaml" --batch-sizes 1         some of the rows

Rows: `fp16 compiled` (the stock model under torch.compile with CUDA graphs and a static cache, as a user would run it;
compiling takes a minute or two for each batch size), `fp16 fused` (its weights in the fused step: what is gained beside
the products), `no-op` (the fused step without any product of a planned layer: the overhead of every plan), a label such
as `nuq-3` (for every layer, q k v and gate up fused, the head in `--head`, the embedding in `--embedding`), a plan's
file (run as planned), and a plan's file with `:single` behind it (no layers fused). Weights are random bits; memory and
promises are exact.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.specs import DEFAULT_STATE_BITS, QuantizerSpec
from ..planner.executor.benchmark import (
    measure_kernels,
    measure_step,
    measure_without_products,
    shared_bytes,
    weight_bytes,
)
from ..planner.executor.manifest import QuantizationConfig
from ..planner.executor.random_model import planned_quantization, random_model, uniform_quantization
from ..planner.plan import Plan, load_plan
from ..profiles.device import driver_version
from ..profiles.models import load_config
from ..profiles.options import parse_palette
from ..profiles.shipped import resolve_config
from .records import environment, write_csv

FP16_COMPILED, FP16_FUSED, NO_OP = "fp16 compiled", "fp16 fused", "no-op"
_DEFAULT_ROWS = f"{NO_OP},nuq-3,half-tcq-3.25,{FP16_FUSED},{FP16_COMPILED}"
_SINGLE = ":single"
Row = dict[str, object]


def spec_of(label: str) -> QuantizerSpec:
    """The quantizer with this label."""
    return parse_palette(label, DEFAULT_STATE_BITS)[0]


def _row(name: str, batch: int, context: int, step_us: float, spread_us: float) -> Row:
    speed = round(1e6 * batch / step_us, 1)
    return {
        "row": name,
        "batch_size": batch,
        "context": context,
        "step_us": round(step_us, 1),
        "spread_us": round(spread_us, 1),
        "tokens_per_second": speed,
        "promised_us": None,
        "promised_bytes": None,
        "allocated_bytes": None,
        "shared_bytes": None,
        "promised_loss": None,
        "bits_per_weight": None,
    }


def model_rows(
    name: str,
    model: nn.Module,
    batch_sizes: list[int],
    context: int,
    plan: Plan | None = None,
    quantization: QuantizationConfig | None = None,
) -> Iterator[Row]:
    """One model at every batch size, in the fused step."""
    for batch in batch_sizes:
        timed = measure_step(model, batch, context)
        row = _row(name, batch, context, timed.step_us, timed.spread_us)
        if quantization is not None:
            shapes = {n: (layer.out_features, layer.in_features) for n, layer in quantization.layers.items()}
            size = sum(quantization.spec(n).size_bytes(*shape) for n, shape in shapes.items())
            weights = sum(rows * columns for rows, columns in shapes.values())
            row |= {"promised_bytes": size, "allocated_bytes": weight_bytes(model), "shared_bytes": shared_bytes(model)}
            row["bits_per_weight"] = round(8 * size / weights, 4)
        if plan is not None:
            promised = plan.promised
            row |= {"promised_us": promised.latency_us.get(batch), "promised_bytes": promised.memory_bytes}
            row |= {"promised_loss": promised.loss, "bits_per_weight": round(promised.bits_per_weight, 4)}
        yield row


def compiled_rows(config: Any, batch_sizes: list[int], context: int, device: torch.device) -> Iterator[Row]:
    """The stock model under torch.compile."""
    model: Any = random_model(config, None, device)
    for batch in batch_sizes:
        torch._dynamo.reset()
        call, rewind = compiled_step(model, batch, context)
        for _ in range(4):
            call()
        times = []
        for _ in range(9):
            rewind()
            times.append(_round(call, 16, device))
        low, middle, high = statistics.quantiles(times, n=4)
        yield _row(FP16_COMPILED, batch, context, middle, high - low)


def compiled_step(model: Any, batch: int, context: int) -> tuple[Callable[[], object], Callable[[], None]]:
    """A decoding step of the stock model, compiled whole and on CUDA captured, and what sets its cache back.

    Under no_grad: what is compiled may not see tensors of inference mode.
    """
    from transformers import StaticCache

    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=context + 32)
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def whole(token: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        chosen: torch.Tensor = logits[:, -1].argmax(-1)
        return chosen

    with torch.no_grad():
        model(input_ids=token.expand(batch, context), past_key_values=cache, use_cache=True)
    compiled = torch.compile(whole, fullgraph=True)
    call: Callable[[], object] = partial(compiled, token)
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay

    @torch.no_grad()
    def rewind() -> None:
        for layer in cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if length is not None:
                length.fill_(context)

    rewind()
    return call, rewind


def _round(call: Callable[[], object], steps: int, device: torch.device) -> float:
    """Microseconds of a call, on average."""
    if device.type == "cpu":
        begun = time.perf_counter()
        for _ in range(steps):
            call()
        return 1e6 * (time.perf_counter() - begun) / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        call()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end)) / steps


def measure(name: str, config: Any, arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The rows of one name."""
    batches = [int(batch) for batch in arguments.batch_sizes.split(",")]
    head = None if arguments.head == "none" else spec_of(arguments.head)
    if name == FP16_COMPILED:
        yield from compiled_rows(config, batches, arguments.context, device)
        return
    plan = None
    if name == FP16_FUSED:
        quantization = None
    elif name.removesuffix(_SINGLE).endswith((".yaml", ".yml")):
        plan = load_plan(name.removesuffix(_SINGLE))
        quantization = planned_quantization(config, plan)
    else:
        spec = spec_of("nuq-2" if name == NO_OP else name)
        embedding = None if arguments.embedding == "none" else spec_of(arguments.embedding)
        quantization = uniform_quantization(config, spec, head=head, embedding=embedding)
    model = random_model(config, quantization, device, fused=not name.endswith(_SINGLE))
    if name == NO_OP:
        for batch, step_us in measure_without_products(model, batches, arguments.context).items():
            yield _row(name, batch, arguments.context, step_us, 0.0)
        return
    yield from model_rows(name, model, batches, arguments.context, plan, quantization)
    if arguments.kernels:
        for row in measure_kernels(model, batches[0], arguments.context):
            print(f"    {row.kernel[:60]:60} {row.launches:6.1f} launches {row.total_us:9.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("decode.csv"))
    parser.add_argument("--rows", default=_DEFAULT_ROWS, help=f'comma-separated; default "{_DEFAULT_ROWS}"')
    parser.add_argument("--plans", default="", help="plan files to add to the rows, comma-separated")
    parser.add_argument("--config", default="llama-3.1-8b", help="config.json, or shapes that ship with msq")
    parser.add_argument("--head", default="nuq-4", help="quantizer of the head in uniform rows; none for fp16")
    parser.add_argument("--embedding", default="none", help="quantizer of the embedding in uniform rows; none for fp16")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", action="store_true", help="print where a step's time goes")
    parser.add_argument("--seconds", type=float, default=230.0, help="start no further row after this long")
    parser.add_argument("--commit", help="to be recorded; git's by default")
    arguments = parser.parse_args()
    device, begun = torch.device(arguments.device), time.perf_counter()
    facts = environment(arguments.device, arguments.commit) | {"driver": driver_version()}
    rows: list[Row] = []
    for name in filter(None, [*arguments.rows.split(","), *arguments.plans.split(",")]):
        if time.perf_counter() - begun > arguments.seconds:
            print(f"{name}: left out, {arguments.seconds:g} s have passed")
            continue
        for row in measure(name, load_config(resolve_config(arguments.config)), arguments, device):
            rows.append(row | facts)
            print(" ".join(f"{key}={value}" for key, value in row.items() if value is not None), flush=True)
            write_csv(arguments.out, list(rows[0]), [list(row.values()) for row in rows])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"    {name}: done after {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
