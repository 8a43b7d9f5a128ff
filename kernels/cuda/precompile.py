"""Compile many kernels at once, in processes that share the cache on disk."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from .compiler import Source
from .jit import compile_cubin


def compile_one(source: Source, arch: str) -> float:
    """Compile one kernel into the cache; the seconds it took."""
    begun = time.perf_counter()
    compile_cubin(source, arch)
    return time.perf_counter() - begun


def compile_all(
    sources: Sequence[Source], arch: str, processes: int, advance: Callable[[], None] | None = None
) -> list[float]:
    """Fill the cache of compiled kernels.

    Args:
        processes: how many compile; each is a fresh interpreter.
        advance: called after each kernel.

    Returns:
        The seconds that each took.

    Raises:
        KernelError: a kernel doesn't compile.
    """
    seconds = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for taken in pool.map(compile_one, sources, itertools.repeat(arch), chunksize=2):
            seconds.append(taken)
            if advance is not None:
                advance()
    return seconds
