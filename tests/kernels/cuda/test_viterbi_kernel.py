"""The Viterbi search on a GPU against the reference: its source run on the CPU, and compiled for every architecture."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.cuda import viterbi
from msq.kernels.cuda.compiler import ARCHITECTURES, compile_source
from msq.kernels.cuda.limits import Limits
from msq.kernels.cuda.viterbi import Division, divide, shared_bytes, source
from msq.kernels.packing import sliding_states
from msq.kernels.quantizers.codes import state_points
from msq.kernels.quantizers.viterbi import viterbi_encode

from .emulate import Emulated, needs_compiler

SERVER, DESKTOP = Limits(multiprocessors=132, shared_bytes=227 << 10), Limits(multiprocessors=84, shared_bytes=99 << 10)


class Occupied(Emulated):
    """Says that one block fits, so that blocks take several groups of tiles one after another."""

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int) -> int:
        return 1


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """`viterbi` with kernels that run on the CPU, on a device of two multiprocessors."""
    count = iter(range(100))
    monkeypatch.setattr(viterbi, "load", lambda code, device: Occupied(code, tmp_path / str(next(count))))
    monkeypatch.setattr(viterbi, "device_limits", lambda index: Limits(2, 227 << 10))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def check_against_reference(pairs, points, width, **how):
    """Equal costs to 1e-6 in sum, and almost all codes equal."""
    found, expected = viterbi.encode(pairs, points, width, **how), viterbi_encode(pairs, points, width)
    state_bits = len(points).bit_length() - 1
    costs = []
    for codes in (found, expected):
        assert codes.dtype == torch.int32 and codes.shape == pairs.shape[:2]
        states = sliding_states(codes, width, state_bits)
        costs.append((points[states.long()].double() - pairs.double()).square().sum((1, 2)))
    assert float(costs[0].sum()) == pytest.approx(float(costs[1].sum()), rel=1e-6)
    assert float((found == expected).all(1).double().mean()) > 0.9


CASES = [  # state bits, width, mirrored, division: one for every way the work is divided
    (8, 3, False, Division(2, 32, 1, 1)),
    (9, 3, True, Division(8, 32, 1, 1)),
    (9, 3, False, Division(1, 32, 1, 1)),
    (10, 4, True, Division(4, 32, 4, 2)),
    (10, 4, False, Division(2, 64, 2, 2)),
    (10, 6, True, Division(8, 32, 4, 1)),
    (11, 10, True, Division(4, 32, 1, 1)),
    (10, 8, False, Division(2, 64, 1, 1)),
    (10, 7, False, None),
    (10, 5, True, None),
]


@needs_compiler
@pytest.mark.parametrize(("state_bits", "width", "mirrored", "division"), CASES)
def test_the_kernels_source_finds_the_references_codes(emulated, state_bits, width, mirrored, division):
    generator = torch.Generator().manual_seed(width)
    points = torch.randn(1 << state_bits, 2, generator=generator).half().float()
    if mirrored:
        points = torch.cat([points[: len(points) // 2], points[: len(points) // 2].flip(0)])
    pairs = torch.randn(11, 128, 2, generator=generator)
    check_against_reference(pairs, points, width, mirrored=mirrored, division=division)


@needs_compiler
def test_the_full_trellis(emulated):
    """The shipped code at L = 16 in the division that an H200 uses for few tiles."""
    from msq.kernels.codebooks import codebook
    from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

    points = state_points(codebook(QuantizerSpec(Family.TCQ, 3, 16, code=TrellisCode.HYB)), 16)
    assert torch.equal(points, points.flip(0))
    pairs = torch.randn(2, 128, 2, generator=torch.Generator().manual_seed(7))
    division = divide(16, 6, 128, 2, SERVER)
    assert division is not None and division.tiles == 1
    check_against_reference(pairs, points, 6, mirrored=True, division=division)


def test_no_tiles_no_codes():
    assert viterbi.encode(torch.empty(0, 128, 2), torch.zeros(16, 2), 3).shape == (0, 128)


@pytest.mark.parametrize("limits", [SERVER, DESKTOP])
@pytest.mark.parametrize("state_bits", range(9, 17))
def test_every_rate_fits_and_shares_all_the_work(limits, state_bits):
    for width in range(3, min(10, state_bits - 1) + 1):
        for tiles in (1, 500, 1 << 20):
            chosen = divide(state_bits, width, 128, tiles, limits)
            assert chosen is not None
            overlaps = 1 << state_bits - width
            assert chosen.splits(overlaps) <= 1 << width and chosen.threads % 32 == 0
            assert chosen.splits(overlaps) * overlaps == chosen.threads * chosen.run * chosen.runs * 2
            assert 2 * (shared_bytes(state_bits, width, 128, chosen) + 1024) <= limits.shared_bytes + 1024


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("state_bits", "width", "mirrored"), [(16, 3, True), (16, 7, True), (16, 4, False), (12, 10, False)]
)
def test_the_kernel_compiles(state_bits, width, mirrored, arch):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    chosen = divide(state_bits, width, 128, 1 << 20, DESKTOP)
    assert compile_source(source(state_bits, width, 128, chosen, mirrored=mirrored), arch)[:4] == b"\x7fELF"
