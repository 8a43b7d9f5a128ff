import pytest
import torch
from msq.kernels.errors import QuantizerError
from msq.kernels.linear import FusedLinear, QuantizedLinear, stack
from msq.kernels.quantize import dequantize, quantize
from msq.kernels.specs import Family, QuantizerSpec

from .families import FAMILIES


@pytest.fixture(params=FAMILIES, ids=lambda spec: spec.label)
def weights(request):
    """Three quantized layers of one input."""
    generator = torch.Generator().manual_seed(0)
    return [
        quantize(torch.randn(rows, 80, generator=generator), request.param, rotation_seed=9) for rows in (32, 16, 20)
    ]


@pytest.mark.parametrize("shape", [(80,), (1, 80), (2, 3, 80)])
def test_the_product_is_that_of_the_dequantized_weight(weights, shape):
    bias = torch.randn(32)
    module = QuantizedLinear(weights[0], bias)
    x = torch.randn(shape)
    expected = x.double() @ dequantize(weights[0]).double().T + bias
    assert torch.allclose(module(x).double(), expected, atol=2e-4)
    assert module(x.half()).dtype == torch.float16


def test_a_module_survives_its_state_dict(weights):
    module = QuantizedLinear(weights[0])
    other = QuantizedLinear(weights[0])
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 80)
    assert torch.equal(other(x), module(x))


def test_slices_of_a_fused_product_equal_single_layers_in_any_order(weights):
    biases = [torch.randn(32), None, torch.randn(20)]
    slices = FusedLinear(weights, biases).slices()
    singles = [QuantizedLinear(w, b) for w, b in zip(weights, biases, strict=True)]
    x, y = torch.randn(4, 80), torch.randn(4, 80)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        for index in order:
            assert torch.allclose(slices[index](x), singles[index](x), atol=1e-5)
    assert torch.allclose(slices[0](y), singles[0](y), atol=1e-5)
    assert torch.allclose(slices[1](x), singles[1](x), atol=1e-5)  # y's rows are still waiting
    y.mul_(2)
    assert torch.allclose(slices[2](y), singles[2](y), atol=1e-5)


def test_a_fused_product_runs_once_for_all_its_slices(weights):
    fused = FusedLinear(weights, [None] * 3)
    runs = []
    fused.linear.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(2, 80)
    for _ in range(2):
        for part in fused.slices():
            part(x)
    assert len(runs) == 2
    assert sum(p.numel() for part in fused.slices() for p in part.buffers()) == sum(b.numel() for b in fused.buffers())


def test_what_cannot_run_together_is_refused(weights):
    other = quantize(torch.randn(16, 80), QuantizerSpec(Family.NUQ, 8), rotation_seed=9)
    with pytest.raises(QuantizerError, match="share quantizer"):
        stack([weights[0], other])
    with pytest.raises(QuantizerError, match="multiples of 16"):
        stack([weights[2], weights[0]])
    moved = quantize(torch.randn(16, 80), weights[0].spec, rotation_seed=10)
    if moved.rotation_seed is not None:
        with pytest.raises(QuantizerError, match="rotation"):
            stack([weights[0], moved])
