"""How a decode kernel divides its work: `Tuning`, what it takes (`launch_for`), and the choice of one (`tune`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..specs import TILE, Family, QuantizerSpec
from .jit import Source
from .layout import UNIT_COLUMNS, pair_width
from .limits import Limits, device_limits

__all__ = ["FORMATS", "Launch", "Limits", "Tuning", "device_limits", "launch_for", "table_macros", "tune"]


FORMATS = {torch.float16: 0, torch.bfloat16: 1}
_FAMILIES = {Family.INT: 0, Family.NUQ: 1, Family.VQ: 2, Family.TCQ: 3, Family.HALF_TCQ: 3}
_LARGEST_PAIR_TABLE = {Family.INT: 4, Family.NUQ: 5}
"""Bits up to which pairs of weights are looked up; above, `nuq` looks up single weights and `int` calculates."""

_WORDS_AHEAD = 16
"""Words of packed weights that a lane has under way while it decodes a unit: with 16 warps 32 KB a multiprocessor, what
it takes to keep an H200's memory busy."""
_DEEPEST = 5
"""Units in registers at most: the loop is unrolled as often."""

_RESERVED_BYTES = 1024
"""Shared memory that the system takes of every block's."""


@dataclass(frozen=True)
class Tuning:
    """How a decode kernel divides its work; any choice gives right results where it fits.

    Attributes:
        warps: warps of a block.
        blocks: blocks of a launch for each multiprocessor.
        resident: blocks for which a multiprocessor has registers; more than `blocks` lets the next launch start early.
        depth: units (16 rows x 128 columns) that a warp has in registers or on their way; 0 for 16 words a lane ahead.
        splits: chunks of the input dimension that different blocks take.
        replicas: copies of the table in shared memory; 32 make every lookup free of conflicts.
        signed: for trellis codes, a table of both signs: twice as large, one instruction less a pair.
        waves: launches with more rows than shared memory has room for take several blocks one after another.
    """

    warps: int = 16
    blocks: int = 1
    resident: int = 1
    depth: int = 0
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
        shared_bytes: dynamic shared memory of a block.
        row_capacity: rows of a block for which `shared_bytes` has room.
        workspace_words: 32-bit words of workspace, all ones before the first call and after each.
    """

    source: Source
    grid: int
    block: int
    shared_bytes: int
    row_capacity: int
    workspace_words: int


def table_macros(spec: QuantizerSpec, replicas: int, signed: bool) -> tuple[dict[str, int], int]:
    """Macros of ``decoders.cuh`` without the widths, and the bytes of the table in shared memory."""
    entries = spec.codebook_shape[0]
    pairs = spec.family is Family.VQ or spec.bits <= _LARGEST_PAIR_TABLE.get(spec.family, 0)
    macros = {
        "FAMILY": _FAMILIES[spec.family],
        "STATE_BITS": spec.state_bits,
        "TABLE_BITS": max(entries.bit_length() - 1, 0),
        "TABLE_OF_PAIRS": pairs,
        "REPLICAS": replicas,
        "SIGNED_TABLE": signed and spec.has_trellis,
    }
    if spec.has_trellis:
        entries <<= signed
    elif pairs:
        entries = 1 << pair_width(spec.bits)
    return macros, 4 * entries * replicas


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
    tokens = 1 << (batch - 1).bit_length()
    row_tiles = out_features // TILE
    widths = [pair_width(rate) for rate in spec.rates]
    units = [-(-tiles * TILE // UNIT_COLUMNS) for tiles in spec.segment_tiles(in_features)]
    macros, table_bytes = table_macros(spec, tuning.replicas, tuning.signed)
    tile_sums = tokens * (16 if tokens == 1 else 20)
    macros |= {
        "WIDTH_LOW": widths[0],
        "WIDTH_HIGH": widths[1] if len(widths) > 1 else 0,
        "DEPTH": tuning.depth or min(_DEEPEST, 1 - -_WORDS_AHEAD // max(widths)),
        "WARPS": tuning.warps,
        "RESIDENT": max(tuning.blocks, tuning.resident),
        "TOKENS": tokens,
        "BFLOAT": FORMATS[dtype],
        "SPLITS": tuning.splits,
    }
    chunk_blocks = min(limits.multiprocessors * tuning.blocks * tuning.waves // tuning.splits, row_tiles)
    if not chunk_blocks:
        return None
    block_tiles = -(-row_tiles // chunk_blocks)
    row_capacity = block_tiles * TILE
    columns = sum(-(-count // tuning.splits) for count in units) * UNIT_COLUMNS
    factors = (tuning.warps + 1) * tokens * 4
    slots = len(widths) * block_tiles + tuning.warps
    shared = table_bytes + factors + -factors % 16 + slots * tile_sums * 4
    shared += 2 * 2 * row_capacity + batch * 2 * (columns + 8)
    if shared > (limits.shared_bytes + _RESERVED_BYTES) // tuning.blocks - _RESERVED_BYTES:
        return None
    return Launch(
        Source("decode.cu", "multiply", macros),
        chunk_blocks * tuning.splits,
        32 * tuning.warps,
        shared,
        row_capacity,
        (tuning.splits - 1) * row_tiles * tokens * TILE,
    )


@cache
def tune(
    spec: QuantizerSpec, out_features: int, in_features: int, batch: int, dtype: torch.dtype, limits: Limits
) -> Tuning | None:
    """The tuning that should be fastest; None where none fits."""
    start = Tuning(replicas=1 if spec.family is Family.INT and spec.bits > 4 else 32)
    signs = (True, False) if spec.has_trellis else (True,)
    tables = list(
        dict.fromkeys([start, *(replace(start, replicas=r, signed=s) for r in (32, 16, 8, 4, 1) for s in signs)])
    )
    best: tuple[float, Tuning] | None = None
    for splits, (rank, table), waves in itertools.product(range(1, 9), enumerate(tables), (1, 2, 4, 8)):
        tuning = replace(table, splits=splits, waves=waves)
        launch = launch_for(spec, out_features, in_features, batch, dtype, limits, tuning)
        if launch is None:
            continue
        cost = _cost(spec, in_features, batch, launch, tuning) * (1 + 0.05 * rank)
        if best is None or cost < best[0]:
            best = cost, tuning
    return None if best is None else best[1]


_START_BYTES = 30_000
"""Bytes that a multiprocessor could read while a block prepares its table (1 µs on an H200)."""

_TABLE_COST = 0.25
"""Bytes that a multiprocessor could read while it writes one of the table."""

_COMBINE_BYTES = 24_000
"""Bytes that a multiprocessor could read while blocks wait for one another's sums (0.8 µs on an H200)."""


def _cost(spec: QuantizerSpec, in_features: int, batch: int, launch: Launch, tuning: Tuning) -> float:
    """Bytes that the busiest multiprocessor has to read, waiting included: a stand-in for time."""
    columns = -(-in_features // tuning.splits)
    weights = launch.row_capacity * columns * spec.bits / 8
    tokens = batch * columns * 2
    waiting = _COMBINE_BYTES + (tuning.splits - 1) * launch.row_capacity * batch * 4 if tuning.splits > 1 else 0
    table = _TABLE_COST * table_macros(spec, tuning.replicas, tuning.signed)[1]
    return tuning.waves * (weights + 0.7 * tokens + table + _START_BYTES) + waiting
