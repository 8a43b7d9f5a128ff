"""The choice of a tuning for a shape, by a model of a multiprocessor's cycles (`tune`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

from ..mad import TWO_HASHES_FROM
from ..specs import TILE, Family, QuantizerSpec, TrellisCode
from .layout import LARGEST_BYTE_CODE, UNIT_COLUMNS, in_nibbles, pair_width, plane_bits
from .limits import Limits
from .tuning import Division, Tuning, compiled_tokens, digits_of, divide, lanes_share_tables, most_units, table_size


@dataclass(frozen=True)
class _Loop:
    """How a warp may go through its units.

    Attributes:
        rows, ring, warps: as in `Tuning`.
        cost: of a unit, relative to `_UNIT_CYCLES`.
    """

    rows: int
    ring: int
    warps: int
    cost: float


def _without_table(one_row: _Loop, few_warps: _Loop) -> dict[int, tuple[_Loop, ...]]:
    """Loops where a step is one unit, with many warps and with few, beside those that all have in common.

    Few warps take longer for a unit, but less of them wait for the first one.
    """
    loops = (_Loop(2, 2, 16, 1.0), one_row, _Loop(2, 0, 16, 1.06), _Loop(1, 0, 16, 1.11))
    return {4: (*loops, few_warps), 16: tuple(replace(loop, warps=8) for loop in loops)}


# What follows is of an H200's multiprocessor, fitted to experiments/results/kernels_h200.csv, and for byte planes to
# steps of whole models (figure1_h200_log.md beside it).
_OF_BYTES = (_Loop(2, 2, 12, 1.0), _Loop(1, 3, 12, 1.09), _Loop(2, 0, 16, 1.2), _Loop(1, 0, 16, 1.3))
_LOOPS: dict[str, dict[int, tuple[_Loop, ...]]] = {
    "no table": _without_table(_Loop(1, 3, 16, 1.03), _Loop(1, 4, 8, 1.09)),
    "no table, 2 bits": _without_table(_Loop(1, 3, 16, 1.03), _Loop(1, 6, 8, 1.09)),
    "no table, 3 bits": _without_table(_Loop(1, 4, 16, 0.97), _Loop(1, 4, 8, 1.02)),
    "no table, two hashes": _without_table(_Loop(1, 3, 16, 1.06), _Loop(1, 3, 12, 0.965)),
    "bytes": {
        4: _OF_BYTES,
        8: (_Loop(2, 0, 16, 1.0), _Loop(2, 2, 8, 1.15), _Loop(1, 3, 8, 1.2), _Loop(1, 0, 16, 1.15)),
        16: (_Loop(2, 0, 16, 1.0), _Loop(1, 0, 16, 1.15)),
    },
    "byte planes": {
        4: _OF_BYTES,
        16: (_Loop(2, 0, 16, 1.0), _Loop(1, 3, 12, 1.05), _Loop(1, 0, 16, 1.15)),
    },
    "tables": {16: (_Loop(2, 0, 16, 1.0), _Loop(1, 3, 16, 0.97), _Loop(1, 0, 16, 1.1))},
    "trellis tables": {16: (_Loop(2, 0, 16, 1.0), _Loop(1, 0, 16, 1.0))},
}
"""The loops that suit a kind of decoder, for up to so many tokens, ascending.

More steps in flight only delay each other; lookups leave shared memory little time for rings. Where 12 warps are about
as fast as 16 that take all registers, they are better: a model's other kernels then find room beside them.
"""
_UNIT_CYCLES = 40
"""To decode a unit: its 32 pairs, and the loads of their codes."""
_TOKEN_CYCLES = 2
"""To load a token's fragments, once for all rows of a step, for each of its digits."""
_CONFLICTS = {32: 1.0, 16: 1.19, 8: 1.5, 4: 1.8, 1: 2.1}
"""What `_UNIT_CYCLES` grow by with fewer copies of the table."""
_TRELLIS_ROW = {True: 1.05, False: 0.95}
"""And where a warp has one row of a trellis table at a time, without and with conflicts."""
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


@cache
def tune(spec: QuantizerSpec, out_features: int, in_features: int, batch: int, limits: Limits) -> Tuning | None:
    """The tuning that should be fastest of those that are tried; None where none of them fits."""
    signs = (True, False) if spec.has_trellis and spec.table_bytes else (True,)
    replicas = (32, 16, 8, 4, 1) if lanes_share_tables(spec) else (32,)
    loops = next(loops for most, loops in _LOOPS[_kind(spec)].items() if compiled_tokens(batch) <= most)
    shape = (spec, out_features, in_features, batch, limits)
    for splits, doublings in itertools.product(((1, 2, 3, 4, 6, 8), (12, 16, 24)), range(32)):
        if doublings and limits.multiprocessors << doublings > 2 * max(splits) * out_features // TILE:
            continue  # blocks have one row of tiles already
        best: tuple[float, Tuning] | None = None
        for copies, signed, chunks, groups, loop in itertools.product(replicas, signs, splits, (1, 2, 4), loops):
            tuning = Tuning(
                loop.warps,
                rows=loop.rows,
                steps_at_start=2 if loop.rows == 1 and not loop.ring else 1,
                ring=loop.ring,
                row_groups=groups,
                splits=chunks,
                replicas=copies,
                signed=signed,
                waves=1 << doublings,
            )
            division = divide(*shape, tuning)
            if division is not None:
                cost = _cycles(spec, batch, division, tuning, loop.cost)
                if best is None or cost < best[0]:
                    best = cost, tuning
        if best is not None:
            return best[1]
    return None


def _kind(spec: QuantizerSpec) -> str:
    """In `_LOOPS`."""
    if in_nibbles(spec):
        return f"no table, {spec.bits:g} bits"
    if spec.code is TrellisCode.MAD and pair_width(min(spec.rates)) >= TWO_HASHES_FROM:
        return "no table, two hashes"
    if not table_size(spec, 1, signed=False):
        return "no table"
    if spec.has_trellis:
        return "trellis tables"
    bits = plane_bits(spec, pair_width(spec.bits))
    return "tables" if not bits else "bytes" if bits == LARGEST_BYTE_CODE else "byte planes"


def _cycles(spec: QuantizerSpec, batch: int, division: Division, tuning: Tuning, loop_cost: float) -> float:
    """Cycles of the busiest multiprocessor, but for what all tunings have in common."""
    rounds = -(-division.block_tiles // (tuning.rows * tuning.row_groups))
    units = rounds * tuning.rows * most_units(division.units, division.warps, tuning.row_groups)
    tokens = compiled_tokens(batch)
    digits = digits_of(spec, tokens)
    unit = _UNIT_CYCLES * loop_cost * _CONFLICTS[tuning.replicas]
    if spec.has_trellis and spec.table_bytes:
        if tuning.rows == 1:
            unit *= _TRELLIS_ROW[tuning.replicas == 32]
        if not tuning.signed:
            unit *= _UNSIGNED
    unit += _TOKEN_CYCLES * tokens * digits / tuning.rows
    decoding = tuning.warps * unit * (units + _FIRST_STEP_UNITS * tuning.rows)
    slots = division.block_tiles * (tuning.warps // tuning.row_groups)
    adding = 2 * slots * max(1, tokens * TILE / 32)
    activation = _DIGIT_CYCLES[spec.family] if digits > 1 else 2 / _STORE_BYTES
    start = 0.5 * division.table_bytes / _STORE_BYTES + activation * batch * sum(division.units) * UNIT_COLUMNS
    waiting = (tuning.splits - 1) * (_SPLIT_CYCLES + division.block_tiles * batch)
    waiting += _GROUP_CYCLES if tuning.row_groups > 1 else 0
    return tuning.waves * (decoding + adding + start) + waiting
