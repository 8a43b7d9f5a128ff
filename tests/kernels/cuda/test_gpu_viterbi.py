"""The trellis search on a device against the reference; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.bench_encoder import check
from msq.experiments.kernel_checks import CHECKED
from msq.experiments.train_codebooks import gaussian_pairs, measure
from msq.kernels.codebooks import codebook, gaussian_error
from msq.kernels.cuda.viterbi import encode
from msq.kernels.quantize import quantize
from msq.kernels.quantizers.codes import state_points
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def test_every_rate_and_code_costs_what_the_reference_costs():
    for _, label, what, value, _ in check(DEVICE):
        if what.startswith("cost"):
            assert abs(value) < 1e-6, label
        else:
            assert value > 0.97, label


@pytest.mark.parametrize("tiles", [1, 3, 131, 2500])
def test_any_number_of_tiles_and_no_more(tiles):
    points = state_points(codebook(QuantizerSpec(Family.TCQ, 3, 16, code=TrellisCode.HYB)), 16).to(DEVICE)
    pairs = torch.randn(2500, 128, 2, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    every = encode(pairs, points, 6, mirrored=True)
    found = encode(pairs[:tiles].clone(), points, 6, mirrored=True)
    assert torch.equal(found, every[:tiles])
    assert torch.equal(encode(pairs[:tiles], points, 6), found)  # without the symmetry


@pytest.mark.parametrize("spec", [s for s in CHECKED if s.has_trellis], ids=lambda spec: spec.label)
def test_recorded_errors_are_what_the_shipped_tables_give(spec):
    error = measure(spec, codebook(spec).to(DEVICE), gaussian_pairs(16384, 5, "cuda"))
    assert error == pytest.approx(gaussian_error(spec), rel=5e-3)


def test_a_layer_is_the_same_again():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for bits in (1.75, 3.125):
        spec = QuantizerSpec(Family.HALF_TCQ, bits, 16)
        first, second = (dict(quantize(weight, spec, rotation_seed=1).tensors()) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
