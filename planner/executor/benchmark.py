"""Tokens per second of a model as it runs, where a step's time goes, and what its weights take.

A step is timed as it is used: replayed from its CUDA graph (called, on a CPU), the cache filled to the context. Steps
of a round follow one another without a look at the device in between; a round's time over its steps is one measurement.
Weights of a large model drive one another out of the caches, as they do in use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.cuda.linear import KernelLinear
from ...kernels.embedding import PackedEmbedding
from ...kernels.linear import FusedSlice, QuantizedLinear
from .decoder import Decoder
from .errors import CheckpointError

_ROUNDS = {"cuda": 9, "cpu": 5}
_STEPS = {"cuda": 16, "cpu": 2}


@dataclass(frozen=True)
class StepTime:
    """One decoding step.

    Attributes:
        batch_size: sequences decoded together.
        context: positions in the cache at the first step of a round.
        step_us, spread_us: median and interquartile range of the rounds.
        tokens_per_second: of all sequences together.
        peak_bytes: most memory allocated so far on the device, cache and graph included; 0 on a CPU.
    """

    batch_size: int
    context: int
    step_us: float
    spread_us: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class KernelTime:
    """Launches of one kernel in a step; kernels that overlap are counted in full, so times may add up to more."""

    kernel: str
    launches: float
    total_us: float


def measure_step(model: nn.Module, batch_size: int, context: int) -> StepTime:
    """Time a decoding step.

    Args:
        model: see `Decoder`.
        context: positions in the cache.
    """
    device = next(model.parameters()).device
    decoder = _started(model, batch_size, context)
    steps, times = _STEPS[device.type], []
    for number in range(_ROUNDS[device.type] + 1):
        decoder.rewind(context)
        elapsed = _round(decoder, steps, device)
        if number:  # the first one warms up
            times.append(elapsed / steps)
    low, middle, high = statistics.quantiles(times, n=4)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return StepTime(batch_size, context, middle, high - low, 1e6 * batch_size / middle, peak)


def _started(model: nn.Module, batch_size: int, context: int) -> Decoder:
    device = next(model.parameters()).device
    capacity = context + _STEPS[device.type] + 1
    longest = cast(Any, model).config.max_position_embeddings
    if capacity > longest:
        raise CheckpointError(
            f"expected a context of at most {longest - capacity + context} tokens, as the model reads {longest} and "
            f"steps are timed after it; got {context}."
        )
    decoder = Decoder(model, batch_size=batch_size, capacity=capacity)
    decoder.pretend(context)
    return decoder


def _round(decoder: Decoder, steps: int, device: torch.device) -> float:
    """Microseconds of some steps."""
    if device.type == "cpu":
        begun = time.perf_counter()
        for _ in range(steps):
            decoder.advance()
        return 1e6 * (time.perf_counter() - begun)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        decoder.advance()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


def measure_prompt(model: nn.Module, batch_size: int, length: int) -> float:
    """µs to read a prompt of `length` tokens for each sequence and choose the first new tokens; median of three."""
    device = next(model.parameters()).device
    decoder = Decoder(model, batch_size=batch_size, capacity=length + 1, graph=False)
    prompts = [[1] * length] * batch_size
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        decoder.start(prompts)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e6 * (time.perf_counter() - begun))
    return statistics.median(times[1:])  # the first one compiles and loads kernels


def measure_kernels(model: nn.Module, batch_size: int, context: int) -> list[KernelTime]:
    """Where a step's time goes on a CUDA device, by kernel, longest first; nothing on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    decoder = _started(model, batch_size, context)
    steps = 4
    _round(decoder, 2, device)
    decoder.rewind(context)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        _round(decoder, steps, device)
    return sorted(
        (
            KernelTime(event.key, event.count / steps, event.self_device_time_total / steps)
            for event in recorded.key_averages()
            if event.self_device_time_total > 0
        ),
        key=lambda row: -row.total_us,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the quantized layers' tensors as they lie in memory: codes, scales, codebooks, without biases."""
    total = 0
    for module in model.modules():
        if isinstance(module, (KernelLinear, QuantizedLinear)):
            tensors = [tensor for name, tensor in module.state_dict().items() if name != "bias"]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def shared_bytes(model: nn.Module) -> int:
    """Bytes of codebooks that layers running as one kernel share in memory, each of them having its own on disk."""
    wholes = {slice_.fused_linear for slice_ in model.modules() if isinstance(slice_, FusedSlice)}
    return sum(cast(QuantizedLinear, whole.linear).spec.table_bytes * (len(whole.rows) - 1) for whole in wholes)


def measure_without_products(model: nn.Module, batch_sizes: Sequence[int], context: int) -> dict[int, float]:
    """µs of a decoding step beside the products and lookups of the quantized layers, by batch size.

    The rotations of inputs are in it; the embedding's inverse rotation belongs to its lookup.
    """
    with without_products(model):
        return {batch: measure_step(model, batch, context).step_us for batch in batch_sizes}


@contextmanager
def without_products(model: nn.Module) -> Iterator[None]:
    """Within it, products and lookups of quantized layers cost nothing and give zeros; make decoders inside."""
    changed: list[tuple[Any, str]] = []
    zeros: dict[tuple[Any, ...], Tensor] = {}

    def nothing(module: Any) -> Any:
        def product(x: Tensor) -> Tensor:
            key = (x.shape[:-1], module.out_features, x.dtype, x.device)
            if key not in zeros:
                zeros[key] = x.new_zeros(*x.shape[:-1], module.out_features)
            return zeros[key]

        return product

    def no_lookup(module: PackedEmbedding) -> Any:
        def rows(tokens: Tensor) -> Tensor:
            key = (tokens.shape, module.embedding_dim, module.dtype, tokens.device)
            if key not in zeros:
                zeros[key] = torch.zeros(*tokens.shape, key[1], dtype=module.dtype, device=tokens.device)
            return zeros[key]

        return rows

    inside = {slice_.fused_linear.linear for slice_ in model.modules() if isinstance(slice_, FusedSlice)}
    for module in {*model.modules(), *inside}:
        if isinstance(module, (KernelLinear, QuantizedLinear)):
            name = "product" if isinstance(module, KernelLinear) else "forward"
            module.__dict__[name] = nothing(module)
            changed.append((module, name))
        elif isinstance(module, PackedEmbedding):
            module.__dict__["forward"] = no_lookup(module)
            changed.append((module, "forward"))
    try:
        yield
    finally:
        for module, name in changed:
            del module.__dict__[name]
