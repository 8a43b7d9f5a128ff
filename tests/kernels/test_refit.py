"""Codebooks and scales under codes that stay: the map to entries, least squares, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msq.kernels.codebook_map import CodebookMap
from msq.kernels.codebooks import check_levels, rounded
from msq.kernels.hessian import Hessian
from msq.kernels.linear import QuantizedLinear, stack
from msq.kernels.quantize import decode_unit, from_tensors, quantize
from msq.kernels.refit import FittedLayer, refit
from msq.kernels.rotation import rotate, unrotate
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.kernels.tunable import TunableLinear

WITH_CODEBOOK = (
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.VQ, 2.5),
    QuantizerSpec(Family.TCQ, 2, 10, code=TrellisCode.HYB),
    QuantizerSpec(Family.HALF_TCQ, 2.25, 10, code=TrellisCode.HYB),
)
WITHOUT = (
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.TCQ, 2, 10),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 10),
    QuantizerSpec(Family.TCQ, 2, 10, code=TrellisCode.ONE_MAD),
)
ROWS, COLUMNS, SEED = 24, 48, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(spec: QuantizerSpec, seed: int = 0):
    return quantize(drawn(ROWS, COLUMNS, seed=seed), spec, rotation_seed=SEED)


def hessian() -> Hessian:
    inputs = rotate(drawn(200, COLUMNS, seed=9) * torch.linspace(0.2, 3, COLUMNS), SEED)
    return Hessian(inputs.T @ inputs, SEED)


@pytest.mark.parametrize("spec", WITH_CODEBOOK, ids=lambda spec: spec.label)
def test_the_map_gives_the_decoded_codes_and_its_adjoint(spec):
    weight = packed(spec)
    places = CodebookMap(weight)
    assert torch.equal(places.values(weight.codebook.float()), decode_unit(weight))
    other = drawn(*spec.codebook_shape, seed=1)
    values = drawn(ROWS, COLUMNS, seed=2)
    sums = places.sums(values)
    assert torch.isclose((places.values(other) * values).sum(), (other.flatten() * sums).sum(), rtol=1e-4)


@pytest.mark.parametrize("spec", WITH_CODEBOOK, ids=lambda spec: spec.label)
def test_a_codebook_is_found_again(spec):
    weight = packed(spec)
    taken = replace(weight, codebook=rounded(spec, weight.codebook.float() * 1.3 + 0.1))
    target = decode_unit(taken) * taken.scales.float().unsqueeze(1)
    layer = FittedLayer(unrotate(target, SEED), weight, hessian())
    (found,) = refit([layer])
    assert replace(layer, packed=found).loss() < 1e-4 * layer.loss()
    assert all(torch.equal(a, b) for a, b in zip(found.packed, weight.packed, strict=True))


@pytest.mark.parametrize("spec", WITH_CODEBOOK, ids=lambda spec: spec.label)
def test_fitted_codebooks_are_ones_that_are_stored(spec):
    layer = FittedLayer(drawn(ROWS, COLUMNS, seed=5), packed(spec), hessian())
    (found,) = refit([layer])
    assert not torch.equal(found.codebook, layer.packed.codebook)
    check_levels(spec, found.codebook)


@pytest.mark.parametrize("spec", WITH_CODEBOOK, ids=lambda spec: spec.label)
@pytest.mark.parametrize("weighted", [False, True])
def test_fitting_lowers_the_loss_of_layers_that_share_a_codebook(spec, weighted):
    layers = [
        FittedLayer(drawn(ROWS, COLUMNS, seed=s), packed(spec, s), hessian() if weighted else None) for s in (0, 1)
    ]
    found = refit(layers)
    after = [replace(layer, packed=weight) for layer, weight in zip(layers, found, strict=True)]
    assert sum(layer.loss() for layer in after) < sum(layer.loss() for layer in layers)
    assert torch.equal(found[0].codebook, found[1].codebook)


def test_layers_that_were_fitted_can_still_be_fused():
    spec = WITH_CODEBOOK[2]
    weights = [drawn(32, COLUMNS, seed=s) for s in (0, 1)]
    layers = [FittedLayer(weight, quantize(weight, spec, rotation_seed=SEED)) for weight in weights]
    assert stack(refit(layers)).out_features == 64


@pytest.mark.parametrize("spec", WITHOUT, ids=lambda spec: spec.label)
def test_without_a_codebook_nothing_is_left_to_fit(spec):
    weight = packed(spec)
    assert refit([FittedLayer(drawn(ROWS, COLUMNS), weight)])[0] is weight
    loaded = from_tensors(spec, ROWS, COLUMNS, weight.rotation_seed, dict(weight.tensors()))
    assert weight.codebook.shape == loaded.codebook.shape == spec.codebook_shape


@pytest.mark.parametrize("spec", WITH_CODEBOOK + WITHOUT, ids=lambda spec: spec.label)
def test_a_tunable_layer_is_the_quantized_one_until_it_is_tuned(spec):
    weight, bias = packed(spec), drawn(ROWS, seed=3)
    codebook = torch.nn.Parameter(weight.codebook.float()) if weight.codebook.numel() else None
    layer, x = TunableLinear(weight, bias, codebook), drawn(7, COLUMNS, seed=4)
    assert torch.allclose(layer(x), QuantizedLinear(weight, bias)(x), atol=1e-4)
    same = layer.tuned()
    assert torch.equal(same.scales, weight.scales) and torch.equal(same.codebook, weight.codebook)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    with torch.no_grad():
        layer.scale_logs += 0.1
    assert torch.allclose(layer.tuned().scales.float(), weight.scales.float() * 1.10517, rtol=2e-3)


def test_gradients_flow_though_a_rotation_was_first_made_in_inference_mode():
    seed = 77  # of no other test
    with torch.inference_mode():
        rotate(drawn(1, COLUMNS), seed)
    x = drawn(7, COLUMNS).requires_grad_()
    rotate(x, seed).square().sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * x, atol=1e-4)


def test_gradients_of_a_codebook_are_those_of_plain_indexing():
    weight = packed(WITH_CODEBOOK[2])
    places, upstream = CodebookMap(weight), drawn(ROWS, COLUMNS, seed=6)
    found, expected = (weight.codebook.float().requires_grad_() for _ in range(2))
    (places.values(found) * upstream).sum().backward()
    (expected.flatten()[places.index.long()] * places.sign * upstream).sum().backward()
    assert torch.allclose(found.grad, expected.grad, atol=1e-4)
