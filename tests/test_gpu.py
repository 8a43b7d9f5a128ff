"""What a CUDA device must agree on with the CPU; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.linear import FusedLinear, QuantizedLinear
from msq.kernels.quantize import decode, quantize
from msq.kernels.quantizers.viterbi import viterbi_encode
from msq.kernels.rotation import rotate
from msq.kernels.specs import default_palette
from msq.profiles.blockwise import BlockwiseModel
from msq.profiles.models import choose_device, load_model
from msq.profiles.timing import timer_for

pytestmark = pytest.mark.gpu
SPECS = default_palette(12)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_decoded_weights_are_exactly_equal(spec):
    weight = quantize(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)), spec, rotation_seed=1)
    assert torch.equal(decode(weight.to(CUDA)).cpu(), decode(weight))


@pytest.mark.parametrize("size", [256, 1536, 5120, 11008, 14336])
def test_rotations_agree(size):
    x = torch.randn(4, size)
    assert torch.allclose(rotate(x.cuda(), 3).cpu(), rotate(x, 3), atol=1e-4)


@pytest.mark.parametrize("width", [3, 6, 10])
def test_the_search_finds_codes_of_equal_cost(width):
    generator = torch.Generator().manual_seed(0)
    pairs, points = torch.randn(64, 128, 2, generator=generator), torch.randn(4096, 2, generator=generator)
    here = viterbi_encode(pairs, points, width)
    there = viterbi_encode(pairs.cuda(), points.cuda(), width).cpu()
    assert float((here == there).float().mean()) > 0.99  # equal but for near ties of rounded costs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_agree(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [quantize(torch.randn(32, 96, generator=generator), SPECS[20], rotation_seed=1) for _ in range(2)]
    x = torch.randn(5, 96, generator=generator).to(dtype)
    fused = FusedLinear([w.to(CUDA) for w in weights], [None, None]).slices()
    for weight, part in zip(weights, fused, strict=True):
        expected = QuantizedLinear(weight)(x.float())
        found = part(x.cuda()).cpu().float()
        assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_models_and_timers_run(tiny_llama):
    model = load_model(tiny_llama, choose_device("cuda"))
    recording = BlockwiseModel(model).record(torch.randint(2048, (2, 16)).cuda())
    assert float(BlockwiseModel(model).kl_per_window(recording, recording.hidden[-1]).abs().max()) < 1e-3
    large = torch.randn(4096, 4096, device="cuda")
    timing = timer_for(torch.device("cuda")).measure(lambda: large @ large)
    assert 10 < timing.median_us < 1e6 and timing.runs >= 4
