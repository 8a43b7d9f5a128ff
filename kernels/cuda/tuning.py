"""How a decode kernel divides its work: `Tuning`, and what it takes (`launch_for`); `tuning_choice` chooses one."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..mad import mad_code
from ..specs import BYTE_LEVEL_BITS, TILE, Family, QuantizerSpec, TrellisCode
from .jit import Source
from .layout import UNIT_COLUMNS, in_nibbles, pair_width, plane_bits
from .limits import Limits

FORMATS = {torch.float16: 0, torch.bfloat16: 1}
_FAMILIES = {Family.INT: 0, Family.NUQ: 1, Family.VQ: 2, Family.TCQ: 3, Family.HALF_TCQ: 3}
_MAD = 4
_LARGEST_PAIR_TABLE = {Family.NUQ: 5}
"""Bits up to which pairs of weights are looked up; above, `nuq` looks up single weights."""

_MOST_UNITS = 250
"""Of a warp in a row, so that sums of bytes times digits, of two hashes at most, stay below 2^31."""

_MOST_QUAD_TOKENS = 4
"""Tokens up to which their digits cost less than multiplying bytes saves (experiments/results/kernels_h200_log.md)."""
_BYTE_ENTRY = 256
"""Bytes from one entry to the next in the table of a quantizer whose codes are bytes."""


@dataclass(frozen=True)
class Tuning:
    """How a decode kernel divides its work; any choice gives right results where it fits.

    Attributes:
        warps: warps of a block.
        blocks: blocks of a launch for each multiprocessor.
        resident: blocks that a multiprocessor takes where shared memory is enough, and has registers for; more than
            `blocks` lets the next launch start early.
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


def decoder_macros(
    spec: QuantizerSpec, rates: Sequence[float], replicas: int, signed: bool, *, tokens: int = 1
) -> dict[str, int | str]:
    """Macros of ``decoders.cuh`` for one or two of the quantizer's rates, to multiply so many tokens."""
    widths = [pair_width(rate) for rate in rates]
    macros: dict[str, int | str] = {
        "FAMILY": _FAMILIES[spec.family],
        "STATE_BITS": spec.state_bits,
        "TABLE_BITS": max(spec.codebook_shape[0].bit_length() - 1, 0),
        "LEVEL_BITS": BYTE_LEVEL_BITS if spec.has_byte_levels else 0,
        "AS_BYTES": in_quads(spec, tokens),
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


def lanes_share_tables(spec: QuantizerSpec) -> bool:
    """Whether how many copies the table has is a choice: there is one, and not every lane has a copy anyway."""
    return table_size(spec, 1, signed=False) < table_size(spec, 32, signed=False)


@dataclass(frozen=True)
class Division:
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


def compiled_tokens(batch: int) -> int:
    """Tokens that a kernel is compiled for."""
    return 1 << (batch - 1).bit_length()


def in_quads(spec: QuantizerSpec, tokens: int) -> bool:
    """Whether weights are multiplied as the bytes of quads: of more tokens, digits would take longer to make."""
    return spec.has_byte_levels and tokens <= _MOST_QUAD_TOKENS


def digits_of(spec: QuantizerSpec, tokens: int) -> int:
    """Numbers that stand for an activation: fp16, or the 8-bit digits that are multiplied by bytes."""
    return 2 if spec.code is TrellisCode.MAD or in_quads(spec, tokens) else 1


def _token_bytes(spec: QuantizerSpec, units: int, tokens: int) -> int:
    """Bytes of shared memory that a token takes: a column's digits for quads are bytes (``decode.cu``)."""
    columns = units * UNIT_COLUMNS
    return digits_of(spec, tokens) * (columns + 64 if in_quads(spec, tokens) else 2 * columns + 16)


def _share_warps(units: tuple[int, ...], tuning: Tuning) -> tuple[int, ...] | None:
    """Warps for each segment, so that the busiest has least to do; None where there are too few."""
    if len(units) == 1:
        return (tuning.warps,)
    groups = tuning.row_groups
    choices = [(tuning.warps - high, high) for high in range(groups, tuning.warps, groups)]
    return min(choices, key=lambda warps: most_units(units, warps, groups), default=None)


def most_units(units: tuple[int, ...], warps: tuple[int, ...], groups: int) -> int:
    """Units of a row of tiles for the busiest warp."""
    return max(-(-count // (some // groups)) for count, some in zip(units, warps, strict=True))


def divide(
    spec: QuantizerSpec, out_features: int, in_features: int, batch: int, limits: Limits, tuning: Tuning
) -> Division | None:
    """None where `tuning` does not fit the device."""
    tokens, row_tiles = compiled_tokens(batch), out_features // TILE
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
    shared_bytes += 2 * 2 * TILE * block_tiles + tokens * _token_bytes(spec, sum(units), tokens)
    if shared_bytes > limits.bytes_for_each(tuning.blocks):
        return None
    warps = _share_warps(units, tuning)
    if warps is None or (digits_of(spec, tokens) > 1 and most_units(units, warps, tuning.row_groups) > _MOST_UNITS):
        return None
    return Division(row_tiles, chunk_blocks, block_tiles, units, warps, table_bytes, shared_bytes)


def launch_for(
    spec: QuantizerSpec,
    out_features: int,
    in_features: int,
    batch: int,
    dtype: torch.dtype,
    limits: Limits,
    tuning: Tuning,
) -> Launch | None:
    """The launch of a shape; None where `tuning` does not fit the device.

    Shared memory is made large enough that a multiprocessor takes no more blocks than `tuning` means it to. Beside a
    kernel that holds some multiprocessors, as a rotation does, others would else be given two blocks and some none.
    """
    division = divide(spec, out_features, in_features, batch, limits, tuning)
    if division is None:
        return None
    tokens, widths = compiled_tokens(batch), [pair_width(rate) for rate in spec.rates]
    resident = max(tuning.blocks, tuning.resident)
    macros = decoder_macros(spec, spec.rates, tuning.replicas, tuning.signed, tokens=tokens) | {
        "WIDTH_HIGH": widths[1] if len(widths) > 1 else 0,
        "ROWS": tuning.rows,
        "STEPS_AT_START": tuning.steps_at_start,
        "RING": tuning.ring,
        "ROW_GROUPS": tuning.row_groups,
        "WARPS": tuning.warps,
        "HIGH_WARPS": division.warps[1] if len(widths) > 1 else 0,
        "RESIDENT": resident,
        "TOKENS": tokens,
        "BFLOAT": FORMATS[dtype],
        "SPLITS": tuning.splits,
    }
    return Launch(
        Source("decode.cu", "multiply", macros),
        division.chunk_blocks * tuning.splits,
        32 * tuning.warps,
        division.chunk_blocks,
        max(division.shared_bytes, limits.bytes_for_at_most(resident)),
        division.block_tiles,
        (tuning.splits - 1) * division.row_tiles * tokens * TILE,
    )
