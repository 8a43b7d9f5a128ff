"""How a rotation is cut into kernels, and the tables that they read.

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

from ..hadamard import hadamard_matrix, hadamard_plan
from ..rotation import rotation_signs

_MAX_COLUMNS = 256
"""Columns of the closing transform: 8 for each lane of a warp."""
_MAX_ORDER = {False: 640, True: 192}
"""Largest matrix of a pass, for few and many rows: factors are merged up to it, which saves launches and costs work."""
MANY_ROWS = 32
"""From this many rows on, blocks share less of the work and repeat less of it."""
SHARED_LIMIT = 48 << 10
"""Bytes of shared memory that a block may have without asking."""
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


def matrix_table(step: Pass, group: int, *, inverse: bool = False) -> Tensor:
    """Signs of a pass's matrix M, ``(order // group, order)`` uint8: bit g of ``[b, i]`` is M[i, b * group + g] < 0.

    Args:
        inverse: of its transpose instead.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in step.orders:
        matrix = torch.kron(matrix, hadamard_matrix(order))
    negative = (
        (matrix < 0 if inverse else (matrix < 0).T).reshape(step.order // group, group, step.order).to(torch.int32)
    )
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
def _matrices(size: int, inverse: bool) -> tuple[Tensor, ...]:
    return tuple(
        matrix_table(step, division(step, many_rows).group, inverse=inverse)
        for many_rows in (False, True)
        for step in passes(size, many_rows)
    )


def rotation_tables(size: int, seed: int, device: torch.device, *, inverse: bool = False) -> RotationTables:
    """The tables of one rotation on a device, or of its inverse."""
    signs = np.packbits(rotation_signs(size, seed).numpy() < 0, bitorder="little")
    return RotationTables(
        torch.from_numpy(signs).to(device), tuple(table.to(device) for table in _matrices(size, inverse))
    )


def fuses_norm(size: int) -> bool:
    """Whether a norm can run inside the rotation: its blocks must see the whole row."""
    return all(len(passes(size, many)) == 1 and passes(size, many)[0].outer == 1 for many in (False, True))
