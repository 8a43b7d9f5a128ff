"""Orthonormal Hadamard matrices of the sizes that real models have, as Kronecker products of small ones.

Powers of two come from Sylvester's doubling. A size with an odd factor needs a matrix whose order carries that
factor; Paley's two constructions (R. E. A. C. Paley, "On orthogonal matrices", 1933) give one for each prime power q:

    I   order q + 1         q = 3 (mod 4)
    II  order 2 * (q + 1)   q = 1 (mod 4)

Both need only the quadratic character of the field GF(q), so matrices are computed, never stored: 1536 = 12 x 128,
5120 = 20 x 256, 14336 = 28 x 512, 13824 = 108 x 128, 18944 = 148 x 128, and 11008 = 344 x 32 from GF(7^3). Sizes with
several odd primes (29568 = 12 x 28 x 44 x 2) are split when that is cheaper. A size that no product reaches is rotated
in blocks of its largest power of two; `HadamardPlan.block` tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

_MAX_DENSE_POWER = 64
"""Powers of two are applied as dense factors up to this size."""


@dataclass(frozen=True)
class HadamardPlan:
    """How a size is rotated.

    Attributes:
        size: the dimension.
        factors: orders of the Kronecker factors; their product is `block`.
        block: size of one diagonal block; equal to `size` unless nothing fits.
    """

    size: int
    factors: tuple[int, ...]
    block: int

    @property
    def is_complete(self) -> bool:
        """Whether one rotation mixes the whole dimension."""
        return self.block == self.size


def _prime_power(n: int) -> tuple[int, int] | None:
    """``(p, m)`` with ``p**m == n`` and p prime, or None."""
    p = next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)
    m = 0
    while n % p == 0 and n > 1:
        n //= p
        m += 1
    return (p, m) if n == 1 and m else None


def _paley_field(order: int) -> int | None:
    """The q whose Paley construction has this order, type I first; None where there is none."""
    if order >= 4 and (order - 1) % 4 == 3 and _prime_power(order - 1):
        return order - 1
    half = order // 2 - 1
    if order % 4 == 0 and half > 1 and half % 4 == 1 and _prime_power(half):
        return half
    return None


def _odd_splits(odd: int) -> list[tuple[int, ...]]:
    """All ways to write an odd number as a non-decreasing product of factors above one."""
    splits: list[tuple[int, ...]] = [(odd,)]
    for d in range(3, math.isqrt(odd) + 1, 2):
        if odd % d == 0:
            splits += [(d, *rest) for rest in _odd_splits(odd // d) if rest[0] >= d]
    return splits


@cache
def hadamard_plan(size: int) -> HadamardPlan:
    """The cheapest product of Hadamard matrices for a dimension.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a Hadamard rotation needs a positive size; got {size}.")
    power = (size & -size).bit_length() - 1
    odd = size >> power
    best: tuple[int, ...] | None = () if odd == 1 else None
    if odd > 1:
        for split in _odd_splits(odd):
            choices = [[order for j in range(2, power + 1) if _paley_field(order := factor << j)] for factor in split]
            for orders in product(*choices):
                if size % math.prod(orders) == 0 and (best is None or sum(orders) < sum(best)):
                    best = orders
    if best is None:
        return HadamardPlan(size, _power_factors(power), 1 << power)
    rest = size // math.prod(best)
    return HadamardPlan(size, (*best, *_power_factors(rest.bit_length() - 1)), size)


def _power_factors(power: int) -> tuple[int, ...]:
    """``2**power`` as dense factors of at most `_MAX_DENSE_POWER`."""
    step = _MAX_DENSE_POWER.bit_length() - 1
    return tuple(1 << min(step, power - done) for done in range(0, power, step))


def _field_elements(p: int, m: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Elements of GF(p^m) as coefficient tuples (low first), and a monic irreducible polynomial's low part."""
    elements = [tuple(reversed(e)) for e in product(range(p), repeat=m)]
    if m == 1:
        return elements, (0,)
    # A cubic or quadratic without roots is irreducible; higher degrees are not needed by any size in use.
    if m > 3:
        raise ValueError(f"GF({p}^{m}): only fields of degree up to 3 are built.")
    for low in elements:
        if all((x**m + sum(c * x**i for i, c in enumerate(low))) % p for x in range(p)):
            return elements, low
    raise AssertionError("every finite field has an irreducible polynomial of each degree")


def _multiply(a: tuple[int, ...], b: tuple[int, ...], low: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Product in GF(p^m) modulo ``x^m + low``."""
    m = len(a)
    out = [0] * (2 * m - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    for i in range(2 * m - 2, m - 1, -1):
        for j in range(m):
            out[i - m + j] -= out[i] * low[j]
    return tuple(c % p for c in out[:m])


def _jacobsthal(q: int) -> Tensor:
    """``Q[i, j] = chi(a_i - a_j)``, chi the quadratic character of GF(q); ``(q, q)`` float64."""
    p, m = _prime_power(q) or (q, 1)
    elements, low = _field_elements(p, m)
    squares = {_multiply(e, e, low, p) for e in elements[1:]}
    character = torch.tensor([0.0 if not any(e) else 1.0 if e in squares else -1.0 for e in elements])
    digits = torch.tensor(elements)
    difference = (digits[:, None] - digits[None, :]) % p
    index = (difference * p ** torch.arange(m)).sum(-1)
    return character.double()[index]


@cache
def hadamard_matrix(order: int) -> Tensor:
    """The orthonormal Hadamard matrix of an order that is a power of two or a Paley order, ``(order, order)`` float64.

    Raises:
        ValueError: no construction here has this order.
    """
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.kron(two, matrix)
        return matrix / math.sqrt(order)
    q = _paley_field(order)
    if q is None:
        raise ValueError(f"no Hadamard matrix of order {order} is built here.")
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 1:] = _jacobsthal(q)
    if q % 4 == 3:
        border[1:, 0] = -1
        return (border + torch.eye(q + 1, dtype=torch.float64)) / math.sqrt(order)
    border[1:, 0] = 1
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (torch.kron(border, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)) / math.sqrt(order)


@cache
@torch.inference_mode(False)  # whoever asks first, gradients may need it later
def _matrix_on(device: torch.device, dtype: torch.dtype, order: int) -> Tensor:
    """`hadamard_matrix` on a device, kept: nothing can be copied there while a CUDA graph is captured."""
    return hadamard_matrix(order).to(device=device, dtype=dtype)


def apply_hadamard(x: Tensor, plan: HadamardPlan, *, inverse: bool = False) -> Tensor:
    """Multiply the last dimension by the plan's matrix from the right: ``x @ H``, or ``x @ H.T``.

    Args:
        x: ``(..., plan.size)`` floating point; computed in its own precision.

    Returns:
        The same shape and dtype.
    """
    shape = x.shape
    blocks = x.reshape(-1, *plan.factors)
    for axis, order in enumerate(plan.factors, start=1):
        matrix = _matrix_on(x.device, x.dtype, order)
        blocks = torch.tensordot(blocks, matrix.T if inverse else matrix, dims=([axis], [0])).movedim(-1, axis)
    return blocks.reshape(shape)
