"""Kernels on a CPU: their source compiled by a host compiler against `emulation/ptx.cuh` and run thread by thread.

It shows that indices, shapes, sums and barriers are right, of the very source that runs on a GPU; what it can't show is
races between warps that a lucky order hides, and inline PTX.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from msq.kernels.cuda.jit import Source

HERE = Path(__file__).parent / "emulation"
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="running kernels on a CPU needs g++ or clang++")


class Emulated:
    """A kernel compiled for this CPU, launched like `jit.Kernel`."""

    def __init__(self, source: Source, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in source.files().items():
            (folder / name).write_text(text)
        for stand_in in HERE.iterdir():
            (folder / stand_in.name).write_text(stand_in.read_text())
        (folder / "main.cpp").write_text(
            f'#include "{source.file}"\n'
            'extern "C" __attribute__((visibility("default")))\n'
            "void launch(unsigned grid, unsigned block, unsigned cluster, void** args) "
            f"{{ emulator::run({source.entry}, grid, block, cluster, args); }}\n"
        )
        # hidden, else `inline` variables are shared with the libraries loaded before
        flags = ["-std=c++17", "-O1", "-w", "-pthread", "-shared", "-fPIC", "-fvisibility=hidden"]
        command = [str(COMPILER), *flags, "-o", "kernel.so", "main.cpp"]
        command += [f"-D{name}={value}" for name, value in source.macros]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source}\n{done.stderr}"
        self._launch = ctypes.CDLL(str(folder / "kernel.so")).launch

    def launch(self, grid: int, block: int, args: tuple[object, ...], *, cluster: int = 1, **_: object) -> None:
        """As `jit.Kernel.launch`; returns when the kernel has ended."""
        cells = [_cell(argument) for argument in args]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        self._launch(grid, block, cluster, pointers)


def _cell(argument: object) -> ctypes._SimpleCData:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, (int, np.integer)):
        return ctypes.c_int(int(argument))
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_void_p(None)
