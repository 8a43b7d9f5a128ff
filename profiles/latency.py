"""Microseconds of every kernel a plan may name, and of everything else in a decoding step.

A row is a (pattern shape, quantizer, implementation, batch size). Only shapes matter, so weights are random bits and
each distinct shape is measured once. The overhead of a batch size is a decoding step of the model with every planned
layer replaced by one that returns zeros: attention, norms, embeddings and head, as they run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linear import IMPLEMENTATIONS
from ..kernels.quantize import QuantizedWeight, from_tensors, tensor_shapes
from ..kernels.specs import TILE, Family, QuantizerSpec
from .inventory import LayerInfo
from .journal import Journal
from .progress import progress
from .timing import Timer

_MAX_FUSED = 3
"""Patterns are listed for groups of up to this many layers; q, k and v are the largest today."""


@dataclass(frozen=True)
class KernelShape:
    """A subset of a fusion group, by its roles in order, and the shape of the product it runs as."""

    pattern: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class KernelLatency:
    """A row of latency.csv."""

    shape: KernelShape
    spec: QuantizerSpec
    implementation: str
    batch_size: int
    latency_us: float
    spread_us: float


def kernel_shapes(layers: Sequence[LayerInfo]) -> list[KernelShape]:
    """Every distinct pattern shape of a model: the non-empty subsets of its fusion groups, roles in layer order.

    Only the last layer of a pattern may have rows that don't fill its tiles.
    """
    groups: dict[str, list[LayerInfo]] = {}
    for layer in layers:
        groups.setdefault(layer.fusion_group, []).append(layer)
    shapes: dict[KernelShape, None] = {}
    for members in groups.values():
        for size in range(1, min(len(members), _MAX_FUSED) + 1):
            for subset in itertools.combinations(members, size):
                if all(layer.out_features % TILE == 0 for layer in subset[:-1]):
                    rows = sum(layer.out_features for layer in subset)
                    shapes[KernelShape("+".join(la.role for la in subset), rows, subset[0].in_features)] = None
    return list(shapes)


def random_weight(spec: QuantizerSpec, shape: KernelShape, device: torch.device) -> QuantizedWeight:
    """A packed weight of random codes: what a kernel's time depends on, without a model."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (size, dtype) in tensor_shapes(spec, shape.out_features, shape.in_features).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(256, size, dtype=dtype, generator=generator).to(device)
        else:
            tensors[name] = torch.randn(size, generator=generator).to(device=device, dtype=dtype)
    seed = None if spec.family is Family.INT else 0
    return from_tensors(spec, shape.out_features, shape.in_features, seed, tensors)


def measure_latency(
    layers: Sequence[LayerInfo],
    specs: Sequence[QuantizerSpec],
    *,
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    journal: Journal,
) -> list[KernelLatency]:
    """Every kernel that supports its shape; rows already in the journal are not measured again.

    Args:
        dtype: of the activations.
    """
    jobs = [
        (shape, spec, implementation, batch)
        for shape in kernel_shapes(layers)
        for spec in specs
        for implementation in IMPLEMENTATIONS.values()
        for batch in batch_sizes
        if implementation.unsupported_reason(spec, shape.out_features, shape.in_features, batch, device) is None
    ]
    rows = []
    with progress("kernel latency", len(jobs), done=journal.count("latency")) as advance, torch.inference_mode():
        for shape, spec, implementation, batch in jobs:
            key = (
                "latency",
                shape.pattern,
                shape.out_features,
                shape.in_features,
                spec.label,
                implementation.name,
                batch,
            )
            if key not in journal:
                module = implementation.linear(random_weight(spec, shape, device))
                x = torch.ones(batch, shape.in_features, device=device, dtype=dtype)
                timing = timer.measure(lambda module=module, x=x: module(x))  # type: ignore[misc]
                journal.add(key, [timing.median_us, timing.spread_us])
                advance()
            rows.append(KernelLatency(shape, spec, implementation.name, batch, *journal[key]))
    return rows


class _Zeros(nn.Module):
    """Stands where a planned layer was and costs no more than an allocation."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def measure_overhead(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    *,
    batch_sizes: Sequence[int],
    context: int,
    timer: Timer,
    journal: Journal,
) -> dict[int, float]:
    """µs of a decoding step beside the planned layers, by batch size.

    Args:
        model: the stock model; its planned layers are put back before this returns.
        context: tokens already in the cache.
    """
    with progress("overhead", len(batch_sizes), done=journal.count("overhead")) as advance, torch.inference_mode():
        for batch in batch_sizes:
            if ("overhead", batch) not in journal:
                with _without_planned_layers(model, layers):
                    journal.add(("overhead", batch), timer.measure(_decoding_step(model, batch, context)).median_us)
                advance()
    return {batch: float(journal["overhead", batch]) for batch in batch_sizes}


def _decoding_step(model: Any, batch: int, context: int) -> Callable[[], None]:
    """A call that decodes one token for `batch` sequences of `context` tokens, again and again from the same cache."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    prompt = torch.ones(batch, context, dtype=torch.int64, device=device)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


class _without_planned_layers:  # noqa: N801 (a context manager, used as a phrase)
    """Swaps planned layers for `_Zeros` inside a `with` block."""

    def __init__(self, model: nn.Module, layers: Sequence[LayerInfo]) -> None:
        self.places = [(*_parent(model, layer.name), layer.out_features) for layer in layers]

    def __enter__(self) -> None:
        self.originals = [getattr(parent, name) for parent, name, _ in self.places]
        for parent, name, rows in self.places:
            setattr(parent, name, _Zeros(rows))

    def __exit__(self, *_: object) -> None:
        for (parent, name, _rows), original in zip(self.places, self.originals, strict=True):
            setattr(parent, name, original)


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
