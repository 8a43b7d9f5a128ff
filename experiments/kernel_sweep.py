"""What `bench_kernels` measures: shapes, tunings to compare, and the order in which they are taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..kernels.cuda.jit import Source
from ..kernels.cuda.limits import Limits
from ..kernels.cuda.tuning import Launch, Tuning, lanes_share_tables, launch_for
from ..kernels.cuda.tuning_choice import tune
from ..kernels.specs import QuantizerSpec

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gateup": (28672, 4096), "down": (4096, 14336)}
H200 = Limits(132, 227 << 10)


@dataclass(frozen=True)
class Case:
    """One number to measure."""

    spec: QuantizerSpec
    shape: str
    batch: int
    tuning: Tuning
    mode: str = "cold"
    programmatic: bool = False


DIVISIONS = [
    Tuning(),
    Tuning(rows=1),
    Tuning(row_groups=2),
    Tuning(rows=1, row_groups=2),
    Tuning(8),
    Tuning(12),
    Tuning(24, rows=1),
    Tuning(row_groups=4),
    Tuning(8, rows=1, resident=2),
    Tuning(8, rows=1, blocks=2),
    Tuning(splits=2),
]
"""Ways to divide the work, the likeliest first."""

RINGS = [
    Tuning(ring=2),
    Tuning(rows=1, ring=3),
    Tuning(rows=1, ring=4),
    Tuning(12, ring=2),
    Tuning(12, rows=1, ring=3),
    Tuning(row_groups=2, ring=2),
]
"""More of them, but for trellis codes with a table."""

PARTS = {"lookups": 1, "table": 2, "tokens": 4, "weights": 8, "adding": 16, "memory": 2 + 4 + 8, "all": 31}
"""What a kernel can leave out to show what it costs: bits of the macro WITHOUT (ptx.cuh)."""


def tables(spec: QuantizerSpec) -> list[tuple[int, bool]]:
    """Copies of the table, and whether a trellis code's holds both signs; one choice where all lanes have their own."""
    if not lanes_share_tables(spec):
        return [(32, True)]
    if spec.has_trellis:
        return [(32, True), (32, False), (16, True), (16, False), (8, False)]
    return [(32, True), (8, True), (1, True)]


def variants(spec: QuantizerSpec) -> Iterator[Tuning]:
    """Tunings to compare: rings; every division with the first two tables, the first one with all."""
    if not (spec.has_trellis and spec.table_bytes):
        yield from RINGS
    choices = tables(spec)
    for replicas, signed in choices:
        yield replace(DIVISIONS[0], replicas=replicas, signed=signed)
    for division in DIVISIONS[1:]:
        for replicas, signed in choices[: 2 if spec.has_trellis else 1]:
            yield replace(division, replicas=replicas, signed=signed)


def default_cases(specs: list[QuantizerSpec], swept: list[QuantizerSpec], limits: Limits) -> Iterator[Case]:
    """Chosen tunings: at batch 1, part by part, and at other batches; what the tokens of 8 cost."""

    def chosen(
        spec: QuantizerSpec, shape: str, batch: int, mode: str = "cold", programmatic: bool = False
    ) -> list[Case]:
        tuning = tune(spec, *SHAPES[shape], batch, limits)
        return [] if tuning is None else [Case(spec, shape, batch, tuning, mode, programmatic)]

    for spec, programmatic, shape in itertools.product(specs, (False, True), SHAPES):
        yield from chosen(spec, shape, 1, programmatic=programmatic)
    modes = ("hot", "start", *(f"without {part}" for part in PARTS))
    for spec, mode, shape in itertools.product(swept, modes, SHAPES):
        yield from chosen(spec, shape, 1, mode)
    for spec, batch, shape in itertools.product(specs, (8, 16, 2, 4), SHAPES):
        if batch == 8 or spec in swept:
            yield from chosen(spec, shape, batch)
    for spec, shape in itertools.product(swept, SHAPES):
        yield from chosen(spec, shape, 8, "without tokens")


def cases(specs: list[QuantizerSpec], swept: list[QuantizerSpec], limits: Limits) -> Iterator[Case]:
    """What to measure, most telling first; tunings that do not fit are to be left out."""
    yield from default_cases(specs, swept, limits)
    for ranked in itertools.zip_longest(*(list(variants(spec)) for spec in swept)):
        for (spec, tuning), shape, programmatic in itertools.product(
            zip(swept, ranked, strict=True), SHAPES, (False, True)
        ):
            if tuning is not None:
                yield Case(spec, shape, 1, tuning, programmatic=programmatic)
    for spec, batch, shape, splits, warps in itertools.product(swept, (8, 16), SHAPES, (1, 2), (16, 8)):
        for replicas, signed in tables(spec)[: 2 if spec.has_trellis else 1]:
            yield Case(spec, shape, batch, Tuning(warps, splits=splits, replicas=replicas, signed=signed))


def launch_of(case: Case, limits: Limits) -> Launch | None:
    """How a case is launched; None where it does not fit."""
    launch = launch_for(case.spec, *SHAPES[case.shape], case.batch, torch.float16, limits, case.tuning)
    part = PARTS.get(case.mode.removeprefix("without "))
    if launch is None or part is None:
        return launch
    source = Source(launch.source.file, launch.source.entry, dict(launch.source.macros) | {"WITHOUT": part})
    return replace(launch, source=source)
