"""One quantizer of every family and code that has kernels, of states so short that a test encodes in a moment."""

from __future__ import annotations

from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

FAMILIES = [
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 2.5, 12),
    QuantizerSpec(Family.TCQ, 2.5, 12, code=TrellisCode.HYB),
    QuantizerSpec(Family.HALF_TCQ, 2.75, 12),
]
