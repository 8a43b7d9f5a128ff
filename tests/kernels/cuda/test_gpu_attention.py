"""Attention of a decoding step and rotations of sums on a device, against their twins; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.cuda import attention, hadamard, step_ops  # noqa: F401 (registers the operators)
from msq.kernels.cuda.attention import Turning, new_workspace
from msq.kernels.cuda.limits import device_limits
from msq.kernels.cuda.rotation_plan import rotation_tables
from torch.library import opcheck

from .test_attention_kernel import CASES, inputs, relative_error, twin

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LONG = [
    (32, 8, 128, (255,), 512, 0, torch.float16, False),
    (32, 8, 128, (100,), 4096, 0, torch.bfloat16, False),
    (32, 8, 128, (600,), 4096, 0, torch.float16, False),
    (28, 4, 128, (5000,), 8192, 0, torch.float16, False),
    (28, 4, 128, (4096,), 8192, 4096, torch.bfloat16, False),
    (16, 1, 256, (9000,), 16384, 0, torch.float16, False),
    (32, 32, 64, (4000, 2), 8192, 0, torch.bfloat16, False),
    (32, 8, 128, (3000, 17, 255, 0, 1023, 4095, 64, 65), 4096, 0, torch.float16, False),
    (28, 4, 128, (700, 1), 1024, 512, torch.bfloat16, False),
    (64, 8, 128, (900,) * 16, 1024, 0, torch.bfloat16, True),
]


def on_device(given):
    q, k, v, turning, *rest = given
    moved = [
        None if t is None else t.to(CUDA) for t in (turning.cosines, turning.sines, turning.q_weight, turning.k_weight)
    ]
    return q.to(CUDA), k.to(CUDA), v.to(CUDA), Turning(*moved, turning.epsilon), *(t.to(CUDA) for t in rest)


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "positions", "capacity", "window", "dtype", "norm"), CASES + LONG
)
def test_the_kernel_is_its_twin_and_repeats_bit_for_bit(
    heads, key_heads, size, positions, capacity, window, dtype, norm
):
    given = inputs(heads, key_heads, size, positions, capacity, dtype, norm)
    *rest, keys, values = given
    known = [torch.where(cache.isnan(), 0, cache) for cache in (keys, values)]
    expected = twin(*rest, *known, size**-0.5, window)
    *rest, keys, values = on_device(given)
    workspace = new_workspace(heads, key_heads, size, len(positions), capacity, CUDA)
    first = None
    for _ in range(20):
        found = attention.attend(*rest, keys, values, scale=size**-0.5, window=window, workspace=workspace)
        assert relative_error(found.cpu(), expected) < (1e-3 if dtype is torch.float16 else 6e-3)
        assert first is None or torch.equal(found, first)
        first = found
    shape = attention.shape_for(heads, key_heads, size, len(positions), capacity, device_limits(0))
    assert attention._ready(shape, dtype, norm, keys.device).spilled_bytes == 0
    for row, position in enumerate(positions):
        for mine, theirs in ((keys, known[0]), (values, known[1])):
            assert relative_error(mine[row, :, : position + 1].cpu(), theirs[row, :, : position + 1]) < 1e-2
            assert mine[row, :, position + 1 :].isnan().all()


def test_operators_keep_torchs_rules():
    *rest, keys, values = on_device(inputs(8, 2, 64, (9, 3), 32, torch.float16, True))
    q, k, v, turning, positions = rest
    workspace = new_workspace(8, 2, 64, 2, 32, CUDA)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    fields = (turning.cosines, turning.sines, turning.q_weight, turning.k_weight, turning.epsilon)
    opcheck(torch.ops.msq.attend.default, (q, k, v, *fields, positions, keys, values, workspace, 0.125, 0))
    x, residual = torch.randn(2, 3, 512, device=CUDA).half()
    tables = rotation_tables(512, 1, CUDA)
    given = (x, residual, x[0].clone(), 1e-5, tables.signs, list(tables.matrices))
    opcheck(torch.ops.msq.rotate_added.default, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("size", [512, 4096, 5120])
def test_sums_are_normed_and_rotated(size, rows, dtype):
    x, residual = torch.randn(2, rows, size, device=CUDA).to(dtype)
    weight, tables = torch.rand(size, device=CUDA).to(dtype), rotation_tables(size, 3, CUDA)
    found, total = hadamard.rotate_added(x, residual, weight, 1e-5, tables)
    assert torch.equal(total, x + residual)
    assert torch.equal(found, hadamard.rotate_normed(total, weight, 1e-5, tables))
