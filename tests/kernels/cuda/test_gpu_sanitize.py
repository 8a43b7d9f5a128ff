"""Every kind of kernel once, on small shapes: what `make sanitize` runs under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import random_weight
from msq.kernels.cuda import decode, hadamard
from msq.kernels.cuda.dequantize import dequantize
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.rotation_plan import fuses_norm, rotation_tables
from msq.kernels.specs import Family, QuantizerSpec

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SPECS = [
    QuantizerSpec(Family.INT, 3),
    QuantizerSpec(Family.INT, 8),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.NUQ, 8),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 3, 16),
    QuantizerSpec(Family.TCQ, 2.5, 12),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 16),
]


@pytest.mark.parametrize("size", [96, 512, 1536, 4096, 4304, 13824])
def test_rotations(size):
    tables = rotation_tables(size, 3, DEVICE)
    for rows in (1, 33):
        gate, up = torch.randn(2, rows, size, device=DEVICE).half()
        assert hadamard.rotate(gate, tables).isfinite().all()
        assert hadamard.rotate_gated(gate, up, tables).isfinite().all()
        if fuses_norm(size):
            assert hadamard.rotate_normed(gate, up[0].clone(), 1e-5, tables).isfinite().all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_products(spec):
    room = decode.new_workspace(1 << 20, DEVICE)
    for shape in [(48, 96), (272, 1056), (32, 4096)]:
        weight = prepare(random_weight(spec, *shape, DEVICE))
        assert dequantize(weight).isfinite().all()
        for batch, dtype in [(1, torch.float16), (3, torch.bfloat16), (16, torch.float16)]:
            x = torch.randn(batch, shape[1], device=DEVICE).to(dtype)
            assert decode.multiply(x, weight, workspace=room, programmatic=True).isfinite().all()
