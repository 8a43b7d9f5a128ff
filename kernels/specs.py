"""What a quantizer is, as data: family, rate and trellis parameters, with exact sizes.

A `QuantizerSpec` is the only identity of a quantizer inside msq. Its `label` (``tcq-3.5``) is for
people: tables store the fields beside it, and nothing reads a field out of a label. This module needs
neither torch nor numpy, so that planning can use it anywhere.

Sizes follow the packed layout of `packing`: weights are stored in 16 x 16 tiles of 128 pairs, a pair takes
``2 * bits`` bits, a layer adds one fp16 scale per output row and its own fp16 codebook.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .errors import QuantizerError

TILE = 16
"""Rows and columns of a tile; both sides of a weight are padded to a multiple of it."""
PAIRS_PER_TILE = TILE * TILE // 2
SCALE_BYTES = 2
"""One fp16 scale per output row."""
DEFAULT_STATE_BITS = 16


class Family(StrEnum):
    """How codes become weights."""

    INT = "int"  # round to nearest on an evenly spaced grid, no rotation: the baseline that people know
    NUQ = "nuq"  # scalar Lloyd-Max codebook
    VQ = "vq"  # 2-D codebook
    TCQ = "tcq"  # trellis-coded, one rate
    HALF_TCQ = "half_tcq"  # trellis-coded, two rates half a bit apart, split along the input dimension


_HALF_STEPS = dict.fromkeys((Family.VQ, Family.TCQ, Family.HALF_TCQ), 0.5)
_RANGES: dict[Family, tuple[float, float]] = {
    Family.INT: (2, 8),
    Family.NUQ: (2, 8),
    Family.VQ: (1.5, 6),
    Family.TCQ: (1.5, 5),
    Family.HALF_TCQ: (1.75, 4.75),
}


@dataclass(frozen=True, order=True)
class QuantizerSpec:
    """One quantizer.

    Attributes:
        family: how codes become weights.
        bits: bits per weight of the codes alone (scales and codebook come on top).
        state_bits: trellis state length L; 0 for families without a trellis.

    Raises:
        QuantizerError: the family has no such rate, or the trellis length does not fit it.
    """

    family: Family
    bits: float
    state_bits: int = 0

    def __post_init__(self) -> None:
        family = Family(self.family)
        low, high = _RANGES[family]
        step = _HALF_STEPS.get(family, 1.0)
        if not low <= self.bits <= high or (self.bits - low) % step:
            raise QuantizerError(f"{family} comes in {low:g} to {high:g} bits in steps of {step:g}; got {self.bits:g}.")
        if self.has_trellis:
            if not 2 * self.rates[-1] < self.state_bits <= 16:
                raise QuantizerError(
                    f"a {family} trellis at {self.bits:g} bits needs a state of {int(2 * self.rates[-1]) + 1} to 16 "
                    f"bits; got {self.state_bits}."
                )
        elif self.state_bits:
            raise QuantizerError(f"{family} has no trellis; state_bits must be 0, got {self.state_bits}.")

    @property
    def has_trellis(self) -> bool:
        return self.family in (Family.TCQ, Family.HALF_TCQ)

    @property
    def rates(self) -> tuple[float, ...]:
        """Bits per weight of each column segment, low first (one segment except for `half_tcq`)."""
        if self.family is Family.HALF_TCQ:
            return (self.bits - 0.25, self.bits + 0.25)
        return (self.bits,)

    @property
    def label(self) -> str:
        """The name people use: ``tcq-3.5``; a trellis shorter than the default says so: ``tcq-3.5-L12``."""
        suffix = f"-L{self.state_bits}" if self.has_trellis and self.state_bits != DEFAULT_STATE_BITS else ""
        return f"{self.family.replace('_', '-')}-{self.bits:g}{suffix}"

    @property
    def codebook_shape(self) -> tuple[int, int]:
        """(entries, dimension) of the fp16 codebook; `int` has none.

        The trellis codes keep 2^9 points up to 4 bits, 2^10 at 4.5 and 2^11 at 5 bits (the sizes of
        Q-Palette's tables); a sign bit doubles them.
        """
        if self.family is Family.INT:
            return (0, 1)
        if self.family is Family.NUQ:
            return (1 << int(self.bits), 1)
        if self.family is Family.VQ:
            return (1 << int(2 * self.bits), 2)
        return (1 << (9 + max(0, int(2 * self.rates[-1]) - 8)), 2)

    @property
    def table_bytes(self) -> int:
        """Bytes of the codebook that every layer carries."""
        entries, dimension = self.codebook_shape
        return 2 * entries * dimension

    def segment_tiles(self, in_features: int) -> tuple[int, ...]:
        """Tile columns of each segment of `rates`: the low rate takes the odd one."""
        tiles = -(-in_features // TILE)
        if self.family is Family.HALF_TCQ:
            return (tiles - tiles // 2, tiles // 2)
        return (tiles,)

    def size_bytes(self, out_features: int, in_features: int) -> int:
        """Exact bytes of a quantized layer, on disk and in memory: codes, scales, codebook, padding."""
        row_tiles = -(-out_features // TILE)
        codes = sum(
            row_tiles * tiles * int(PAIRS_PER_TILE * 2 * rate) // 8
            for tiles, rate in zip(self.segment_tiles(in_features), self.rates, strict=True)
        )
        return codes + SCALE_BYTES * out_features + self.table_bytes


def default_palette(state_bits: int = DEFAULT_STATE_BITS) -> tuple[QuantizerSpec, ...]:
    """Every quantizer on offer, families in the order of `Family`, rates ascending."""
    specs = []
    for family in Family:
        low, high = _RANGES[family]
        step = _HALF_STEPS.get(family, 1.0)
        trellis = state_bits if family in (Family.TCQ, Family.HALF_TCQ) else 0
        specs += [QuantizerSpec(family, low + i * step, trellis) for i in range(int((high - low) / step) + 1)]
    return tuple(specs)


def match_labels(labels: Sequence[str], patterns: str | Iterable[str]) -> list[str]:
    """The labels that a comma-separated list of globs selects, in the order of `labels`.

    Raises:
        QuantizerError: a glob selects nothing; near matches are named.
    """
    globs = [p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns) if p.strip()]
    if not globs:
        raise QuantizerError('expected a list of quantizer globs such as "tcq-*,nuq-4"; got an empty one.')
    for glob in globs:
        if not fnmatch.filter(labels, glob):
            near = difflib.get_close_matches(glob, labels, n=3, cutoff=0.3) or list(labels[:3])
            raise QuantizerError(
                f"no quantizer matches '{glob}'; near matches: {', '.join(near)} ({len(labels)} on offer)."
            )
    return [label for label in labels if any(fnmatch.fnmatchcase(label, glob) for glob in globs)]
