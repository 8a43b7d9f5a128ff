"""The input rotation on a GPU: `rotation.rotate` for fp16 and bf16 rows, alone or with what stands before it.

`rotation_plan` says which kernels a size takes; here they are compiled, and launched on rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import KernelError
from .jit import Kernel, Source, load
from .rotation_plan import MANY_ROWS, Division, Pass, RotationTables, division, fuses_norm, passes

ROW_FORMATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""What ``rows.cuh`` calls the formats of rows."""


@dataclass(frozen=True)
class _Step:
    """A compiled pass: launch it with `blocks` blocks a row."""

    kernel: Kernel
    blocks: int
    threads: int
    scale: float


def source(
    step: Pass,
    split: Division,
    *,
    dtypes: tuple[torch.dtype, torch.dtype],
    signs: bool,
    norm: bool,
    gate: bool,
    add: bool = False,
    out_signs: bool = False,
) -> Source:
    """The kernel of one pass.

    Args:
        dtypes: of what is read and written.
        signs: whether the random signs are applied first (the first pass of a rotation).
        out_signs: whether they are applied to the results (the last pass of an inverse rotation).
        norm, gate, add: what stands before (`rotate_normed`, `rotate_gated`, `rotate_added`).
    """
    macros = {"OUTER": step.outer, "ORDER": step.order, "INNER": step.inner, "COLUMNS": step.columns}
    macros |= {"VECTOR": split.vector, "WARPS_K": split.warps_k, "WARPS_J": split.warps_j, "GROUP": split.group}
    macros |= {"IN": ROW_FORMATS[dtypes[0]], "OUT": ROW_FORMATS[dtypes[1]]}
    flags = {"FWHT": step.transform, "SIGNS": signs, "OUT_SIGNS": out_signs, "NORM": norm, "GATE": gate, "ADD": add}
    return Source("hadamard.cu", "rotate", macros | {name: int(value) for name, value in flags.items()})


def sources(
    size: int,
    many_rows: bool,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    gate: bool = False,
    add: bool = False,
    inverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> list[Source]:
    """The kernels of one rotation, in order.

    Args:
        dtype: of the rows.
        norm, gate, add: what stands before (see `source`).
        inverse: of the inverse rotation.
        out_dtype: of the results; None for `dtype`.
    """
    steps = passes(size, many_rows)
    between = [dtype, *[torch.float32] * (len(steps) - 1), out_dtype or dtype]
    return [
        source(
            step,
            division(step, many_rows),
            dtypes=(between[n], between[n + 1]),
            signs=n == 0 and not inverse,
            norm=norm and n == 0,
            gate=gate and n == 0,
            add=add and n == 0,
            out_signs=inverse and n == len(steps) - 1,
        )
        for n, step in enumerate(steps)
    ]


@cache
def _steps(
    size: int,
    many_rows: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm: bool,
    gate: bool,
    add: bool,
    inverse: bool,
    device: torch.device,
) -> tuple[_Step, ...]:
    found = []
    flags = {"norm": norm, "gate": gate, "add": add, "inverse": inverse}
    compiled = sources(size, many_rows, dtypes[0], out_dtype=dtypes[1], **flags)
    for step, code in zip(passes(size, many_rows), compiled, strict=True):
        split = division(step, many_rows)
        slices = step.order // (split.group * split.warps_j)
        blocks = slices * (step.inner // step.columns) * step.outer
        scale = 1 / math.sqrt(step.order * (step.columns if step.transform else 1))
        found.append(_Step(load(code, device), blocks, 32 * split.warps_k * split.warps_j, scale))
    return tuple(found)


def rotate(x: Tensor, tables: RotationTables) -> Tensor:
    """`rotation.rotate` of CUDA rows, in float32 inside, in the dtype of `x`.

    Args:
        x: ``(rows, size)`` fp16 or bf16, or float32; rows may be apart.

    Returns:
        ``(rows, size)``, contiguous.
    """
    return _run(x, None, tables, norm=False, epsilon=0.0)


def unrotate(x: Tensor, tables: RotationTables, dtype: torch.dtype) -> Tensor:
    """`rotation.unrotate` of CUDA rows, in float32 inside.

    Args:
        x: as for `rotate`.
        tables: of the inverse rotation.
        dtype: of the result, rounded once.
    """
    return _run(x, None, tables, norm=False, epsilon=0.0, inverse=True, out_dtype=dtype)


def rotate_normed(x: Tensor, weight: Tensor, epsilon: float, tables: RotationTables) -> Tensor:
    """The rotation of ``x / sqrt(mean(x^2) + epsilon) * weight``, nothing rounded before the end.

    Args:
        x: as for `rotate`; `fuses_norm` must hold for its size.
        weight: ``(size,)``, dtype of `x`.
    """
    _check_norm(x)
    return _run(x, weight, tables, norm=True, epsilon=epsilon)


def _check_norm(x: Tensor) -> None:
    if not fuses_norm(x.shape[1]):
        raise KernelError(f"a rotation of {x.shape[1]} takes several passes or blocks: apply the norm before it.")


def rotate_added(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, tables: RotationTables
) -> tuple[Tensor, Tensor]:
    """`rotate_normed` of ``x + residual``, and that sum, rounded to the dtype of `x` before the norm.

    Args:
        x, residual: as `x` for `rotate`, of one shape and dtype; `fuses_norm` must hold for their size.
        weight: ``(size,)``, dtype of `x`.

    Returns:
        The rotation and the sum, ``(rows, size)`` each.
    """
    _check_norm(x)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _run(x, weight, tables, norm=True, epsilon=epsilon, residual=residual, total=total), total


def rotate_gated(gate: Tensor, up: Tensor, tables: RotationTables) -> Tensor:
    """The rotation of ``silu(gate) * up``, nothing rounded before the end.

    Args:
        gate, up: as `x` for `rotate`, of one shape and dtype.
    """
    return _run(gate, up, tables, norm=False, epsilon=0.0)


def _aligned(x: Tensor) -> Tensor:
    """`x` itself where the kernels can read its rows in pieces of 16 bytes, else a copy."""
    piece = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % piece == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _run(
    x: Tensor,
    second: Tensor | None,
    tables: RotationTables,
    *,
    norm: bool,
    epsilon: float,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    inverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows, size = x.shape
    many_rows, dtype = rows >= MANY_ROWS, out_dtype or x.dtype
    gate, add = second is not None and not norm, residual is not None
    steps = _steps(size, many_rows, (x.dtype, dtype), norm, gate, add, inverse, x.device)
    matrices = tables.matrices[-len(steps) :] if many_rows else tables.matrices
    source_rows = _aligned(x)
    if second is not None:
        second = second.contiguous() if norm else _aligned(second)
    residual = None if residual is None else _aligned(residual)
    for number, step in enumerate(steps):
        written = dtype if number == len(steps) - 1 else torch.float32
        out = torch.empty(rows, size, dtype=written, device=x.device)
        arguments = (
            source_rows,
            source_rows.stride(0),
            second,
            0 if second is None or norm else second.stride(0),
            out,
            tables.signs,
            matrices[number],
            step.scale,
            epsilon,
            residual,
            0 if residual is None else residual.stride(0),
            total,
        )
        if rows:
            step.kernel.launch(step.blocks * rows, step.threads, arguments, programmatic=True)
        source_rows, second, residual, total = out, None, None, None
    return source_rows
