"""How a decode kernel divides its work: `Tuning`, what it takes (`launch_for`), and the choice of one (`tune`)."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..mad import mad_code
from ..specs import BYTE_LEVEL_BITS, TILE, Family, QuantizerSpec, TrellisCode
from .jit import Source
from .layout import UNIT_COLUMNS, in_nibbles, pair_width, plane_bits
from .limits import RESERVED_BYTES, Limits, device_limits

__all__ = [
    "FORMATS",
    "Launch",
    "Limits",
    "Tuning",
    "decoder_macros",
    "device_limits",
    "launch_for",
    "table_size",
    "tune",
]

FORMATS = {torch.float16: 0, torch.bfloat16: 1}
_FAMILIES = {Family.INT: 0, Family.NUQ: 1, Family.VQ: 2, Family.TCQ: 3, Family.HALF_TCQ: 3}
_MAD = 4
_LARGEST_PAIR_TABLE = {Family.NUQ: 5}
"""Bits up to which pairs of weights are looked up; above, `nuq` looks up single weights."""

_MOST_UNITS = 250
"""Of a warp in a row, so that sums of bytes times digits, of two hashes at most, stay below 2^31."""

_BYTE_ENTRY = 256
"""Bytes from one entry to the next in the table of a quantizer whose codes are bytes."""


@dataclass(frozen=True)
class Tuning:
    """How a decode kernel divides its work; any choice gives right results where it fits.

    Attributes:
        warps: warps of a block.
        blocks: blocks of a launch for each multiprocessor.
        resident: blocks for which a multiprocessor has registers; more than `blocks` lets the next launch start early.
        rows: rows of tiles that a warp decodes side by side: a step is one unit (16 rows x 128 columns) in each.
        steps_at_start: steps that a warp asks for before it decodes the first, 1 or 2.
        ring: steps in flight through shared memory; 0 for one or two, straight to registers.
        row_groups: groups of warps that take different rows; the warps of a group share the columns.
        splits: chunks of the input dimension that different blocks take.
        replicas: copies of the table in shared memory; 32 make every lookup free of conflicts.
        signed: for trellis codes, a table of both signs: twice as large, one instruction less a pair.
        waves: launches with more rows than shared memory has room for take several blocks one after another.
    """

    warps: int = 16
    blocks: int = 1
    resident: int = 1
    rows: int = 2
    steps_at_start: int = 1
    ring: int = 0
    row_groups: int = 1
    splits: int = 1
    replicas: int = 32
    signed: bool = True
    waves: int = 1


@dataclass(frozen=True)
class Launch:
    """A kernel with all that a call needs but its tensors.

    Attributes:
        source: what to compile.
        grid, block: blocks, and threads of a block.
        chunk_blocks: blocks of each of the chunks of the input dimension.
        shared_bytes: dynamic shared memory of a block.
        block_tiles: rows of 16 x 16 tiles of a block for which `shared_bytes` has room.
        workspace_words: 32-bit words of workspace, all ones before the first call and after each.
    """

    source: Source
    grid: int
    block: int
    chunk_blocks: int
    shared_bytes: int
    block_tiles: int
    workspace_words: int


def _looks_up_pairs(spec: QuantizerSpec) -> bool:
    return spec.family is Family.VQ or spec.bits <= _LARGEST_PAIR_TABLE.get(spec.family, 0)


def decoder_macros(spec: QuantizerSpec, rates: Sequence[float], replicas: int, signed: bool) -> dict[str, int | str]:
    """Macros of ``decoders.cuh`` for one or two of the quantizer's rates."""
    widths = [pair_width(rate) for rate in rates]
    macros: dict[str, int | str] = {
        "FAMILY": _FAMILIES[spec.family],
        "STATE_BITS": spec.state_bits,
        "TABLE_BITS": max(spec.codebook_shape[0].bit_length() - 1, 0),
        "LEVEL_BITS": BYTE_LEVEL_BITS if spec.has_byte_levels else 0,
        "TABLE_OF_PAIRS": _looks_up_pairs(spec),
        "REPLICAS": replicas,
        "SIGNED_TABLE": signed and spec.has_trellis,
        "WIDTH_LOW": widths[0],
    }
    if spec.code is TrellisCode.MAD:
        macros["FAMILY"] = _MAD
        for segment, width in zip(("LOW", "HIGH"), widths, strict=False):
            code = mad_code(width)
            constants = itertools.chain.from_iterable(zip(code.multipliers, code.addends, strict=True))
            macros[f"HASHES_{segment}"] = len(code.multipliers)
            macros[f"GAIN_{segment}"] = int.from_bytes(struct.pack("<f", code.gain), "little")
            macros[f"CONSTANTS_{segment}"] = ",".join(f"{constant}u" for constant in constants)
    return macros


def table_size(spec: QuantizerSpec, replicas: int, signed: bool) -> int:
    """Bytes of the table in shared memory."""
    entries, width = spec.codebook_shape[0], pair_width(max(spec.rates))
    if in_nibbles(spec):
        return 0
    if spec.has_trellis:
        entries <<= signed
    elif bits := plane_bits(spec, width):
        return _BYTE_ENTRY << bits
    elif _looks_up_pairs(spec):
        entries = 1 << width
    return 4 * entries * replicas


@dataclass(frozen=True)
class _Division:
    """What a block takes.

    Attributes:
        row_tiles: rows of tiles of the weight, in `chunk_blocks` blocks of `block_tiles` at most.
        units: units of a row in each segment, of a block's chunk of the input dimension,
        warps: and how many warps work on them.
        table_bytes, shared_bytes: of shared memory, the table and all.
    """

    row_tiles: int
    chunk_blocks: int
    block_tiles: int
    units: tuple[int, ...]
    warps: tuple[int, ...]
    table_bytes: int
    shared_bytes: int


def _tokens(batch: int) -> int:
    """Tokens that a kernel is compiled for."""
    return 1 << (batch - 1).bit_length()


def _digits(spec: QuantizerSpec) -> int:
    """Numbers that stand for an activation: fp16, or the 8-bit digits that are multiplied by bytes."""
    return 2 if spec.code is TrellisCode.MAD or spec.has_byte_levels else 1


def _token_bytes(spec: QuantizerSpec, units: int) -> int:
    """Bytes of shared memory that a token takes: a column's digits for quads are bytes (``decode.cu``)."""
    columns = units * UNIT_COLUMNS
    return _digits(spec) * (columns + 64 if spec.has_byte_levels else 2 * columns + 16)


def _share_warps(units: tuple[int, ...], tuning: Tuning) -> tuple[int, ...] | None:
    """Warps for each segment, so that the busiest has least to do; None where there are too few."""
    if len(units) == 1:
        return (tuning.warps,)
    groups = tuning.row_groups
    choices = [(tuning.warps - high, high) for high in range(groups, tuning.warps, groups)]
    return min(choices, key=lambda warps: _most_units(units, warps, groups), default=None)


def _most_units(units: tuple[int, ...], warps: tuple[int, ...], groups: int) -> int:
    """Units of a row of tiles for the busiest warp."""
    return max(-(-count // (some // groups)) for count, some in zip(units, warps, strict=True))


def _divide(
    spec: QuantizerSpec, out_features: int, in_features: int, batch: int, limits: Limits, tuning: Tuning
) -> _Division | None:
    """None where `tuning` does not fit the device."""
    tokens, row_tiles = _tokens(batch), out_features // TILE
    units = tuple(
        math.ceil(math.ceil(tiles * TILE / UNIT_COLUMNS) / tuning.splits) for tiles in spec.segment_tiles(in_features)
    )
    chunk_blocks = min(limits.multiprocessors * tuning.blocks * tuning.waves // tuning.splits, row_tiles)
    if not chunk_blocks:
        return None
    block_tiles = -(-row_tiles // chunk_blocks)
    table_bytes = table_size(spec, tuning.replicas, tuning.signed)
    rings = tuning.warps * tuning.ring * tuning.rows * 128 * pair_width(max(spec.rates))
    factors = tuning.warps * tokens * 4
    slots = block_tiles * (tuning.warps // tuning.row_groups) * tokens * (16 if tokens == 1 else 20)
    shared_bytes = table_bytes + rings + factors + -factors % 16 + 4 * slots
    shared_bytes += 2 * 2 * TILE * block_tiles + tokens * _token_bytes(spec, sum(units))
    if shared_bytes > (limits.shared_bytes + RESERVED_BYTES) // tuning.blocks - RESERVED_BYTES:
        return None
    warps = _share_warps(units, tuning)
    if warps is None or (_digits(spec) > 1 and _most_units(units, warps, tuning.row_groups) > _MOST_UNITS):
        return None
    return _Division(row_tiles, chunk_blocks, block_tiles, units, warps, table_bytes, shared_bytes)


def launch_for(
    spec: QuantizerSpec,
    out_features: int,
    in_features: int,
    batch: int,
    dtype: torch.dtype,
    limits: Limits,
    tuning: Tuning,
) -> Launch | None:
    """The launch of a shape; None where `tuning` does not fit the device."""
    division = _divide(spec, out_features, in_features, batch, limits, tuning)
    if division is None:
        return None
    tokens, widths = _tokens(batch), [pair_width(rate) for rate in spec.rates]
    macros = decoder_macros(spec, spec.rates, tuning.replicas, tuning.signed) | {
        "WIDTH_HIGH": widths[1] if len(widths) > 1 else 0,
        "ROWS": tuning.rows,
        "STEPS_AT_START": tuning.steps_at_start,
        "RING": tuning.ring,
        "ROW_GROUPS": tuning.row_groups,
        "WARPS": tuning.warps,
        "HIGH_WARPS": division.warps[1] if len(widths) > 1 else 0,
        "RESIDENT": max(tuning.blocks, tuning.resident),
        "TOKENS": tokens,
        "BFLOAT": FORMATS[dtype],
        "SPLITS": tuning.splits,
    }
    return Launch(
        Source("decode.cu", "multiply", macros),
        division.chunk_blocks * tuning.splits,
        32 * tuning.warps,
        division.chunk_blocks,
        division.shared_bytes,
        division.block_tiles,
        (tuning.splits - 1) * division.row_tiles * tokens * TILE,
    )


@cache
def tune(spec: QuantizerSpec, out_features: int, in_features: int, batch: int, limits: Limits) -> Tuning | None:
    """The tuning that should be fastest; None where none fits."""
    tabled = table_size(spec, 1, signed=False) > 0
    signs = (True, False) if spec.has_trellis and tabled else (True,)
    replicas: tuple[int, ...] = (32, 16, 8, 4, 1)
    if not tabled or plane_bits(spec, pair_width(max(spec.rates))):
        replicas = (32,)  # no table, or every lane has a copy of its own anyway
    rings = (0,) if tabled else (_ring(spec), 0)  # with a table, lookups leave shared memory no time
    warps = 8 if _tokens(batch) * _digits(spec) > _MOST_COLUMNS[tabled] else 16
    shape = (spec, out_features, in_features, batch, limits)
    for splits, doublings in itertools.product(((1, 2, 3, 4, 6, 8), (12, 16, 24)), range(32)):
        if doublings and limits.multiprocessors << doublings > 2 * max(splits) * out_features // TILE:
            continue  # blocks have one row of tiles already
        best: tuple[float, Tuning] | None = None
        choices = itertools.product(replicas, signs, splits, (2, 1), (1, 2, 4), rings)
        for copies, signed, chunks, rows, groups, ring in choices:
            tuning = Tuning(
                warps,
                rows=rows,
                steps_at_start=2 if rows == 1 and not ring else 1,
                ring=ring if rows == 1 else min(ring, _RING_OF_TWO_ROWS),
                row_groups=groups,
                splits=chunks,
                replicas=copies,
                signed=signed,
                waves=1 << doublings,
            )
            division = _divide(*shape, tuning)
            if division is not None:
                cost = _cycles(spec, batch, division, tuning)
                if best is None or cost < best[0]:
                    best = cost, tuning
        if best is not None:
            return best[1]
    return None


# Cycles of an H200's multiprocessor, fitted to experiments/results/kernels_h200.csv.
_UNIT_CYCLES = 40
"""To decode a unit: its 32 pairs, and the loads of their codes."""
_MOST_COLUMNS = {False: 4, True: 16}
"""Of multiplications, up to which 16 warps of a block are best, without and with a table: more take registers."""
_RING_OF_TWO_ROWS = 2
"""Steps in flight where a step is two units; more only delay each other."""
_NO_RING = 1.06
"""What `_UNIT_CYCLES` grow by without a ring, where there is no table."""
_TOKEN_CYCLES = 2
"""To load a token's fragments, once for all rows of a step, for each of its digits."""
_CONFLICTS = {32: 1.0, 16: 1.19, 8: 1.5, 4: 1.8, 1: 2.1}
"""What `_UNIT_CYCLES` grow by with fewer copies of the table."""
_ONE_ROW = {"other": 1.12, "trellis": 1.05, "trellis, with conflicts": 0.95, "none": 1.03, "nibbles": 0.97}
"""And where a warp has one row at a time, by the kind of table."""
_UNSIGNED = 1.15
"""And where signs are set by an instruction of their own."""
_FIRST_STEP_UNITS = 0.8
"""What more rows in the first step cost, before which nothing can be decoded: in units of all warps."""
_SPLIT_CYCLES = 1700
"""To wait for the sums of each further block."""
_GROUP_CYCLES = 500
"""To wait for tokens that another group of warps brings."""
_DIGIT_CYCLES = {Family.TCQ: 0.08, Family.HALF_TCQ: 0.08, Family.NUQ: 0.03, Family.VQ: 0.03}
"""To make the digits of an activation, for hashes along four directions and for quads."""
_STORE_BYTES = 128
"""Of shared memory that a cycle writes; half of the table's time is spent waiting for weights anyway."""


def _cycles(spec: QuantizerSpec, batch: int, division: _Division, tuning: Tuning) -> float:
    """Cycles of the busiest multiprocessor, but for what all tunings have in common."""
    rounds = -(-division.block_tiles // (tuning.rows * tuning.row_groups))
    units = rounds * tuning.rows * _most_units(division.units, division.warps, tuning.row_groups)
    tokens = _tokens(batch) * _digits(spec)
    unit = _UNIT_CYCLES * _CONFLICTS[tuning.replicas]
    if tuning.rows == 1:
        unit *= _ONE_ROW[_kind_of_table(spec, tuning)]
    if not division.table_bytes and not tuning.ring:
        unit *= _NO_RING
    if spec.has_trellis and not tuning.signed:
        unit *= _UNSIGNED
    unit += _TOKEN_CYCLES * tokens / tuning.rows
    decoding = tuning.warps * unit * (units + _FIRST_STEP_UNITS * tuning.rows)
    slots = division.block_tiles * (tuning.warps // tuning.row_groups)
    adding = 2 * slots * max(1, _tokens(batch) * TILE / 32)
    activation = _DIGIT_CYCLES[spec.family] if _digits(spec) > 1 else 2 / _STORE_BYTES
    start = 0.5 * division.table_bytes / _STORE_BYTES + activation * batch * sum(division.units) * UNIT_COLUMNS
    waiting = (tuning.splits - 1) * (_SPLIT_CYCLES + division.block_tiles * batch)
    waiting += _GROUP_CYCLES if tuning.row_groups > 1 else 0
    return tuning.waves * (decoding + adding + start) + waiting


def _ring(spec: QuantizerSpec) -> int:
    """Steps in flight where a step is one unit: more where decoding takes less than the loads."""
    return 4 if in_nibbles(spec) else 3


def _kind_of_table(spec: QuantizerSpec, tuning: Tuning) -> str:
    if in_nibbles(spec):
        return "nibbles"
    if not spec.table_bytes:
        return "none"
    if not spec.has_trellis:
        return "other"
    return "trellis" if _CONFLICTS[tuning.replicas] == 1 else "trellis, with conflicts"
