"""Every kind of kernel once, on small shapes: what `make sanitize` runs under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import random_weight
from msq.kernels.cuda import attention, decode, hadamard
from msq.kernels.cuda.dequantize import dequantize
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.rotation_plan import fuses_norm, rotation_tables
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SPECS = [
    QuantizerSpec(Family.INT, 3),
    QuantizerSpec(Family.INT, 8),
    QuantizerSpec(Family.NUQ, 2),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.NUQ, 8),
    QuantizerSpec(Family.VQ, 2),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 3, 16),
    QuantizerSpec(Family.TCQ, 3, 16, code=TrellisCode.HYB),
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
            assert hadamard.rotate_added(gate, up, up[0].clone(), 1e-5, tables)[0].isfinite().all()


@pytest.mark.parametrize("size", [40, 64, 128, 256])
def test_attention(size):
    heads, key_heads, batch, capacity = 8, 2, 3, 96
    q, k, v = (torch.randn(batch, count * size, device=DEVICE).half() for count in (heads, key_heads, key_heads))
    cosines, sines = torch.rand(2, capacity, size // 2, device=DEVICE)
    weights = torch.rand(2, size, device=DEVICE).half()
    keys, values = torch.randn(2, batch, key_heads, capacity, size, device=DEVICE).half()
    positions = torch.tensor([95, 0, 40], dtype=torch.int32, device=DEVICE)
    turning = attention.Turning(cosines, sines, *weights, 1e-5)
    room = attention.new_workspace(heads, key_heads, size, batch, capacity, DEVICE)
    for window in (0, 7):
        given = q, k, v, turning, positions, keys, values
        assert attention.attend(*given, scale=0.1, window=window, workspace=room).isfinite().all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_products(spec):
    room = decode.new_workspace(1 << 20, DEVICE)
    for shape in [(48, 96), (272, 1056), (32, 4096)]:
        weight = prepare(random_weight(spec, *shape, DEVICE))
        assert dequantize(weight).isfinite().all()
        for batch, dtype in [(1, torch.float16), (3, torch.bfloat16), (16, torch.float16)]:
            x = torch.randn(batch, shape[1], device=DEVICE).to(dtype)
            assert decode.multiply(x, weight, workspace=room, programmatic=True).isfinite().all()
