"""Clocks, temperature and throttling of a GPU while it is measured, read from `nvidia-smi` in the background.

One `nvidia-smi` process prints a line every fifth of a second; a thread keeps them. A measurement asks afterwards
whether the GPU was held back while it ran.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType

INTERVAL_MS = 200
_FIELDS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The field's name in newer drivers, and in older ones."""
_HELD_BACK = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons that make a time worthless; idleness and chosen clocks do not."""


@dataclass(frozen=True)
class GpuSample:
    """One line of `nvidia-smi`.

    Attributes:
        seconds: when it was read, `time.perf_counter`.
        reasons: NVML's bits for why clocks are below their highest.
    """

    seconds: float
    sm_clock_mhz: float
    memory_clock_mhz: float
    temperature_c: float
    power_w: float
    reasons: int

    @property
    def throttled(self) -> str | None:
        """Why the GPU is held back; None where it isn't."""
        return next((name for bit, name in _HELD_BACK.items() if self.reasons & bit), None)


def parse_sample(line: str, seconds: float) -> GpuSample | None:
    """A line of ``--format=csv,noheader,nounits``; None where the GPU doesn't tell its clocks or reasons."""
    cells = [cell.strip() for cell in line.split(",")]
    try:
        sm, memory, temperature, power = (float(cell) for cell in cells[:4])
        return GpuSample(seconds, sm, memory, temperature, power, int(cells[4], 16))
    except (ValueError, IndexError):
        return None


class GpuMonitor:
    """Samples of one GPU inside a ``with`` block.

    Args:
        uuid: of the GPU, as `torch.cuda.get_device_properties` tells it.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self.samples: list[GpuSample] = []

    def __enter__(self) -> GpuMonitor:
        command = self._command()
        if command is not None:
            self._process = subprocess.Popen(
                [*command, "-lms", str(INTERVAL_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._thread is not None:
            self._process.terminate()
            self._thread.join()
            self._process.wait()

    def _command(self) -> list[str] | None:
        """What prints a line; None where there is no `nvidia-smi` or it doesn't know the fields."""
        if shutil.which("nvidia-smi") is None:
            return None
        for reasons in _REASONS:
            fields = f"--query-gpu={_FIELDS},{reasons}"
            command = ["nvidia-smi", fields, "--format=csv,noheader,nounits", "-i", self._uuid]
            printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if parse_sample(printed.strip(), 0.0) is not None:
                return command
        return None

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            sample = parse_sample(line, time.perf_counter())
            if sample is not None:
                self.samples.append(sample)

    def throttled_since(self, seconds: float) -> str | None:
        """Why the GPU was held back in a sample taken since then, or in the last one before; None where it wasn't."""
        recent = [sample for sample in self.samples if sample.seconds >= seconds - INTERVAL_MS / 1e3]
        return next((reason for sample in recent if (reason := sample.throttled)), None)

    def summary(self) -> dict[str, float]:
        """What a profile records; empty where `nvidia-smi` told nothing."""
        if not self.samples:
            return {}
        return {
            "sm_clock_mhz": statistics.median(sample.sm_clock_mhz for sample in self.samples),
            "sm_clock_lowest_mhz": min(sample.sm_clock_mhz for sample in self.samples),
            "memory_clock_mhz": statistics.median(sample.memory_clock_mhz for sample in self.samples),
            "temperature_highest_c": max(sample.temperature_c for sample in self.samples),
            "power_highest_w": max(sample.power_w for sample in self.samples),
        }
