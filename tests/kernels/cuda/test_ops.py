"""The torch operators on a CPU: their twins, what torch asks of an operator, tracing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from msq.experiments.kernel_checks import random_weight
from msq.kernels.cuda import ops
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.rotation_plan import rotation_tables
from msq.kernels.errors import QuantizerError
from msq.kernels.quantize import decode
from msq.kernels.rotation import rotate
from msq.kernels.specs import Family, QuantizerSpec
from torch.library import opcheck

from ..families import FAMILIES

assert ops
SEED, SIZE = 11, 96


@pytest.fixture
def tables():
    """``(signs, matrices)`` of a small rotation."""
    made = rotation_tables(SIZE, SEED, torch.device("cpu"))
    return made.signs, list(made.matrices)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def x(request):
    return torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(0)).to(request.param)


def test_rotations_are_those_of_the_reference(x, tables):
    weight, up = x[0, 0].clone(), x.flip(0)
    assert torch.equal(torch.ops.msq.rotate(x, *tables), rotate(x, SEED).to(x.dtype))
    expected = rotate(F.rms_norm(x.float(), (SIZE,), weight.float(), 1e-5), SEED)
    found = torch.ops.msq.rotate_normed(x, weight, 1e-5, *tables)
    assert found.dtype == x.dtype and torch.allclose(found.float(), expected, atol=0.05)
    expected = rotate(F.silu(x.float()) * up.float(), SEED)
    found = torch.ops.msq.rotate_gated(x, up, *tables)
    assert found.dtype == x.dtype and torch.allclose(found.float(), expected, atol=0.05)


def test_operators_keep_torchs_rules(x, tables):
    opcheck(torch.ops.msq.rotate.default, (x, *tables))
    opcheck(torch.ops.msq.rotate_normed.default, (x, x[0, 0].clone(), 1e-5, *tables))
    opcheck(torch.ops.msq.rotate_gated.default, (x, x.flip(0), *tables))


def test_operators_are_traced_whole(x, tables):
    def both(gate, up):
        return torch.ops.msq.rotate_gated(torch.ops.msq.rotate(gate, *tables), up, *tables) + 1

    traced = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(x, x), both(x, x))


def test_wrong_inputs_are_named(tables):
    x = torch.ones(2, SIZE)
    with pytest.raises(QuantizerError, match=r"rows of about 96; got \(2, 80\)"):
        torch.ops.msq.rotate(x[:, :80], *tables)
    with pytest.raises(QuantizerError, match="float64"):
        torch.ops.msq.rotate(x.double(), *tables)
    with pytest.raises(QuantizerError, match=r"expected up of shape \(2, 96\).*got \(1, 96\)"):
        torch.ops.msq.rotate_gated(x, x[:1], *tables)
    with pytest.raises(QuantizerError, match="a norm's weight"):
        torch.ops.msq.rotate_normed(x, x, 1e-5, *tables)


SPECS = [
    *FAMILIES,
    QuantizerSpec(Family.TCQ, 4, 12, 9),  # not the default table
    QuantizerSpec(Family.HALF_TCQ, 3.375, 12),
]


def arguments(weight):
    """A weight as the operators take it: tensors, then fields of the spec."""
    ready = prepare(weight)
    spec = weight.spec
    tensors = (list(ready.units), ready.scales, ready.codebook)
    return tensors, (str(spec.family), spec.bits, spec.state_bits)


@pytest.fixture(params=SPECS, ids=lambda spec: spec.label)
def weight(request):
    return random_weight(request.param, 48, SIZE, torch.device("cpu"))


def test_products_are_those_of_the_decoded_weight(weight, x):
    tensors, fields = arguments(weight)
    bias, workspace = torch.randn(48).to(x.dtype), torch.empty(0, dtype=torch.int32)
    assert torch.equal(torch.ops.msq.dequantize(*tensors, SIZE, torch.float32, *fields), decode(weight))
    expected = F.linear(x.float(), decode(weight), bias.float()).to(x.dtype)
    assert torch.equal(torch.ops.msq.multiply(x, *tensors, bias, workspace, *fields), expected)
    opcheck(torch.ops.msq.multiply.default, (x, *tensors, bias, workspace, *fields))
    opcheck(torch.ops.msq.multiply.default, (x, *tensors, None, workspace, *fields))
    opcheck(torch.ops.msq.dequantize.default, (*tensors, SIZE, torch.float16, *fields))
    with pytest.raises(QuantizerError, match=r"expected a bias of shape \(48,\)"):
        torch.ops.msq.multiply(x, *tensors, bias[1:], workspace, *fields)
