"""What of msq works on this machine, and why something doesn't."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..kernels.cuda.compiler import compiler_version
from ..kernels.cuda.cubin_cache import cache_directory, cache_size
from ..kernels.errors import KernelError
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
    findings += [*_gpus(), _compiler(), _kernel_cache(), *(_solver(a.name, a.summary, a.missing) for a in abilities())]
    findings += [_embedded(name) for name in embedded_models()]
    free = shutil.disk_usage(Path.cwd()).free
    findings.append(Finding("disk", free > 1 << 30, f"{free / 2**30:.1f} GiB free here"))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, f"not installed: pip install {name}")


def _gpus() -> list[Finding]:
    try:
        import torch
    except ImportError as cause:
        return [Finding("gpu", False, f"torch can't be imported: {cause}")]
    if torch.version.cuda is None:
        return [Finding("gpu", False, "this torch is built without CUDA; profiling, applying and running use the CPU")]
    if not torch.cuda.is_available():
        return [Finding("gpu", False, "torch has CUDA but finds no usable device; check the driver with nvidia-smi")]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors"
        )
        if properties.major < 8:
            facts += "; msq's kernels need sm_80 or newer: only the reference runs here"
        findings.append(Finding(f"gpu {index}", properties.major >= 8, facts))
    return findings


def _compiler() -> Finding:
    try:
        return Finding("nvrtc", True, compiler_version())
    except KernelError as cause:
        return Finding("nvrtc", False, str(cause))


def _kernel_cache() -> Finding:
    try:
        kernels, size_bytes = cache_size()
        return Finding("kernel cache", True, f"{cache_directory()}: {kernels} kernels, {size_bytes / 2**20:.1f} MiB")
    except (KernelError, OSError) as cause:
        return Finding("kernel cache", False, str(cause))


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
