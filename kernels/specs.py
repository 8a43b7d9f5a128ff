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
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import cast

from .errors import QuantizerError

TILE = 16
"""Rows and columns of a tile; both sides of a weight are padded to a multiple of it."""
PAIRS_PER_TILE = TILE * TILE // 2
SCALE_BYTES = 2
"""One fp16 scale per output row."""
DEFAULT_STATE_BITS = 16
"""Trellis state length L, the longest too."""
LEAST_STATE_BITS = 4
"""What the lowest rate needs."""


class Family(StrEnum):
    """How codes become weights."""

    INT = "int"  # round to nearest on an evenly spaced grid, no rotation: the baseline that people know
    NUQ = "nuq"  # scalar Lloyd-Max codebook
    VQ = "vq"  # 2-D codebook
    TCQ = "tcq"  # trellis-coded, one rate
    HALF_TCQ = "half_tcq"  # trellis-coded, two rates half a bit apart, split along the input dimension


class TrellisCode(StrEnum):
    """What a trellis state stands for; `MAD` and `HYB` have CUDA kernels, the others run as reference only."""

    MAD = "mad"  # a pair: the bytes of one or two hashes, along four directions of the plane; the default
    HYB = "hyb"  # a pair from a hashed table, one sign from the hash
    ONE_MAD = "1mad"  # a weight: the sum of the bytes of a hash
    THREE_INST = "3inst"  # a weight: the sum of two fp16 numbers made of a hash
    LUT = "lut"  # a pair from a table of all states


_SINGLE_WEIGHTS = (TrellisCode.ONE_MAD, TrellisCode.THREE_INST)
_CALCULATED = (TrellisCode.MAD, *_SINGLE_WEIGHTS)


@dataclass(frozen=True)
class _Rates:
    """Rates of a family, in bits per weight."""

    low: float
    high: float
    step: float = 1.0
    but: float = 0.0  # no multiples of it

    def __contains__(self, bits: float) -> bool:
        between = self.low <= bits <= self.high and not (bits - self.low) % self.step
        return between and not (self.but and not bits % self.but)

    def __str__(self) -> str:
        excepted = f" but no multiples of {self.but:g}" if self.but else ""
        return f"{self.low:g} to {self.high:g} bits in steps of {self.step:g}{excepted}"


_RATES: dict[Family, _Rates] = {
    Family.INT: _Rates(2, 8),
    Family.NUQ: _Rates(2, 8),
    Family.VQ: _Rates(1.5, 6, 0.5),
    Family.TCQ: _Rates(1.5, 5, 0.5),
    Family.HALF_TCQ: _Rates(1.625, 4.875, 0.125, but=0.5),
}
_PALETTE_STEPS: dict[Family, _Rates] = _RATES | {Family.HALF_TCQ: _Rates(1.75, 4.75, 0.5)}
_WHOLE_RATES = _Rates(2, 5)
_TABLE_BITS = {7: 10, 8: 11, 9: 11, 10: 12}
"""Bits of the default table's index for trellis steps of so many bits; 9 below."""
_LARGEST_TABLE_BITS = 15
"""The HYB hash has 15 bits beside the sign."""
SHIPPED_TABLE_BITS = {3.5: (9, 11), 4.0: (9, 10, 12), 4.5: (10, 12), 5.0: (11, 13)}
"""Sizes of `tcq` tables on offer beside the default, by bits per weight."""
BYTE_LEVEL_BITS = 5
"""Codebooks of few levels are multiples of ``2**-5``, so that kernels multiply them as bytes (`codebooks.rounded`)."""
DEFAULT_TABLE = -1
"""As `table_bits`: the default of the rate."""


@dataclass(frozen=True, order=True)
class QuantizerSpec:
    """One quantizer.

    Attributes:
        family: how codes become weights.
        bits: bits per weight of the codes alone (scales and codebook come on top).
        state_bits: trellis state length L; 0 for families without a trellis.
        table_bits: the trellis table has ``2**table_bits`` points; 0 where there is none.
        code: what a trellis state stands for; None for hyb where `table_bits` is above 0, else mad. Families without a
            trellis say hyb.

    Raises:
        QuantizerError: the family has no such rate, or trellis length, table or code does not fit it.
    """

    family: Family
    bits: float
    state_bits: int = 0
    table_bits: int = DEFAULT_TABLE
    code: TrellisCode = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        family = Family(self.family)
        if self.bits not in _RATES[family]:
            raise QuantizerError(f"{family} comes in {_RATES[family]}; got {self.bits:g}.")
        if cast("TrellisCode | None", self.code) is None:
            tabled = not self.has_trellis or self.table_bits > 0
            object.__setattr__(self, "code", TrellisCode.HYB if tabled else TrellisCode.MAD)
        if self.has_trellis:
            if not 2 * self.rates[-1] < self.state_bits <= DEFAULT_STATE_BITS:
                raise QuantizerError(
                    f"a {family} trellis at {self.bits:g} bits needs a state of {int(2 * self.rates[-1]) + 1} to 16 "
                    f"bits; got {self.state_bits}."
                )
        elif self.state_bits or self.code is not TrellisCode.HYB:
            raise QuantizerError(
                f"{family} has no trellis; state_bits must be 0 and code hyb, got {self.state_bits} and {self.code}."
            )
        if self.table_bits == DEFAULT_TABLE:
            object.__setattr__(self, "table_bits", self._default_table_bits)
        self._check_code(family)

    def _check_code(self, family: Family) -> None:
        if self.code not in (TrellisCode.MAD, TrellisCode.HYB) and family is not Family.TCQ:
            raise QuantizerError(f"the code {self.code} belongs to the family tcq; got {family}.")
        if self.pair_steps == 2 and self.bits not in _WHOLE_RATES:
            raise QuantizerError(f"the code {self.code} comes in {_WHOLE_RATES}; got {self.bits:g}.")
        default = self._default_table_bits
        hashed = self.has_trellis and self.code is TrellisCode.HYB
        if not (1 <= self.table_bits <= _LARGEST_TABLE_BITS if hashed else self.table_bits == default):
            expected = f"1 to {_LARGEST_TABLE_BITS}" if hashed else default
            raise QuantizerError(
                f"{family} with the code {self.code} takes table_bits {expected}; got {self.table_bits}."
            )

    @property
    def _default_table_bits(self) -> int:
        if not self.has_trellis or self.code in _CALCULATED:
            return 0
        if self.code is TrellisCode.LUT:
            return self.state_bits
        return _TABLE_BITS.get(int(2 * self.rates[-1]), 9)

    @property
    def has_trellis(self) -> bool:
        return self.family in (Family.TCQ, Family.HALF_TCQ)

    @property
    def rates(self) -> tuple[float, ...]:
        """Bits per weight of each column segment, low first (one segment except for `half_tcq`)."""
        if self.family is Family.HALF_TCQ:
            low = self.bits // 0.5 / 2
            return (low, low + 0.5)
        return (self.bits,)

    @property
    def high_share(self) -> float:
        """Share of the columns that `half_tcq` stores at its high rate: 1/4, 1/2 or 3/4; 0 for other families."""
        return 2 * (self.bits - self.rates[0])

    @property
    def pair_steps(self) -> int:
        """Trellis steps for each pair of weights."""
        return 2 if self.code in _SINGLE_WEIGHTS else 1

    @property
    def label(self) -> str:
        """The name people use: ``tcq-3.5``; what differs from the default says so: ``tcq-3-L12``, ``tcq-4-hyb-T9``."""
        return self.label_with(self.state_bits)

    def label_with(self, state_bits: int) -> str:
        """The label that this quantizer has with another trellis length, whether or not that length fits its rate."""
        suffix = f"-{self.code}" if self.has_trellis and self.code is not TrellisCode.MAD else ""
        if self.has_trellis and state_bits != DEFAULT_STATE_BITS:
            suffix += f"-L{state_bits}"
        if self.table_bits != self._default_table_bits:
            suffix += f"-T{self.table_bits}"
        return f"{self.family.replace('_', '-')}-{self.bits:g}{suffix}"

    @property
    def codebook_shape(self) -> tuple[int, int]:
        """(entries, dimension) of the fp16 codebook; `int` and the codes that calculate have none.

        A sign bit doubles the points of HYB.
        """
        if self.family is Family.INT or self.code in _CALCULATED:
            return (0, 1)
        if self.family is Family.NUQ:
            return (1 << int(self.bits), 1)
        if self.family is Family.VQ:
            return (1 << int(2 * self.bits), 2)
        return (1 << self.table_bits, 2)

    @property
    def has_byte_levels(self) -> bool:
        """Whether the codebook's numbers are bytes times ``2**-BYTE_LEVEL_BITS``: `nuq` to 3 bits, `vq` to 2."""
        return self.bits <= {Family.NUQ: 3, Family.VQ: 2}.get(self.family, 0)

    @property
    def table_bytes(self) -> int:
        """Bytes of the codebook that every layer carries."""
        entries, dimension = self.codebook_shape
        return 2 * entries * dimension

    def segment_tiles(self, in_features: int) -> tuple[int, ...]:
        """Tile columns of each segment of `rates`: `high_share` of them at the high rate, rounded down."""
        tiles = -(-in_features // TILE)
        if self.family is Family.HALF_TCQ:
            high = int(tiles * self.high_share)
            return (tiles - high, high)
        return (tiles,)

    def size_bytes(self, out_features: int, in_features: int) -> int:
        """Exact bytes of a quantized layer, on disk and in memory: codes, scales, codebook, padding."""
        row_tiles = -(-out_features // TILE)
        codes = sum(
            row_tiles * tiles * int(PAIRS_PER_TILE * 2 * rate) // 8
            for tiles, rate in zip(self.segment_tiles(in_features), self.rates, strict=True)
        )
        return codes + SCALE_BYTES * out_features + self.table_bytes


def table_bits_of(table_bytes: int) -> int:
    """`QuantizerSpec.table_bits` of a trellis table of so many bytes.

    Raises:
        QuantizerError: no table has that size.
    """
    points = table_bytes // 4
    if table_bytes % 4 or points & points - 1:
        raise QuantizerError(f"a trellis table takes 4 bytes for each of 2^q points; got {table_bytes} bytes.")
    return max(0, points.bit_length() - 1)


def _family_palette(family: Family, rates: _Rates, state_bits: int) -> list[QuantizerSpec]:
    trellis = state_bits if family in (Family.TCQ, Family.HALF_TCQ) else 0
    steps = (rates.low + i * rates.step for i in range(int((rates.high - rates.low) / rates.step) + 1))
    return [QuantizerSpec(family, bits, trellis) for bits in steps if bits in rates]


def default_palette(state_bits: int = DEFAULT_STATE_BITS) -> tuple[QuantizerSpec, ...]:
    """The quantizers a profile measures unless told otherwise, families in the order of `Family`, rates ascending."""
    return tuple(s for family, rates in _PALETTE_STEPS.items() for s in _family_palette(family, rates, state_bits))


def every_quantizer(state_bits: int = DEFAULT_STATE_BITS) -> tuple[QuantizerSpec, ...]:
    """All that ship: the default palette, all rates of `half_tcq`, the other trellis codes and table sizes."""
    specs = [s for family, rates in _RATES.items() for s in _family_palette(family, rates, state_bits)]
    hybrid = [replace(s, table_bits=DEFAULT_TABLE, code=TrellisCode.HYB) for s in specs if s.has_trellis]
    specs += hybrid
    for base in (s for s in hybrid if s.family is Family.TCQ):
        specs += [
            replace(base, table_bits=bits) for bits in SHIPPED_TABLE_BITS.get(base.bits, ()) if bits != base.table_bits
        ]
        if base.bits in _WHOLE_RATES:
            specs += [replace(base, table_bits=0, code=code) for code in _SINGLE_WEIGHTS]
    return tuple(specs)


def names_another(label: str, spec: QuantizerSpec) -> bool:
    """Whether a label is the name of another quantizer than `spec`; a label of someone's own names none.

    Labels given before codes were named stand for HYB as well.
    """
    names = {spec.label}
    if spec.has_trellis and spec.code is TrellisCode.HYB:
        names.add(replace(spec, table_bits=DEFAULT_TABLE, code=TrellisCode.MAD).label)
    lengths = range(LEAST_STATE_BITS, DEFAULT_STATE_BITS + 1)
    return label not in names and any(label == s.label_with(length) for s in every_quantizer() for length in lengths)


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
