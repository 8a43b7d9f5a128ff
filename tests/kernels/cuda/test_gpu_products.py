"""Decoded weights and products on a device: equal to the twin's, close to fp64; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import CHECKED, LARGEST_ERROR, random_weight
from msq.kernels.cuda import decode as kernels
from msq.kernels.cuda import hadamard
from msq.kernels.cuda.dequantize import dequantize
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.rotation_plan import rotation_tables
from msq.kernels.linear import IMPLEMENTATIONS
from msq.kernels.quantize import decode
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
FAMILIES = [
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.NUQ, 2),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.NUQ, 4),
    QuantizerSpec(Family.VQ, 2),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 3, 16),
    QuantizerSpec(Family.TCQ, 2.5, 12),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 16),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 16, code=TrellisCode.HYB),
]
ODD_SHAPES = [(16, 32), (48, 96), (272, 1056), (112, 4128)]


@pytest.fixture
def workspace():
    """Room for any product here; every kernel must leave it as it was."""
    room = kernels.new_workspace(1 << 22, DEVICE)
    yield room
    torch.cuda.synchronize()
    assert bool((room == kernels.new_workspace(1, DEVICE)).all()), "the workspace was left changed"


def product(x, weight, workspace, bias=None):
    """`multiply` into the middle of a poisoned buffer, none of which it may leave or touch."""
    guard = 64
    room = torch.full((x.shape[0] * weight.out_features + 2 * guard,), torch.nan, dtype=x.dtype, device=DEVICE)
    out = room[guard:-guard].view(x.shape[0], weight.out_features)
    kernels.multiply(x, weight, bias, out=out, workspace=workspace)
    assert room[:guard].isnan().all() and room[-guard:].isnan().all(), "written beyond the output"
    assert not out.isnan().any(), "not all outputs are written"
    return out


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("spec", CHECKED, ids=lambda spec: spec.label)
def test_decoded_weights_are_exactly_the_twins(spec, workspace):
    weight = random_weight(spec, 48, 96, DEVICE)
    ready, expected = prepare(weight), decode(weight)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(ready, dtype), expected.to(dtype))
    # Unit vectors pick columns of the weight out of the decode kernel.
    units = torch.eye(96, device=DEVICE).half()
    found = torch.cat([product(units[n : n + 16], ready, workspace) for n in range(0, 96, 16)])
    assert torch.equal(found.T, expected.half())


@pytest.mark.parametrize("spec", CHECKED, ids=lambda spec: spec.label)
def test_products_of_one_token(spec, workspace):
    for shape in [*ODD_SHAPES, (1024, 4096)]:
        weight = random_weight(spec, *shape, DEVICE)
        x = torch.randn(1, shape[1], device=DEVICE).half()
        found = product(x, prepare(weight), workspace)
        assert relative_error(found, x.double() @ decode(weight).double().T) < LARGEST_ERROR[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.label)
def test_every_batch_repeats_itself(spec, dtype, workspace):
    for shape in [(272, 1056), (512, 14336)]:
        weight = random_weight(spec, *shape, DEVICE)
        ready, exact = prepare(weight), decode(weight).double()
        bias = torch.randn(shape[0], device=DEVICE).to(dtype)
        tokens = torch.randn(16, shape[1], device=DEVICE).to(dtype)
        tokens[3] *= 1000 if dtype is torch.bfloat16 else 10  # tokens must not touch one another
        for batch in range(1, 17):
            x = tokens[:batch].clone()
            found = product(x, ready, workspace, bias)
            expected = x.double() @ exact.T + bias.double()
            worst = max(relative_error(row, right) for row, right in zip(found, expected, strict=True))
            assert worst < LARGEST_ERROR[dtype], f"{shape}, batch {batch}: relative error {worst:.2e}"
            assert all(torch.equal(product(x, ready, workspace, bias), found) for _ in range(3))


@pytest.mark.parametrize("spec", FAMILIES[::2], ids=lambda spec: spec.label)
def test_shapes_of_a_large_model(spec, workspace):
    for shape in [(6144, 4096), (4096, 14336), (28672, 4096)]:
        weight = random_weight(spec, *shape, DEVICE)
        ready, exact = prepare(weight), decode(weight)
        for batch in (1, 8):
            x = torch.randn(batch, shape[1], device=DEVICE).half()
            first = product(x, ready, workspace)
            assert relative_error(first, x.double() @ exact.double().T) < LARGEST_ERROR[x.dtype]
            assert all(torch.equal(product(x, ready, workspace), first) for _ in range(20))


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.label)
def test_a_programmatic_launch_waits_for_its_tokens(spec, workspace):
    size = 14336  # a rotation that takes longer than a product's start
    weight = prepare(random_weight(spec, 64, size, DEVICE))
    tables = rotation_tables(size, 5, DEVICE)
    inputs = torch.randn(20, 4, size, device=DEVICE).half()
    expected = [product(hadamard.rotate(x, tables), weight, workspace) for x in inputs]
    torch.cuda.synchronize()
    found = [
        kernels.multiply(hadamard.rotate(x, tables), weight, workspace=workspace, programmatic=True) for x in inputs
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_values_of_any_size_keep_their_accuracy(workspace):
    weight = random_weight(QuantizerSpec(Family.NUQ, 3), 64, 256, DEVICE)
    x = torch.randn(2, 256, device=DEVICE)
    for dtype, scales in [(torch.float16, (1e-3, 100.0)), (torch.bfloat16, (1e-20, 1e-3, 1e15))]:
        for scale in scales:
            scaled = (x * scale).to(dtype)
            found = product(scaled, prepare(weight), workspace)
            assert relative_error(found, scaled.double() @ decode(weight).double().T) < LARGEST_ERROR[dtype]
    zero = product(torch.zeros(2, 256, device=DEVICE, dtype=torch.bfloat16), prepare(weight), workspace)
    assert not zero.any()


def test_what_does_not_fit_is_said():
    kernel = IMPLEMENTATIONS["tensor_core"]
    assert kernel.unsupported_reason(FAMILIES[1], 4096, 4096, 1, DEVICE) is None
    assert kernel.unsupported_reason(FAMILIES[1], 4096, 4096, 2048, DEVICE) is None
    assert "multiples of" in (kernel.unsupported_reason(FAMILIES[1], 4096, 4112, 1, DEVICE) or "")
    assert "multiples of" in (kernel.unsupported_reason(FAMILIES[1], 4090, 4096, 1, DEVICE) or "")
