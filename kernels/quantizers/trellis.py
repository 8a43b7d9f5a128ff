"""`tcq`: trellis-coded quantization with the hybrid (HYB) code of QTIP (arXiv 2406.11235, section 3.2).

A state of L bits is hashed, ``h = s * (s + 1)``; bits 15 - q .. 14 of h index a table of ``2**q`` points of the plane,
and bit 15 flips the sign of the point's first coordinate. The table fits a GPU's shared memory, yet the
``2**L`` states see close to ``2**(q+1)`` points in random order, which is what the trellis needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import sliding_states
from ..specs import TILE
from .base import PairCoder
from .viterbi import viterbi_encode


def hybrid_indices(state_bits: int, entries: int) -> tuple[Tensor, Tensor]:
    """For every state: the table index, ``(2**state_bits,)`` int64, and the sign of the first coordinate, +1 or -1."""
    states = torch.arange(1 << state_bits, dtype=torch.int64)
    hashed = states * (states + 1)
    table_bits = entries.bit_length() - 1
    return hashed >> 15 - table_bits & entries - 1, 1 - 2 * (hashed >> 15 & 1)


def state_points(codebook: Tensor, state_bits: int) -> Tensor:
    """The pair of every state: ``(entries, 2)`` fp16 -> ``(2**state_bits, 2)`` float32."""
    index, sign = hybrid_indices(state_bits, len(codebook))
    points = codebook.float()[index.to(codebook.device)]
    points[:, 0] *= sign.to(codebook.device)
    return points


class TrellisCoder(PairCoder):
    """A pair's code is the new bits of its trellis step; see `viterbi` for the search."""

    block = TILE

    def __init__(self, width: int, state_bits: int) -> None:
        self.width = width
        self.state_bits = state_bits

    def encode(self, pairs: Tensor, codebook: Tensor) -> Tensor:
        return viterbi_encode(pairs, state_points(codebook.to(pairs.device), self.state_bits), self.width)

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        points = state_points(codebook.to(codes.device), self.state_bits)
        return points[sliding_states(codes, self.width, self.state_bits)]
