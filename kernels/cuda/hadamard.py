"""The input rotation on a GPU: `rotation.rotate` for fp16 and bf16 rows, alone or with what stands before it.

A rotation is cut into *passes*. The row is seen as ``(outer, order, inner)``; a pass multiplies the middle dimension by
a small matrix of +1 and -1 (the Kronecker product of some factors of the plan), and the last pass ends with a fast
Walsh-Hadamard transform of the up to 256 columns that are left. One pass is enough for almost every size: 4096 is
16 x 256, 14336 is 56 x 256 (28 from Paley, 2 from Sylvester), 11008 is 344 x 32. Sizes with several odd factors take
two, with float32 between them. A block computes a few of the ``order`` outputs and reads the whole row, so that one row
keeps many multiprocessors busy; sums are float32 and in a fixed order.

The tables that a size needs are tensors of the caller (`RotationTables`), made once and passed with every call: nothing
is allocated or copied behind the back of a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import KernelError
from ..hadamard import hadamard_matrix, hadamard_plan
from ..rotation import rotation_signs
from .jit import Kernel, Source, load

_MAX_COLUMNS = 256
"""Columns of the closing transform: 8 for each lane of a warp."""
_MAX_ORDER = {False: 640, True: 192}
"""Largest matrix of a pass, for few and many rows: factors are merged up to it, which saves launches and costs work."""
MANY_ROWS = 32
"""From this many rows on, blocks share less of the work and repeat less of it."""
SHARED_LIMIT = 48 << 10
"""Bytes of shared memory that a block may have without asking."""
_FORMATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MATRIX_GROUPS = 8
"""Outputs whose signs share a byte of a matrix table, at most."""


@dataclass(frozen=True)
class Pass:
    """One multiplication along the middle of ``(outer, order, inner)``.

    Attributes:
        orders: orders of the Hadamard matrices whose Kronecker product is applied; `order` is their product.
        columns: columns that a block takes, a power of two that divides `inner`.
        transform: whether the columns are transformed as well (then ``columns == inner``).
    """

    outer: int
    orders: tuple[int, ...]
    inner: int
    columns: int
    transform: bool

    @property
    def order(self) -> int:
        return math.prod(self.orders)


@dataclass(frozen=True)
class Division:
    """How the blocks of a pass share its work; the macros of ``hadamard.cu``.

    Attributes:
        vector: neighbouring columns that a lane loads at once.
        warps_k: warps that split the sum.
        warps_j: warps that take different outputs.
        group: outputs of a warp.
    """

    vector: int
    warps_k: int
    warps_j: int
    group: int


def _power_of_two_in(number: int) -> int:
    return number & -number


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(limit, number), 0, -1) if number % d == 0)


@cache
def passes(size: int, many_rows: bool) -> tuple[Pass, ...]:
    """How a row of `size` numbers is rotated; the product of the passes is the matrix of `hadamard_plan`."""
    plan = hadamard_plan(size)
    odd = [order for order in plan.factors if order & (order - 1)]
    power = plan.block // math.prod(odd)
    columns = min(power, _MAX_COLUMNS)
    groups: list[tuple[int, ...]] = []
    for order in [*odd, *([power // columns] if power > columns else [])]:
        if groups and math.prod(groups[-1]) * order <= _MAX_ORDER[many_rows]:
            groups[-1] = (*groups[-1], order)
        else:
            groups.append((order,))
    found, outer = [], size // plan.block
    for group in groups or [()]:
        inner = size // outer // math.prod(group)
        last = inner == columns
        tile = columns if last else min(_power_of_two_in(inner), _MAX_COLUMNS)
        found.append(Pass(outer, group, inner, tile, last))
        outer *= math.prod(group)
    return tuple(found)


@cache
def division(step: Pass, many_rows: bool) -> Division:
    """A division of work that suits few rows (split the sums, four outputs a block) or many (repeat nothing)."""
    if not many_rows:
        vector = min(8, step.columns)
        terms = step.order * step.columns // (32 * vector)  # of a lane, with one warp
        warps_k = 1
        while warps_k < 16 and terms > 4 * warps_k:
            warps_k *= 2
        room = (SHARED_LIMIT - 1024) // (warps_k * 32 * vector * 4)
        return Division(vector, warps_k, 1, _largest_divisor(step.order, min(4, room)))
    vector = step.columns // 32 if step.columns >= 32 else min(8, step.columns)
    group = _largest_divisor(step.order, _MATRIX_GROUPS)
    alone = step.columns >= 32  # a warp has whole sums: no shared memory
    limit = 8 if alone else max(1, SHARED_LIMIT // (group * vector * 32 * 4) - 1)
    return Division(vector, 1, _largest_divisor(step.order // group, min(8, limit)), group)


def matrix_table(step: Pass, group: int) -> Tensor:
    """Signs of a pass's matrix M, ``(order // group, order)`` uint8: bit g of ``[b, i]`` is M[i, b * group + g] < 0."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in step.orders:
        matrix = torch.kron(matrix, hadamard_matrix(order))
    negative = (matrix < 0).T.reshape(step.order // group, group, step.order).to(torch.int32)
    weights = 1 << torch.arange(group, dtype=torch.int32)
    return (negative * weights[:, None]).sum(1).to(torch.uint8)


@dataclass(frozen=True)
class RotationTables:
    """What the kernels of one rotation read.

    Attributes:
        signs: ``(ceil(size / 8),)`` uint8, bit ``i % 8`` of byte ``i // 8`` set where the sign of input i is -1.
        matrices: `matrix_table` of every pass for few rows, then of every pass for many.
    """

    signs: Tensor
    matrices: tuple[Tensor, ...]


@cache
def _matrices(size: int) -> tuple[Tensor, ...]:
    return tuple(
        matrix_table(step, division(step, many_rows).group)
        for many_rows in (False, True)
        for step in passes(size, many_rows)
    )


def rotation_tables(size: int, seed: int, device: torch.device) -> RotationTables:
    """The tables of one rotation on a device."""
    signs = np.packbits(rotation_signs(size, seed).numpy() < 0, bitorder="little")
    return RotationTables(torch.from_numpy(signs).to(device), tuple(table.to(device) for table in _matrices(size)))


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
) -> Source:
    """The kernel of one pass.

    Args:
        dtypes: of what is read and written.
        signs: whether the random signs are applied first (the first pass of a rotation).
        norm, gate, add: what stands before (`rotate_normed`, `rotate_gated`, `rotate_added`).
    """
    macros = {"OUTER": step.outer, "ORDER": step.order, "INNER": step.inner, "COLUMNS": step.columns}
    macros |= {"VECTOR": split.vector, "WARPS_K": split.warps_k, "WARPS_J": split.warps_j, "GROUP": split.group}
    macros |= {"IN": _FORMATS[dtypes[0]], "OUT": _FORMATS[dtypes[1]]}
    flags = {"FWHT": step.transform, "SIGNS": signs, "NORM": norm, "GATE": gate, "ADD": add}
    return Source("hadamard.cu", "rotate", macros | {name: int(value) for name, value in flags.items()})


def sources(
    size: int, many_rows: bool, dtype: torch.dtype, *, norm: bool = False, gate: bool = False, add: bool = False
) -> list[Source]:
    """The kernels of one rotation, in order."""
    steps = passes(size, many_rows)
    between = [dtype, *[torch.float32] * (len(steps) - 1), dtype]
    return [
        source(
            step,
            division(step, many_rows),
            dtypes=(between[n], between[n + 1]),
            signs=n == 0,
            norm=norm and n == 0,
            gate=gate and n == 0,
            add=add and n == 0,
        )
        for n, step in enumerate(steps)
    ]


@cache
def _steps(
    size: int, many_rows: bool, dtype: torch.dtype, norm: bool, gate: bool, add: bool, device: torch.device
) -> tuple[_Step, ...]:
    found = []
    compiled = sources(size, many_rows, dtype, norm=norm, gate=gate, add=add)
    for step, code in zip(passes(size, many_rows), compiled, strict=True):
        split = division(step, many_rows)
        slices = step.order // (split.group * split.warps_j)
        blocks = slices * (step.inner // step.columns) * step.outer
        scale = 1 / math.sqrt(step.order * (step.columns if step.transform else 1))
        found.append(_Step(load(code, device), blocks, 32 * split.warps_k * split.warps_j, scale))
    return tuple(found)


def fuses_norm(size: int) -> bool:
    """Whether a norm can run inside the rotation: its blocks must see the whole row."""
    return all(len(passes(size, many)) == 1 and passes(size, many)[0].outer == 1 for many in (False, True))


def rotate(x: Tensor, tables: RotationTables) -> Tensor:
    """`rotation.rotate` of CUDA rows, in float32 inside, in the dtype of `x`.

    Args:
        x: ``(rows, size)`` fp16 or bf16, or float32; rows may be apart.

    Returns:
        ``(rows, size)``, contiguous.
    """
    return _run(x, None, tables, norm=False, epsilon=0.0)


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
) -> Tensor:
    rows, size = x.shape
    many_rows = rows >= MANY_ROWS
    steps = _steps(size, many_rows, x.dtype, norm, second is not None and not norm, residual is not None, x.device)
    matrices = tables.matrices[-len(steps) :] if many_rows else tables.matrices
    dtype, source_rows = x.dtype, _aligned(x)
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
