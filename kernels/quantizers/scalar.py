"""Scalar quantizers: `int` (evenly spaced levels) and `nuq` (Lloyd-Max levels for a Gaussian)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PairCoder


class ScalarCoder(PairCoder):
    """Each weight takes the nearest level; a pair's code is ``first | second << bits``.

    ``codebook``: ``(2**bits, 1)`` levels in ascending order. `int` has no stored codebook: its levels are the integers
    and a half, ``code - (2**bits - 1) / 2``, and the row scale is the step.
    """

    block = 1

    def __init__(self, bits: int, *, uniform: bool) -> None:
        self.bits = bits
        self.width = 2 * bits
        self.uniform = uniform

    def _levels(self, codebook: Tensor, device: torch.device) -> Tensor:
        if self.uniform:
            return torch.arange(1 << self.bits, device=device, dtype=torch.float32) - ((1 << self.bits) - 1) / 2
        return codebook.to(device=device, dtype=torch.float32).flatten()

    def encode(self, pairs: Tensor, codebook: Tensor) -> Tensor:
        levels = self._levels(codebook, pairs.device)
        codes = torch.bucketize(pairs, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        return codes[..., 0] | codes[..., 1] << self.bits

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        levels = self._levels(codebook, codes.device)
        both = torch.stack([codes & (1 << self.bits) - 1, codes >> self.bits], dim=-1)
        return levels[both]
