"""The trellis code MAD: a pair of weights from one or two multiply-adds of the state, and no table.

A state s gives hashes ``h_j = (multiplier_j * s + addend_j) mod 2**32``. The four bytes of a hash, read as signed
numbers q3 (the highest) to q0, lie along four directions of the plane, an eighth of a turn apart:

    first weight  = gain * sum_j (q3 + 3/4 (q2 - q0))
    second weight = gain * sum_j (q1 + 3/4 (q2 + q0))

Four uniform numbers along four directions come close to a Gaussian point of the plane: the support is an octagon where
two bytes for each weight would leave a square, whose missing tails cost up to a third more error. The idea of a sum of
bytes is QTIP's 1MAD (arXiv 2406.11235, section 3.1), which spends four bytes and a state on every weight.

Since a weight is linear in the bytes, a matrix product needs no decoded weights at all: 8-bit tensor cores multiply the
hash itself by the activations along the four directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TWO_HASHES_FROM = 7
"""Bits of a pair from which its weights have two hashes: the tails matter there."""
DIAGONAL = 0.75
"""A coordinate of the directions between the axes, near ``sqrt(1/2)``; sums of multiples of 1/4 are exact in fp16."""
LARGEST_WIDTH = 10
_DEVIATION = math.sqrt((2**16 - 1) / 12 * (1 + 2 * DIAGONAL**2))
"""Of a coordinate for one hash, its bytes taken as uniform."""


@dataclass(frozen=True)
class MadCode:
    """The code of one rate.

    Attributes:
        multipliers, addends: of each hash, 32 bits.
        deviation: standard deviation of the weights, the bytes taken as uniform: that of least error on N(0,1).
    """

    multipliers: tuple[int, ...]
    addends: tuple[int, ...]
    deviation: float

    @property
    def gain(self) -> float:
        """Factor of the sums of bytes, a multiple of 2^-20."""
        gain = self.deviation / (_DEVIATION * math.sqrt(len(self.multipliers)))
        return math.ldexp(round(math.ldexp(gain, 20)), -20)


_FOUND = {
    3: MadCode((2892809807,), (2069835433,), 0.98),
    4: MadCode((1724248257,), (1882794932,), 1.04),
    5: MadCode((980954811,), (2058577410,), 1.06),
    6: MadCode((1555401615,), (594459167,), 1.12),
    7: MadCode((4039937507, 4042799229), (3485417656, 3009493992), 1.10),
    8: MadCode((3477396799, 64427653), (3824155072, 3572131280), 1.10),
    9: MadCode((1724248257, 3864439745), (1882794932, 4010539640), 1.15),
    10: MadCode((3477396799, 562499339), (3824155072, 1800581261), 1.18),
}
"""By bits of a pair, from two runs of `search_mad`; those good at 12 bits of state too."""


def mad_code(width: int) -> MadCode:
    """The code of pairs of `width` bits, 3 to `LARGEST_WIDTH`."""
    return _FOUND[width]
