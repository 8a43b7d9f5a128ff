"""What a family of quantizers supplies: pairs of unit-variance weights to codes, and back.

Everything around it (rotation, row scales, tiles, packing, the split of `half_tcq`) is the same for all families and
lives in `kernels.quantize`. A coder serves one rate; `half_tcq` uses two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class PairCoder(ABC):
    """Encodes pairs of weights at one rate.

    Attributes:
        width: bits of a pair's code.
        block: neighbouring columns whose weights have to be encoded together: 16 (a tile), 2 or 1.
    """

    width: int
    block: int

    @abstractmethod
    def encode(self, pairs: Tensor, codebook: Tensor) -> Tensor:
        """``(tiles, 128, 2)`` float32 of unit variance -> codes ``(tiles, 128)`` int32 below ``2**width``."""

    @abstractmethod
    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """Codes ``(..., 128)`` -> pairs ``(..., 128, 2)`` float32, exact values of the fp16 codebook."""
