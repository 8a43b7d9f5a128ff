"""How long a call takes: one interface for every device, so that rows of a latency table mean the same.

A timer warms up, then measures single calls and gives their median and spread. Before each call it writes a buffer that
drives the weights out of a GPU's second-level cache, or out of a CPU core's own caches (not out of a large shared one),
as a model does that runs layer after layer.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """A measured call.

    Attributes:
        median_us: median of the runs, microseconds.
        spread_us: third minus first quartile of the runs, microseconds.
        runs: how many were measured.
    """

    median_us: float
    spread_us: float
    runs: int


class Timer(ABC):
    """Measures calls on one device.

    Args:
        warm_up: unmeasured calls before.
        runs: measured calls, at least 4.
        seconds: stop early (after 4 runs) when a call's measuring has taken this long.
    """

    def __init__(self, *, warm_up: int = 2, runs: int = 15, seconds: float = 1.0) -> None:
        self.warm_up, self.runs, self.seconds = warm_up, runs, seconds

    @abstractmethod
    def time_once(self, call: Callable[[], object]) -> float:
        """One cold call, microseconds."""

    def measure(self, call: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> Timing:
        """Median and spread of a call; `before` runs ahead of each, untimed."""
        for _ in range(self.warm_up):
            before()
            call()
        begun = time.perf_counter()
        times: list[float] = []
        while len(times) < self.runs and (len(times) < 4 or time.perf_counter() - begun < self.seconds):
            before()
            times.append(self.time_once(call))
        low, middle, high = statistics.quantiles(times, n=4)
        return Timing(middle, high - low, len(times))


class CpuTimer(Timer):
    """Wall-clock time of a call; a pass over a buffer larger than a core's own caches precedes it."""

    _EVICTION_BYTES = 8 << 20

    def __init__(self, **options: int | float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._evict = torch.zeros(self._EVICTION_BYTES // 4)

    def time_once(self, call: Callable[[], object]) -> float:
        self._evict.add_(1)
        begun = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begun) / 1e3


class CudaTimer(Timer):
    """Device time between two events.

    Writes of twice the second-level cache precede each call, several of them, so that the GPU is still busy while the
    call is being queued and what is measured is the work, not the way to it.
    """

    _PASSES = 8

    def __init__(self, device: torch.device, **options: int | float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._evict = torch.empty(2 * cache_bytes, dtype=torch.uint8, device=device)

    def time_once(self, call: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(self._PASSES):
            self._evict.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer of a device's kind."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()
