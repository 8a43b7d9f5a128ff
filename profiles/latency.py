"""Microseconds of every kernel a plan may name.

A row is a (pattern shape, quantizer, implementation, batch size). Only shapes matter, so weights are random bits and
each distinct product is measured once, whatever the roles of its layers. Kernels are timed for an input that is rotated
already, once for all layers that share it: that belongs to the overhead (see `overhead`). The reference implementation
rotates its own.

On a GPU the kernels run back to back in a CUDA graph, each on a weight that no cache holds, as they do in a model; all
of them are compiled beforehand, in as many processes as the machine has cores. The reference implementation, which runs
everything, is measured there only for what no kernel runs. The embedding's rows are the time of a lookup, a call by
itself from cold caches, its inverse rotation included; where the embedding is the head as well, that of both. A row
taken while the GPU was held back (heat, power) is taken again, and marked if it is held back still.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.linear import IMPLEMENTATIONS, LOOKUPS
from ..kernels.random_weight import random_weight
from ..kernels.specs import TILE, QuantizerSpec
from .device import usable_cores
from .gpu_monitor import GpuMonitor
from .inventory import LayerInfo
from .journal import Journal
from .progress import progress
from .schema import EMBED_ROLE, TIED_ROLE
from .timing import Timer

_MAX_FUSED = 3
"""Patterns are listed for groups of up to this many layers; q, k and v are the largest today."""
_ATTEMPTS = 3
"""How often a row is taken at most, while the GPU is held back."""
_PAUSE_SECONDS = 2.0
"""For a GPU to cool down."""
_POOL_BYTES = 512 << 20
"""Of random codes, where no layer needs more; several times any second-level cache."""
_REFERENCE = "reference"
_KERNELS = "tensor_core"
_LOOKUP_OF = {_REFERENCE: _REFERENCE, _KERNELS: "lookup"}
"""What looks rows up where a product of the same weight runs on an implementation."""


@dataclass(frozen=True)
class KernelShape:
    """A subset of a fusion group, by its roles in order, and the shape of the product it runs as."""

    pattern: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Product:
    """What is measured once: a quantizer and implementation at one shape and batch size.

    Attributes:
        lookup: rows are looked up, one a token, and nothing is multiplied.
    """

    out_features: int
    in_features: int
    spec: QuantizerSpec
    implementation: str
    batch_size: int
    lookup: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        """Its place in the journal."""
        return (
            "lookup" if self.lookup else "latency",
            self.out_features,
            self.in_features,
            self.spec.label,
            self.implementation,
            self.batch_size,
        )


@dataclass(frozen=True)
class KernelLatency:
    """A row of latency.csv.

    Attributes:
        throttled: the GPU was held back whenever this was measured.
    """

    shape: KernelShape
    spec: QuantizerSpec
    implementation: str
    batch_size: int
    latency_us: float
    spread_us: float
    throttled: bool


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


def products(
    shapes: Sequence[KernelShape], specs: Sequence[QuantizerSpec], batch_sizes: Sequence[int], device: torch.device
) -> list[Product]:
    """What is to be measured, each distinct product once, shape by shape."""
    found: dict[Product, None] = {}
    for shape, spec, batch in itertools.product(shapes, specs, batch_sizes):
        rows, width = shape.out_features, shape.in_features
        offered = LOOKUPS if shape.pattern == EMBED_ROLE else IMPLEMENTATIONS
        names = [
            name
            for name, implementation in offered.items()
            if implementation.unsupported_reason(spec, rows, width, batch, device) is None
        ]
        if device.type == "cuda" and len(names) > 1:
            names.remove(_REFERENCE)
        for name in names:
            found |= dict.fromkeys(_parts(shape, spec, name, batch))
    return list(found)


def _parts(shape: KernelShape, spec: QuantizerSpec, implementation: str, batch: int) -> list[Product]:
    """What runs one after the other for a pattern: a product, a lookup, or both."""
    where = (shape.out_features, shape.in_features, spec)
    if shape.pattern == EMBED_ROLE:
        return [Product(*where, implementation, batch, lookup=True)]
    product = Product(*where, implementation, batch)
    if shape.pattern == TIED_ROLE:
        return [product, Product(*where, _LOOKUP_OF[implementation], batch, lookup=True)]
    return [product]


def measure_latency(
    layers: Sequence[LayerInfo],
    specs: Sequence[QuantizerSpec],
    *,
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    journal: Journal,
    monitor: GpuMonitor | None = None,
) -> list[KernelLatency]:
    """Every kernel that supports its shape; rows already in the journal are not measured again.

    Args:
        dtype: of the activations where modules are called as they are.
        timer: for these.
        monitor: says whether the GPU was held back; None on other devices.
    """
    shapes = kernel_shapes(layers)
    wanted = products(shapes, specs, batch_sizes, device)
    missing = [product for product in wanted if product.key not in journal]
    graphs = _GraphTimes(missing, device) if any(p.implementation == _KERNELS for p in missing) else None
    with progress("kernel latency", len(wanted), done=len(wanted) - len(missing)) as advance, torch.inference_mode():
        for product in missing:
            if graphs is not None and product.implementation == _KERNELS:
                measure = partial(graphs.measure, product)
            else:
                measure = partial(_measure_module, product, dtype, timer, device)
            journal.add(product.key, _settled(measure, monitor))
            advance()
    rows = []
    for shape, spec, batch in itertools.product(shapes, specs, batch_sizes):
        for name in LOOKUPS if shape.pattern == EMBED_ROLE else IMPLEMENTATIONS:
            keys = [part.key for part in _parts(shape, spec, name, batch)]
            if all(key in journal for key in keys):
                median, spread, throttled = (sum(column) for column in zip(*(journal[k] for k in keys), strict=True))
                rows.append(KernelLatency(shape, spec, name, batch, median, spread, bool(throttled)))
    return rows


def _settled(measure: Callable[[], tuple[float, float]], monitor: GpuMonitor | None) -> list[float]:
    """Median, spread, and 1 if the GPU was held back at every attempt."""
    median = spread = 0.0
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        begun = time.perf_counter()
        median, spread = measure()
        if monitor is None or monitor.throttled_since(begun) is None:
            return [median, spread, 0]
    return [median, spread, 1]


def _measure_module(product: Product, dtype: torch.dtype, timer: Timer, device: torch.device) -> tuple[float, float]:
    generator = torch.Generator(device).manual_seed(0)
    weight = random_weight(product.spec, product.out_features, product.in_features, generator)
    if product.lookup:
        module: nn.Module = LOOKUPS[product.implementation].embedding(weight, dtype)
        x = lookup_tokens(product.batch_size, product.out_features, device)
    else:
        module = IMPLEMENTATIONS[product.implementation].linear(weight)
        x = torch.ones(product.batch_size, product.in_features, device=device, dtype=dtype)
    timing = timer.measure(lambda: module(x))
    return timing.median_us, timing.spread_us


def lookup_tokens(batch_size: int, vocabulary: int, device: torch.device) -> Tensor:
    """Tokens to time a lookup with, ``(batch_size,)``: spread over the vocabulary."""
    return torch.arange(batch_size, device=device) * (vocabulary // batch_size + 1) % vocabulary


class _GraphTimes:
    """Times of the tensor-core kernels: compiles them all, then measures in CUDA graphs.

    Activations are fp16; kernels for bf16 differ in the format of their multiplications only.
    """

    def __init__(self, wanted: Sequence[Product], device: torch.device) -> None:
        from ..kernels.cuda import ops  # noqa: F401 (registers the operators)
        from ..kernels.cuda.decode import new_workspace
        from ..kernels.cuda.jit import device_arch
        from ..kernels.cuda.limits import device_index, device_limits
        from ..kernels.cuda.precompile import compile_all
        from .kernel_timing import Pool, decode_sources

        mine = [product for product in wanted if product.implementation == _KERNELS]
        cases = [(p.spec, p.out_features, p.in_features, p.batch_size) for p in mine]
        sources, words = decode_sources(cases, torch.float16, device_limits(device_index(device)))
        with progress("compiling kernels", len(sources)) as advance:
            compile_all(sources, device_arch(device), min(usable_cores(), len(sources)), advance)
        largest = max(p.spec.size_bytes(p.out_features, p.in_features) for p in mine)
        self._pool = Pool(device, max(_POOL_BYTES, largest + largest // 8))
        self._workspace = new_workspace(words, device)
        self._device = device

    def measure(self, product: Product) -> tuple[float, float]:
        """Median and spread, µs."""
        from .kernel_timing import multiply_call, time_launches

        weights = self._pool.weights(product.spec, product.out_features, product.in_features)
        x = torch.ones(product.batch_size, product.in_features, device=self._device, dtype=torch.float16)
        return time_launches([multiply_call(x, weight, self._workspace) for weight in weights])


def monitored(device: torch.device) -> GpuMonitor | nullcontext[None]:
    """A monitor of a GPU, to be entered with ``with``; nothing for other devices."""
    if device.type != "cuda":
        return nullcontext()
    return GpuMonitor(str(torch.cuda.get_device_properties(device).uuid))
