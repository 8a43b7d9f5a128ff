"""Lookups on a device: rows equal to the twin's, the inverse rotation, graphs; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import CHECKED, random_weight
from msq.kernels.cuda.embedding import KernelEmbedding
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.linear import KernelLinear
from msq.kernels.cuda.lookup import lookup
from msq.kernels.linear import IMPLEMENTATIONS, LOOKUPS
from msq.kernels.quantize import decode, dequantize
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from torch.library import opcheck

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
FAMILIES = [
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 3, 16),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 16),
    QuantizerSpec(Family.TCQ, 3, 16, code=TrellisCode.HYB),
]


@pytest.mark.parametrize("spec", CHECKED, ids=lambda spec: spec.label)
def test_rows_are_bit_for_bit_those_of_the_twin(spec):
    for rows, width in [(16, 32), (272, 1056), (1024, 4096)]:
        weight = random_weight(spec, rows, width, DEVICE)
        ready, exact = prepare(weight), decode(weight)
        for count in (1, 8, 1000):
            tokens = torch.randint(rows, (count,), device=DEVICE)
            for dtype in (torch.float32, torch.float16, torch.bfloat16) if spec in FAMILIES else (torch.float32,):
                assert torch.equal(lookup(tokens, ready, dtype), exact[tokens].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [96, 768, 3584, 4096, 8192])
def test_an_embedding_gives_rows_of_its_weight(width, dtype):
    for spec in FAMILIES:
        weight = random_weight(spec, 256, width, DEVICE)
        module, exact = KernelEmbedding(KernelLinear(weight), dtype), dequantize(weight).double()
        for shape in [(1,), (8,), (2, 40)]:
            tokens = torch.randint(256, shape, device=DEVICE)
            found = module(tokens)
            assert found.dtype == dtype and found.shape == (*shape, width)
            error = (found.double() - exact[tokens]).norm() / exact[tokens].norm()
            assert float(error) < {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}[dtype]


def test_an_embedding_is_captured_and_follows_its_tokens():
    weight = random_weight(FAMILIES[3], 512, 1024, DEVICE)
    module = LOOKUPS["lookup"].embedding(weight, torch.float16)
    tokens = torch.tensor([3, 500], device=DEVICE)
    module(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(tokens)
    for changed in ([3, 500], [511, 0]):
        tokens.copy_(torch.tensor(changed))
        graph.replay()
        assert torch.equal(found, module(torch.tensor(changed, device=DEVICE)))


def test_what_runs_where_is_said():
    spec = FAMILIES[1]
    assert LOOKUPS["lookup"].unsupported_reason(spec, 128256, 4096, 8, DEVICE) is None
    assert "multiples of" in (LOOKUPS["lookup"].unsupported_reason(spec, 50257, 4096, 8, DEVICE) or "")


def test_the_reference_is_captured_too():
    module = IMPLEMENTATIONS["reference"].embedding(random_weight(FAMILIES[1], 512, 1024, DEVICE), torch.float16)
    tokens = torch.tensor([3, 500], device=DEVICE)
    expected = module(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(tokens)
    graph.replay()
    assert torch.equal(found, expected)


def test_operators_keep_torchs_rules():
    weight = random_weight(FAMILIES[2], 64, 96, DEVICE)
    linear = KernelLinear(weight)
    spec, tokens = weight.spec, torch.tensor([[1, 2], [63, 0]], device=DEVICE)
    fields = (96, torch.float32, str(spec.family), spec.bits, spec.state_bits)
    opcheck(torch.ops.msq.lookup.default, (tokens, linear.units, linear.scales, linear.codebook, *fields))
