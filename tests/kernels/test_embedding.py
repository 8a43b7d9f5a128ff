"""Embeddings on packed weights: rows of the dequantized weight, on the reference and on the kernels' twins."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.cuda.embedding import KernelEmbedding
from msq.kernels.embedding import QuantizedEmbedding
from msq.kernels.errors import QuantizerError
from msq.kernels.linear import IMPLEMENTATIONS, LOOKUPS
from msq.kernels.quantize import decode, decode_rows, dequantize, quantize
from torch.library import opcheck

from .families import FAMILIES

VOCABULARY, WIDTH = 208, 96
FEW, MANY = torch.tensor([[5, 207], [0, 16]]), torch.arange(VOCABULARY).flip(0)


@pytest.fixture(params=FAMILIES, ids=lambda spec: spec.label)
def weight(request):
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(VOCABULARY, WIDTH, generator=generator), request.param, rotation_seed=9)


@pytest.mark.parametrize("tokens", [FEW, MANY, FEW[:0]], ids=["few", "many", "none"])
def test_rows_are_decoded_alone_as_with_all_others(weight, tokens):
    assert torch.equal(decode_rows(weight, tokens), decode(weight)[tokens])


@pytest.mark.parametrize("name", ["reference", "tensor_core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_embedding_gives_rows_of_its_weight(weight, name, dtype):
    module = IMPLEMENTATIONS[name].embedding(weight, dtype)
    assert (module.num_embeddings, module.embedding_dim) == (VOCABULARY, WIDTH)
    for tokens in (FEW, MANY):
        found = module(tokens)
        assert found.dtype == dtype and found.shape == (*tokens.shape, WIDTH)
        assert torch.allclose(found.float(), dequantize(weight)[tokens].to(dtype).float(), rtol=1e-2, atol=1e-6)
    assert torch.equal(decode(module.weight), decode(weight))


def test_a_kept_decoded_weight_gives_the_same_rows(weight):
    module = IMPLEMENTATIONS["reference"].embedding(weight, torch.float32)
    before = module(FEW)
    module.linear.keep_decoded()
    assert torch.equal(module(FEW), before)


@pytest.mark.parametrize("name", ["reference", "tensor_core"])
@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_that_there_are_not_are_refused(weight, name, token):
    module = IMPLEMENTATIONS[name].embedding(weight, torch.float32)
    for count in (1, VOCABULARY):
        with pytest.raises(IndexError):
            module(torch.full((count,), token))


def test_operators_keep_torchs_rules(weight):
    module = KernelEmbedding(IMPLEMENTATIONS["tensor_core"].linear(weight), torch.float16)
    linear, spec = module.linear, weight.spec
    fields = (WIDTH, torch.float32, str(spec.family), spec.bits, spec.state_bits)
    opcheck(torch.ops.msq.lookup.default, (FEW, linear.units, linear.scales, linear.codebook, *fields))
    if linear.rotation is not None:
        matrices = [getattr(module, name) for name in module._table_names]
        opcheck(torch.ops.msq.unrotate.default, (torch.randn(2, WIDTH), linear.rotation[0], matrices, torch.float16))
    with pytest.raises(QuantizerError, match="expected tokens as int64"):
        module(FEW.int())
    traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(FEW), module(FEW))


def test_lookups_say_where_they_run():
    spec, cpu = FAMILIES[1], torch.device("cpu")
    assert LOOKUPS["reference"].unsupported_reason(spec, 50257, 100, 1, cpu) is None
    assert "need a CUDA device" in (LOOKUPS["lookup"].unsupported_reason(spec, 208, 96, 1, cpu) or "")
    weight = quantize(torch.randn(50, 100), spec, rotation_seed=0)  # nothing here fills its tiles
    module = LOOKUPS["reference"].embedding(weight, torch.float32)
    assert isinstance(module, QuantizedEmbedding)
    assert torch.allclose(module(torch.tensor([49, 3])), dequantize(weight)[[49, 3]], atol=1e-5)
