"""What of msq works on this machine, and why something doesn't."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..profiles.errors import ProfileError
from ..profiles.inventory import inventory
from ..profiles.model_source import EMBEDDED, embedded_models
from ..solvers.registry import abilities

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy", "pandas", "pydantic", "ortools", "cvxpy", "pulp")


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: what was checked.
        works: whether it can be used.
        detail: version or facts; if it doesn't work, why not and what to do.
    """

    name: str
    works: bool
    detail: str


def examine() -> list[Finding]:
    """All checks; needs nothing but what planning needs, imports torch only to ask for a GPU."""
    findings = [Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_package(name) for name in _PACKAGES]
    findings += [_gpu(), *(_solver(a.name, a.summary, a.missing) for a in abilities())]
    findings += [_embedded(name) for name in embedded_models()]
    free = shutil.disk_usage(Path.cwd()).free
    findings.append(Finding("disk", free > 1 << 30, f"{free / 2**30:.1f} GiB free here"))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, f"not installed: pip install {name}")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as cause:
        return Finding("gpu", False, f"torch can't be imported: {cause}")
    if torch.version.cuda is None:
        return Finding("gpu", False, "this torch is built without CUDA; profiling, applying and running use the CPU")
    if not torch.cuda.is_available():
        return Finding("gpu", False, "torch has CUDA but finds no usable device; check the driver with nvidia-smi")
    properties = torch.cuda.get_device_properties(0)
    return Finding(
        "gpu", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, runs the reference only"
    )


def _solver(name: str, summary: str, missing: tuple[str, ...]) -> Finding:
    if missing:
        return Finding(f"solver {name}", False, f"needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return Finding(f"solver {name}", True, summary)


def _embedded(name: str) -> Finding:
    try:
        found = inventory(EMBEDDED / name)
    except ProfileError as cause:
        return Finding(f"model {name}", False, f"{cause}; reinstall msq")
    return Finding(f"model {name}", True, f"{found.total_parameters} parameters, {len(found.layers)} planned layers")
