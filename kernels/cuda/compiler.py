"""CUDA C++ source to machine code with NVRTC, for any architecture and without a GPU, driver, nvcc or host compiler.

A kernel is a file of `SOURCES`, the name of an ``extern "C" __global__`` function in it, and macros that fix shapes
and rates. Sources include one another by ``#include "name.cuh"`` and nothing else: with own typedefs and inline PTX
there is no need for CUDA's headers, which would have to be found on the user's machine and take time to read.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import KernelError

SOURCES = Path(__file__).parent / "sources"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What every kernel must compile for; others of these generations work too."""
_STANDARD = "c++17"
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.MULTILINE)
_INSTALL = 'pip install "msq[cuda]"'


@dataclass(frozen=True)
class Source:
    """One kernel to compile.

    Attributes:
        file: name of the file in `root`.
        entry: the ``extern "C" __global__`` function.
        defines: macros by name; values are written as C literals (True and False as 1 and 0).
        root: folder of the file and of everything it includes.
    """

    file: str
    entry: str
    defines: Mapping[str, int | str] | tuple[tuple[str, str], ...] = ()
    root: Path = field(default=SOURCES)

    def __post_init__(self) -> None:
        pairs = self.defines.items() if isinstance(self.defines, Mapping) else self.defines
        texts = sorted((name, str(int(value) if isinstance(value, bool) else value)) for name, value in pairs)
        object.__setattr__(self, "defines", tuple(texts))

    @property
    def macros(self) -> list[tuple[str, str]]:
        """The macros in a fixed order."""
        return [(name, str(value)) for name, value in dict(self.defines).items()]

    def __str__(self) -> str:
        macros = "".join(f" -D{name}={value}" for name, value in self.macros)
        return f"{self.file}:{self.entry}{macros}"

    def files(self) -> dict[str, str]:
        """The text of the file and of everything it includes, by name, in the order they are met.

        Raises:
            KernelError: a file is missing, or something else than a file of `root` is included.
        """
        texts: dict[str, str] = {}
        waiting = [self.file]
        while waiting:
            name = waiting.pop(0)
            if name in texts:
                continue
            try:
                texts[name] = (self.root / name).read_text(encoding="utf-8")
            except OSError as cause:
                raise KernelError(f"kernel source {name} can't be read ({cause}); reinstall msq.") from cause
            for bracket, included in _INCLUDE.findall(texts[name]):
                if bracket == "<":
                    raise KernelError(f'{name} includes <{included}>; kernel sources include only "files" beside them.')
                waiting.append(included)
        return texts

    def digest(self, arch: str) -> str:
        """SHA-256 over all that decides the machine code: sources, macros, options, architecture, compiler."""
        parts = [compiler_version(), arch, _STANDARD, self.file, self.entry]
        parts += [text for macro in self.macros for text in macro]
        parts += [text for file in self.files().items() for text in file]
        sha = hashlib.sha256()
        for part in parts:
            encoded = part.encode()
            sha.update(len(encoded).to_bytes(8, "little") + encoded)
        return sha.hexdigest()


@cache
def cuda_core() -> Any:
    """The package cuda.core.

    Raises:
        KernelError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.core")
    except ImportError as cause:
        raise KernelError(f"CUDA kernels need the package cuda-core ({cause}): {_INSTALL}.") from cause


@cache
def compiler_version() -> str:
    """Version of NVRTC, and of the package it comes from where that is installed: ``13.0 (nvidia-cuda-nvrtc 13.0.88)``.

    Raises:
        KernelError: NVRTC, or the package that calls it, is not installed.
    """
    cuda_core()
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as cause:  # ImportError, or one of several that the search for the library raises
        reason = " ".join(str(cause).split())
        raise KernelError(f"CUDA kernels need NVRTC, which can't be loaded ({reason}): {_INSTALL}.") from cause
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC doesn't tell its version ({status}): {_INSTALL} --force-reinstall.")
    for package in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}"):
        try:
            return f"{major}.{minor} ({package} {importlib.metadata.version(package)})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{major}.{minor}"


def compile_source(source: Source, arch: str) -> bytes:
    """Machine code (a cubin) of one kernel; always runs the compiler.

    Args:
        arch: such as ``sm_90``.

    Raises:
        KernelError: NVRTC is missing, or the source doesn't compile; the message holds the compiler's log, which quotes
            the source line.
    """
    version = compiler_version()
    core = cuda_core()
    text = source.files()[source.file]
    options = core.ProgramOptions(
        name=source.file, arch=arch, std=_STANDARD, define_macro=source.macros or None, include_path=str(source.root)
    )
    try:
        code = core.Program(text, "c++", options).compile("cubin").code
    except Exception as cause:  # cuda.core's own error types are not public
        log = str(cause).replace("\x00", "").strip()
        raise KernelError(f"{source} doesn't compile for {arch} with NVRTC {version}:\n{log}") from cause
    return bytes(code)
