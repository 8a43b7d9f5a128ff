"""The kernels' linear module on a CPU, where its operators are twins: what is around the kernels must be right."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from msq.kernels.cuda.decode import KERNEL_CODES
from msq.kernels.cuda.limits import Limits
from msq.kernels.cuda.linear import KernelLinear, _workspace_words, separate_workspace
from msq.kernels.errors import KernelError, QuantizerError
from msq.kernels.linear import IMPLEMENTATIONS, FusedLinear, QuantizedLinear
from msq.kernels.quantize import quantize
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

SPECS = [
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.TCQ, 2.5, 12),
    QuantizerSpec(Family.TCQ, 2.5, 12, code=TrellisCode.HYB),
    QuantizerSpec(Family.HALF_TCQ, 2.75, 12),
]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.label)
def weights(request):
    """Two quantized layers of one input."""
    generator = torch.Generator().manual_seed(0)
    return [quantize(torch.randn(rows, 96, generator=generator), request.param, rotation_seed=9) for rows in (32, 48)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_what_the_reference_does(weights, dtype):
    bias = torch.randn(32)
    x = torch.randn(2, 3, 96).to(dtype)
    found = KernelLinear(weights[0], bias)(x)
    expected = QuantizedLinear(weights[0], bias)(x.float())
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < (1e-3 if dtype is torch.float16 else 8e-3)


@pytest.mark.parametrize("code", [code for code in TrellisCode if code not in KERNEL_CODES])
def test_codes_that_the_kernels_do_not_know_are_refused(code):
    table = torch.randn(1 << 10, 2).half() if code is TrellisCode.LUT else None
    weight = quantize(torch.randn(16, 32), QuantizerSpec(Family.TCQ, 2, 10, code=code), rotation_seed=9, codebook=table)
    with pytest.raises(KernelError, match=rf"the kernels know \(mad or hyb\); got .*{code}.*: use a QuantizedLinear"):
        KernelLinear(weight)


def test_codebooks_that_bytes_cannot_hold_are_refused():
    weight = quantize(torch.randn(16, 32), QuantizerSpec(Family.NUQ, 3), rotation_seed=9)
    other = replace(weight, codebook=(weight.codebook * 1.01).half())
    with pytest.raises(QuantizerError, match=r"below 4 for nuq-3; got .* of other numbers: quantize the model"):
        KernelLinear(other)
    module = KernelLinear(weight)
    with pytest.raises(QuantizerError, match="of other numbers"):
        module.load_state_dict(module.state_dict() | {"codebook": other.codebook})
    assert torch.equal(module.codebook, weight.codebook)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_modules_are_made_without_memory(spec):
    weight = quantize(torch.randn(16, 96), spec, rotation_seed=9)
    module = KernelLinear(weight.to(torch.device("meta")))
    assert all(buffer.is_meta for buffer in module.buffers())


def test_the_weight_comes_back_as_it_was_stored(weights):
    found = KernelLinear(weights[0]).weight
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found.tensors(), weights[0].tensors(), strict=True))
    assert found.size_bytes == weights[0].size_bytes


def test_a_module_survives_its_state_dict_and_moves(weights):
    module, other = KernelLinear(weights[0]), KernelLinear(weights[0])
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, 96).half()
    other.signs = getattr(module, "signs", None)
    assert torch.equal(other(x), module(x)) and torch.equal(module.to("cpu")(x), module(x))


def test_fused_layers_run_on_it(weights):
    fused = FusedLinear(weights, [None, torch.randn(48)], IMPLEMENTATIONS["tensor_core"])
    assert isinstance(fused.linear, KernelLinear)
    x = torch.randn(4, 96).half()
    singles = [KernelLinear(weights[0]), KernelLinear(weights[1], fused.linear.bias[32:])]
    for part, single in zip(fused.slices(), singles, strict=True):
        assert torch.allclose(part(x), single(x), atol=2e-2)


def test_it_is_traced_whole(weights):
    module, x = KernelLinear(weights[0]), torch.randn(2, 96).half()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_without_a_cuda_device_the_registry_says_why_not():
    kernel = IMPLEMENTATIONS["tensor_core"]
    assert "need a CUDA device" in (kernel.unsupported_reason(SPECS[1], 64, 96, 1, torch.device("cpu")) or "")


def test_a_workspace_is_shared_until_a_model_gets_its_own(weights):
    model = torch.nn.Sequential(KernelLinear(weights[0]), torch.nn.ReLU(), KernelLinear(weights[0]))
    assert model[0].workspace is model[2].workspace is KernelLinear(weights[1]).workspace
    separate_workspace(model)
    assert model[0].workspace is model[2].workspace is not KernelLinear(weights[1]).workspace


def test_the_workspace_suits_every_batch_and_is_found_quickly():
    begun = time.perf_counter()
    words = _workspace_words(QuantizerSpec(Family.TCQ, 3.0, 16), 4096, 14336, Limits(132, 227 << 10))
    assert 0 <= words < 1 << 22 and time.perf_counter() - begun < 2


def test_equal_codebooks_are_one_tensor_that_loading_leaves_alone():
    weight = quantize(torch.randn(32, 96), SPECS[1], rotation_seed=9)
    first, second = KernelLinear(weight), KernelLinear(weight)
    assert first.codebook.data_ptr() == second.codebook.data_ptr()
    expected = first.codebook.clone()
    second.load_state_dict(second.state_dict() | {"codebook": -expected})
    assert torch.equal(first.codebook, expected) and torch.equal(second.codebook, -expected)
    second.load_state_dict(first.state_dict())
    assert first.codebook.data_ptr() == second.codebook.data_ptr()
