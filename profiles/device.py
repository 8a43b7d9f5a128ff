"""What a profile says of the device it was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .schema import DevicePart


def describe_device(device: torch.device, **details: float | str) -> DevicePart:
    """Name and facts of a device, those that times depend on; `details` are added."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts: dict[str, Any] = {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
        return DevicePart(name=properties.name, kind="cuda", details=facts | details)
    facts = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return DevicePart(name=_processor_name(), kind="cpu", details=facts | details)


def usable_cores() -> int:
    """Cores that this process may run on, where the system tells (Linux); else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def driver_version() -> str:
    """Version of the NVIDIA driver as `nvidia-smi` tells it; "unknown" where it doesn't."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return printed.splitlines()[0] if printed else "unknown"


def _processor_name() -> str:
    """The processor as Linux names it, else what the platform module knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
