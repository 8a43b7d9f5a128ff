"""What `bench_kernels` measures: shapes, tunings to compare, and the order in which they are taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..kernels.cuda.tuning import Launch, Limits, Tuning, launch_for, tune
from ..kernels.specs import QuantizerSpec

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gateup": (28672, 4096), "down": (4096, 14336)}
H200 = Limits(132, 227 << 10, bulk=True)


@dataclass(frozen=True)
class Case:
    """One number to measure."""

    spec: QuantizerSpec
    shape: str
    batch: int
    tuning: Tuning
    mode: str = "cold"
    programmatic: bool = False


def rings(bulk: bool) -> list[Tuning]:
    """Ways to divide the work, the likeliest first."""
    found = [
        Tuning(16, stages=2, stage_units=1, row_tiles=2),
        Tuning(16, stages=3, stage_units=1, row_tiles=2),
        Tuning(8, stages=4, stage_units=1, row_tiles=2),
        Tuning(16, stages=4, stage_units=1, row_tiles=1),
        Tuning(16, stages=2, stage_units=2, row_tiles=1),
        Tuning(16, stages=2, stage_units=2, row_tiles=2),
        Tuning(16, stages=4, stage_units=1, row_tiles=2),
        Tuning(32, stages=2, stage_units=1, row_tiles=1),
        Tuning(16, stages=3, stage_units=1, row_tiles=2, bulk=False),
        Tuning(8, stages=4, stage_units=1, row_tiles=2, resident=2),
        Tuning(8, stages=3, stage_units=2, row_tiles=2),
        Tuning(8, stages=8, stage_units=1, row_tiles=2),
        Tuning(16, stages=2, stage_units=1, row_tiles=2, resident=2),
        Tuning(8, blocks=2, stages=3, stage_units=1, row_tiles=2),
        Tuning(8, blocks=2, stages=4, stage_units=1, row_tiles=1),
        Tuning(8, stages=4, stage_units=1, row_tiles=2, bulk=False),
        Tuning(16, stages=2, stage_units=1, row_tiles=4),
        Tuning(32, stages=3, stage_units=1, row_tiles=1),
        Tuning(12, stages=3, stage_units=1, row_tiles=2),
    ]
    return [replace(ring, bulk=ring.bulk and bulk) for ring in found]


def tables(spec: QuantizerSpec) -> list[tuple[int, bool]]:
    """Copies of the table, and whether a trellis code's holds both signs."""
    if spec.has_trellis:
        return [(32, True), (32, False), (16, True), (16, False), (8, False)]
    return [(32, True), (8, True), (1, True)]


def variants(spec: QuantizerSpec, bulk: bool) -> Iterator[Tuning]:
    """Tunings to compare: every ring with the first two tables, the first ring with all, and split sums."""
    choices = tables(spec)
    base = rings(bulk)
    for replicas, signed in choices:
        yield replace(base[0], replicas=replicas, signed=signed)
    for ring in base[1:]:
        for replicas, signed in choices[: 2 if spec.has_trellis else 1]:
            yield replace(ring, replicas=replicas, signed=signed)
    yield replace(base[0], splits=2)
    yield replace(base[2], splits=2)


def cases(specs: list[QuantizerSpec], swept: list[QuantizerSpec], limits: Limits) -> Iterator[Case]:
    """What to measure, most telling first; tunings that do not fit are left out."""

    def best(spec: QuantizerSpec, shape: str, batch: int) -> list[Tuning]:
        chosen = tune(spec, *SHAPES[shape], batch, torch.float16, limits)
        return [] if chosen is None else [chosen]

    for spec, programmatic, shape in itertools.product(specs, (False, True), SHAPES):
        for tuning in best(spec, shape, 1):
            yield Case(spec, shape, 1, tuning, programmatic=programmatic)
    for spec, mode, shape in itertools.product(swept, ("hot", "start"), SHAPES):
        for tuning in best(spec, shape, 1):
            yield Case(spec, shape, 1, tuning, mode)
    for spec, batch, shape in itertools.product(specs, (8, 16, 2, 4), SHAPES):
        for tuning in best(spec, shape, batch):
            if batch == 8 or spec in swept:
                yield Case(spec, shape, batch, tuning)
    for ranked in itertools.zip_longest(*(list(variants(spec, limits.bulk)) for spec in swept)):
        for (spec, tuning), shape in itertools.product(zip(swept, ranked, strict=True), SHAPES):
            if tuning is not None:
                for programmatic in (False, True):
                    yield Case(spec, shape, 1, tuning, programmatic=programmatic)
    for spec, shape, splits, row_tiles, warps in itertools.product(swept, SHAPES, (1, 2, 4), (2, 1), (16, 8)):
        table = tables(spec)[1 if spec.has_trellis else 0]
        tuning = Tuning(warps, row_tiles=row_tiles, splits=splits, replicas=table[0], signed=table[1])
        yield Case(spec, shape, 8, replace(tuning, bulk=limits.bulk))


def launch_of(case: Case, limits: Limits) -> Launch | None:
    """How a case is launched; None where it does not fit."""
    return launch_for(case.spec, *SHAPES[case.shape], case.batch, torch.float16, limits, case.tuning)
