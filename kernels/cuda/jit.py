"""Kernels compiled just in time: `compile_cubin` for any architecture, `load` for a GPU of this machine.

    kernel = load(Source("hadamard.cu", "rotate", {"SIZE": 4096}), device)
    kernel.launch(grid, block, (x, out, rows), shared_bytes=16384)

The first use of a kernel compiles it (a fraction of a second, logged at level INFO), later processes read it from the
disk (`cubin_cache`), and later calls of one process find it loaded. Loading is not allowed while a CUDA graph is being
captured: run a module once, or `load` its kernels, before.
"""

from __future__ import annotations

import logging
import threading
import time

import torch

from ..errors import KernelError
from . import cubin_cache
from .compiler import ARCHITECTURES, SOURCES, Source, compile_source, compiler_version
from .cubin_cache import cache_directory, cache_size
from .launcher import Kernel
from .limits import device_index

__all__ = [
    "ARCHITECTURES",
    "SOURCES",
    "Kernel",
    "KernelError",
    "Source",
    "cache_directory",
    "cache_size",
    "compile_cubin",
    "compiler_version",
    "device_arch",
    "forget",
    "load",
]

_log = logging.getLogger(__name__)
_loaded: dict[tuple[Source, int], Kernel] = {}
_lock = threading.Lock()


def compile_cubin(source: Source, arch: str) -> bytes:
    """Machine code of a kernel, from the disk cache or the compiler.

    Args:
        arch: such as ``sm_90``.

    Raises:
        KernelError: NVRTC is missing or the source doesn't compile.
    """
    digest = source.digest(arch)
    code = cubin_cache.read(digest)
    if code is None:
        begun = time.perf_counter()
        code = compile_source(source, arch)
        _log.info("compiled %s for %s in %.0f ms", source, arch, 1e3 * (time.perf_counter() - begun))
        cubin_cache.write(digest, code)
    return code


def device_arch(device: torch.device) -> str:
    """The architecture of a CUDA device: ``sm_90``.

    Raises:
        KernelError: torch has no CUDA device, or it is older than sm_80.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise KernelError(f"expected a CUDA device with a working driver; got '{device}': see `msq doctor`.")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelError(
            f"msq's kernels need compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}: use the reference implementation."
        )
    return f"sm_{major}{minor}"


def load(source: Source, device: torch.device) -> Kernel:
    """A kernel on a device, ready to launch; the same object for the same arguments.

    Raises:
        KernelError: no such device, a failed compilation, or a graph capture under way.
    """
    arch = device_arch(device)
    index = device_index(device)
    kernel = _loaded.get((source, index))
    if kernel is not None:
        return kernel
    with _lock:
        if (source, index) not in _loaded:
            if torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    f"{source} isn't loaded yet and a CUDA graph is being captured: run the module once before."
                )
            _loaded[source, index] = Kernel(str(source), source.entry, compile_cubin(source, arch), index)
        return _loaded[source, index]


def forget(source: Source) -> None:
    """Drop a kernel from this process, so that `load` reads its file again; for measuring what a first use costs."""
    with _lock:
        for known in [key for key in _loaded if key[0] == source]:
            del _loaded[known]
