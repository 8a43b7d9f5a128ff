"""Timing of short kernels: cold caches, CUDA graphs, median and spread.

Weights are slices of one large random buffer (any bits are valid codes), as many as it takes to drive one another out
of the second-level cache, so every launch of a graph reads memory. A graph holds a few dozen launches back to back and
is replayed several times; its time over its launches is one measurement, gaps between launches included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..kernels.codebooks import codebook
from ..kernels.cuda.decode import MAX_BATCH
from ..kernels.cuda.jit import Source
from ..kernels.cuda.layout import UNIT_COLUMNS, PreparedWeight, pair_width
from ..kernels.cuda.limits import Limits
from ..kernels.cuda.tuning import launch_for
from ..kernels.cuda.tuning_choice import tune
from ..kernels.specs import TILE, QuantizerSpec

_CACHE_MULTIPLE = 3
_FEWEST_LAUNCHES = 24
Case = tuple[QuantizerSpec, int, int, int]
"""Quantizer, out_features, in_features and batch size of a product."""


class Pool:
    """Random bytes on a device, handed out in slices.

    Args:
        size_bytes: of the buffer; more than `_CACHE_MULTIPLE` times the second-level cache.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self.device = device
        words = torch.empty(size_bytes // 8, dtype=torch.int64, device=device)
        self._bytes = words.random_().view(torch.uint8)
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._turn_bytes = min(_CACHE_MULTIPLE * cache_bytes, size_bytes)
        self._weights: dict[tuple[QuantizerSpec, int, int, bool], list[PreparedWeight]] = {}

    def slices(self, size_bytes: int, *, cold: bool = True) -> list[Tensor]:
        """uint8 views of `size_bytes`: enough that none is cached when its turn comes again; one where not `cold`."""
        step = -(-size_bytes // 256) * 256
        count = min(max(2, -(-self._turn_bytes // step)), len(self._bytes) // step) if cold else 1
        return [self._bytes[i * step : i * step + size_bytes] for i in range(count)]

    def weights(
        self, spec: QuantizerSpec, out_features: int, in_features: int, *, cold: bool = True
    ) -> list[PreparedWeight]:
        """Layers of random codes and scales, of one codebook as in a model; the same ones for the same arguments."""
        key = (spec, out_features, in_features, cold)
        if key not in self._weights:
            self._weights[key] = self._new_weights(*key)
        return self._weights[key]

    def _new_weights(
        self, spec: QuantizerSpec, out_features: int, in_features: int, cold: bool
    ) -> list[PreparedWeight]:
        row_tiles = out_features // TILE
        shapes = [
            (row_tiles, -(-tiles * TILE // UNIT_COLUMNS), 128 * pair_width(rate))
            for tiles, rate in zip(spec.segment_tiles(in_features), spec.rates, strict=True)
        ]
        sizes = [rows * units * unit_bytes for rows, units, unit_bytes in shapes]
        found, table = [], codebook(spec).to(self.device)
        for part in self.slices(sum(sizes), cold=cold):
            units = tuple(piece.view(shape) for piece, shape in zip(part.split(sizes), shapes, strict=True))
            scales = torch.rand(out_features, device=part.device).half()
            found.append(PreparedWeight(spec, out_features, in_features, units, scales, table))
        return found


def decode_sources(cases: Sequence[Case], dtype: torch.dtype, limits: Limits) -> tuple[list[Source], int]:
    """The distinct decode kernels that products run on, and the words of workspace that all of them can share.

    Batches above the decode kernels' are left out: they run on another kernel.
    """
    sources: dict[Source, None] = {}
    words = 0
    for spec, rows, width, batch in cases:
        tuning = tune(spec, rows, width, batch, limits) if batch <= MAX_BATCH else None
        launch = None if tuning is None else launch_for(spec, rows, width, batch, dtype, limits, tuning)
        if launch is not None:
            sources[launch.source] = None
            words = max(words, launch.workspace_words)
    return list(sources), words


def multiply_call(x: Tensor, weight: PreparedWeight, workspace: Tensor) -> Callable[[], Tensor]:
    """The product of a layer as its module runs it, the input rotated already."""
    spec = weight.spec
    arguments = (list(weight.units), weight.scales, weight.codebook, None, workspace)
    fields = (str(spec.family), spec.bits, spec.state_bits)
    return lambda: torch.ops.msq.multiply(x, *arguments, *fields)


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def time_launches(
    calls: Sequence[Callable[[], object]], replays: int = 11, warm_seconds: float = 0.0
) -> tuple[float, float]:
    """Median and interquartile range in microseconds of a call, the calls taken in turn inside a CUDA graph.

    `warm_seconds`: to replay it before; a GPU that was idle while the host prepared is slower at first.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    launches = max(len(calls), _FEWEST_LAUNCHES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_capture_stream()):
        graph.capture_begin()
        for i in range(launches):
            calls[i % len(calls)]()
        graph.capture_end()
    for _ in range(2):
        graph.replay()
    warm_until = time.perf_counter() + warm_seconds
    while time.perf_counter() < warm_until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / launches)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low
