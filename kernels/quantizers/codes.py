"""What each trellis state stands for: the codes of QTIP (arXiv 2406.11235, section 3) as tables of all states.

HYB (section 3.2, "hybrid"): a state s of L bits is hashed, ``h = s * (s + 1)``; bits 15 - q .. 14 of h index a table of
``2**q`` points of the plane, and bit 15 flips the sign of the point's first coordinate. The table fits a GPU's shared
memory, yet the ``2**L`` states see close to ``2**(q+1)`` points in random order, which is what the trellis needs. At
L = 16, s and 65535 - s have the same hash.

1MAD and 3INST (section 3.1) have no table: a linear congruential step scrambles the state into 32 bits, and a weight is
the sum of its four bytes, or of two fp16 numbers made of its halves. A state stands for one weight. The values are
scaled for each rate to least error on N(0,1) and rounded to fp16.

MAD, the default, does the same for pairs: see `kernels.mad`. Its values are fp32, a small multiple of 1/4 times a gain.

LUT: a table of all states, pairs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..mad import DIAGONAL, MadCode, mad_code
from ..specs import TrellisCode

_ONE_MAD = (34038481, 76625530)
_THREE_INST = (89226354, 64248484)
"""Multiplier and addend of the congruential step, from QTIP."""
_ONE_MAD_MEAN, _ONE_MAD_DEVIATION = 510, 147.800537109375
_SIGN_AND_LOW = 0x8FFF
_EXPONENT = 0x3B60
"""3INST keeps a half's sign and the low 12 bits, and flips those of 0.922 in fp16."""

_SCALES = {
    (TrellisCode.ONE_MAD, 2): 1.02,
    (TrellisCode.ONE_MAD, 3): 1.04,
    (TrellisCode.ONE_MAD, 4): 1.04,
    (TrellisCode.ONE_MAD, 5): 1.04,
    (TrellisCode.THREE_INST, 2): 0.80,
    (TrellisCode.THREE_INST, 3): 0.86,
    (TrellisCode.THREE_INST, 4): 0.88,
    (TrellisCode.THREE_INST, 5): 0.94,
}
"""Factor of the values by code and bits per weight."""


@cache
def hybrid_indices(state_bits: int, entries: int) -> tuple[Tensor, Tensor]:
    """For every state: the table index, ``(2**state_bits,)`` int64, and the sign of the first coordinate, +1 or -1."""
    states = torch.arange(1 << state_bits, dtype=torch.int64)
    hashed = states * (states + 1)
    table_bits = entries.bit_length() - 1
    return hashed >> 15 - table_bits & entries - 1, 1 - 2 * (hashed >> 15 & 1)


def one_mad_values(state_bits: int) -> Tensor:
    """``(2**state_bits,)`` float32 of mean 0 and variance 1."""
    hashed = _congruential(state_bits, *_ONE_MAD)
    total = sum((hashed >> 8 * i & 255 for i in range(4)), torch.zeros_like(hashed))
    return (total - _ONE_MAD_MEAN).float() / _ONE_MAD_DEVIATION


def three_inst_values(state_bits: int) -> Tensor:
    """``(2**state_bits,)`` float32 of mean 0 and variance near 1."""
    hashed = _congruential(state_bits, *_THREE_INST)
    halves = [(hashed >> shift & _SIGN_AND_LOW) ^ _EXPONENT for shift in (0, 16)]
    first, second = (half.to(torch.int32).to(torch.int16).view(torch.float16).float() for half in halves)
    return (first + second).half().float()


def _congruential(state_bits: int, multiplier: int, addend: int) -> Tensor:
    return torch.arange(1 << state_bits, dtype=torch.int64) * multiplier + addend & 0xFFFFFFFF


def mad_points(code: MadCode, state_bits: int) -> Tensor:
    """``(2**state_bits, 2)`` float32."""
    total = torch.zeros(1 << state_bits, 2, dtype=torch.float64)
    for multiplier, addend in zip(code.multipliers, code.addends, strict=True):
        hashed = _congruential(state_bits, multiplier, addend)
        low, second, third, high = (((hashed >> 8 * i & 255) ^ 128) - 128 for i in range(4))
        total += torch.stack([high + DIAGONAL * (third - low), second + DIAGONAL * (third + low)], dim=1)
    return (total * code.gain).float()


@cache
def _mad_points_of(width: int, state_bits: int, device: torch.device) -> Tensor:
    return mad_points(mad_code(width), state_bits).to(device)


@cache
def _calculated(code: TrellisCode, state_bits: int, bits: int, device: torch.device) -> Tensor:
    values = one_mad_values(state_bits) if code is TrellisCode.ONE_MAD else three_inst_values(state_bits)
    return (values * _SCALES.get((code, bits), 1.0)).half().float().unsqueeze(1).to(device)


@cache
def table_indices(code: TrellisCode, state_bits: int, entries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `hybrid_indices` for either code with a table, on a device."""
    if code is TrellisCode.LUT:
        index = torch.arange(1 << state_bits, device=device)
        return index, torch.ones_like(index)
    index, sign = hybrid_indices(state_bits, entries)
    return index.to(device), sign.to(device)


def state_points(
    codebook: Tensor,
    state_bits: int,
    code: TrellisCode = TrellisCode.HYB,
    width: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """What every state stands for.

    Args:
        codebook: ``(entries, 2)``; ignored by the codes that calculate.
        width: bits of a pair, for the codes that calculate.
        device: of the result; None for that of `codebook`.

    Returns:
        ``(2**state_bits, 2)`` float32, or ``(2**state_bits, 1)`` for the codes of one weight; not to be changed.
    """
    device = device or codebook.device
    if code is TrellisCode.MAD:
        return _mad_points_of(width, state_bits, device)
    if code in (TrellisCode.ONE_MAD, TrellisCode.THREE_INST):
        return _calculated(code, state_bits, width // 2, device)
    index, sign = table_indices(code, state_bits, len(codebook), device)
    points = codebook.to(device).float()[index]
    points[:, 0] *= sign
    return points
