"""Error feedback: block LDL, equality with data-free quantization under the identity, and what it gains."""

import pytest
import torch
from msq.kernels.errors import QuantizerError
from msq.kernels.hessian import Hessian
from msq.kernels.quantize import dequantize, normalized_error, quantize
from msq.kernels.rotation import rotate
from msq.kernels.specs import Family, QuantizerSpec, default_palette

SEED = 11
SHORT = {spec.label: spec for spec in default_palette(12)}
ONE_OF_EACH = [SHORT[label] for label in ("int-3", "nuq-3", "vq-2.5", "tcq-2-L12", "half-tcq-2.25-L12")]


def correlated_inputs(count: int, size: int) -> torch.Tensor:
    """Inputs with a decaying spectrum, ``(count, size)``, as a decoder's are."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator) / torch.arange(1, size + 1).sqrt()
    return torch.randn(count, size, generator=generator) @ mixing.T


def rotated_hessian(inputs: torch.Tensor, seed: int = SEED, **options: float) -> Hessian:
    turned = rotate(inputs, seed)
    return Hessian(turned.T @ turned / len(turned), seed, **options)


@pytest.mark.parametrize("block", [1, 2, 16])
def test_factors_are_block_unit_triangular_and_give_the_damped_matrix_back(block):
    hessian = rotated_hessian(correlated_inputs(400, 56), damping=0.05)
    factor = hessian.factor(block).double()
    assert factor.shape == (64, 64)
    blocks = factor.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)
    for i in range(64 // block):
        assert torch.allclose(blocks[i, i], torch.eye(block).double(), atol=1e-6)
        assert not blocks[i, i + 1 :].any()
    damped = (hessian.matrix.double() + 0.05 * torch.eye(56).double()) / 1.05
    inner = torch.linalg.solve(factor[:56, :56], torch.linalg.solve(factor[:56, :56], damped).T)
    for first in range(0, 56, block):
        inner[first : first + block, first : first + block] = 0
    assert inner.abs().max() < 1e-5
    assert torch.equal(factor[56:, 56:], torch.eye(8).double()) and not factor[56:, :56].any()


@pytest.mark.parametrize("spec", SHORT.values(), ids=list(SHORT))
@pytest.mark.parametrize("shape", [(40, 72), (96, 128)])
def test_with_the_identity_it_is_data_free_quantization_bit_for_bit(spec, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    expected = dict(quantize(weight, spec, rotation_seed=SEED).tensors())
    identity = Hessian(3 * torch.eye(shape[1]), None if spec.family is Family.INT else SEED)
    found = dict(quantize(weight, spec, rotation_seed=SEED, hessian=identity).tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda spec: spec.label)
def test_proxy_loss_falls_for_correlated_inputs(spec):
    inputs = correlated_inputs(2000, 128)
    hessian = rotated_hessian(inputs)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    free = quantize(weight, spec, rotation_seed=SEED)
    aware = quantize(weight, spec, rotation_seed=SEED, hessian=hessian)
    assert aware.size_bytes == free.size_bytes
    assert normalized_error(weight, aware, hessian) < 0.65 * normalized_error(weight, free, hessian)
    assert normalized_error(weight, aware) > normalized_error(weight, free)
    # The proxy loss is the mean squared error of the outputs.
    outputs = [float(((dequantize(q) - weight) @ inputs.T).square().sum()) for q in (aware, free)]
    assert outputs[0] < 0.65 * outputs[1]
    scale = float(inputs.square().mean()) * len(inputs) * float(weight.square().sum())
    assert outputs[0] / scale == pytest.approx(normalized_error(weight, aware, hessian), rel=1e-3)


@pytest.mark.parametrize("label", ["nuq-3", "vq-3"])
def test_feedback_inside_a_tile_column_gains_over_feedback_between_tile_columns(label, monkeypatch):
    hessian = rotated_hessian(correlated_inputs(2000, 128))
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    fine = normalized_error(weight, quantize(weight, SHORT[label], rotation_seed=SEED, hessian=hessian), hessian)
    monkeypatch.setattr("msq.kernels.quantizers.scalar.ScalarCoder.block", 16)
    monkeypatch.setattr("msq.kernels.quantizers.vector.VectorCoder.block", 16)
    hessian = rotated_hessian(correlated_inputs(2000, 128))
    coarse = normalized_error(weight, quantize(weight, SHORT[label], rotation_seed=SEED, hessian=hessian), hessian)
    assert fine < 0.97 * coarse


@pytest.mark.parametrize("label", ["nuq-2", "vq-1.5"])
def test_a_range_that_leaves_room_for_feedback_gains_at_low_rates(label, monkeypatch):
    hessian = rotated_hessian(correlated_inputs(2000, 128))
    weight = torch.randn(2048, 128, generator=torch.Generator().manual_seed(8))
    roomy = normalized_error(weight, quantize(weight, SHORT[label], rotation_seed=SEED, hessian=hessian), hessian)
    monkeypatch.setattr(Hessian, "feedback_power", lambda *_, **__: 0.0)
    tight = normalized_error(weight, quantize(weight, SHORT[label], rotation_seed=SEED, hessian=hessian), hessian)
    assert roomy < 0.995 * tight


@pytest.mark.parametrize("bits", [2.25, 3.375])
def test_two_rates_are_encoded_from_the_low_one_to_the_high_one(bits, monkeypatch):
    """What is encoded last has the errors that count most."""
    hessian = rotated_hessian(correlated_inputs(2000, 128))
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    spec = QuantizerSpec(Family.HALF_TCQ, bits, 11)
    upwards = normalized_error(weight, quantize(weight, spec, rotation_seed=SEED, hessian=hessian), hessian)
    for module in ("quantize", "ldlq"):
        monkeypatch.setattr(f"msq.kernels.{module}.goes_up", lambda _: False)
    downwards = normalized_error(weight, quantize(weight, spec, rotation_seed=SEED, hessian=hessian), hessian)
    assert upwards < 0.85 * downwards


def test_the_ascending_factor_is_upper_triangular_and_gives_the_matrix_back():
    hessian = rotated_hessian(correlated_inputs(400, 56), damping=0.05)
    factor = hessian.factor(16, ascending=True).double()
    blocks = factor.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2)
    for i in range(4):
        assert torch.allclose(blocks[i, i], torch.eye(16).double(), atol=1e-6) and not blocks[i, :i].any()
    padded = torch.eye(64).double()
    padded[:56, :56] = (hessian.matrix.double() + 0.05 * torch.eye(56).double()) / 1.05
    inner = torch.linalg.solve(factor, torch.linalg.solve(factor, padded).T)
    for first in range(0, 64, 16):
        inner[first : first + 16, first : first + 16] = 0
    assert inner.abs().max() < 1e-5


def test_feedback_power_is_the_variance_that_feedback_adds():
    hessian = rotated_hessian(correlated_inputs(2000, 128))
    assert Hessian(torch.eye(40), SEED).feedback_power(16) == 0
    errors = torch.randn(512, 128, generator=torch.Generator().manual_seed(9))
    added = errors @ (hessian.factor(2) - torch.eye(128))
    assert hessian.feedback_power(2) == pytest.approx(float(added.square().mean()), rel=0.05)


def test_an_isotropic_error_has_the_same_normalised_error_in_either_measure():
    hessian = rotated_hessian(correlated_inputs(3000, 256))
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4))
    quantized = quantize(weight, SHORT["nuq-3"], rotation_seed=SEED)
    assert normalized_error(weight, quantized, hessian) == pytest.approx(normalized_error(weight, quantized), rel=0.05)


def test_a_hessian_in_the_models_own_basis_is_the_rotated_one_turned_back():
    inputs = correlated_inputs(500, 96)
    own = Hessian(inputs.T @ inputs, None)
    assert torch.allclose(rotated_hessian(inputs).unrotated().matrix, own.matrix, atol=1e-4)
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(5))
    quantized = quantize(weight, SHORT["int-4"], rotation_seed=SEED, hessian=rotated_hessian(inputs))
    assert quantized.rotation_seed is None
    assert normalized_error(weight, quantized, own) == pytest.approx(
        normalized_error(weight, quantized, rotated_hessian(inputs)), rel=1e-3
    )


def test_zero_rows_stay_zero_under_a_hessian():
    hessian = rotated_hessian(correlated_inputs(300, 64))
    for spec in ONE_OF_EACH:
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
        weight[3] = 0
        assert not dequantize(quantize(weight, spec, rotation_seed=SEED, hessian=hessian))[3].any()


def test_fewer_inputs_than_columns_need_damping():
    inputs = correlated_inputs(20, 64)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    spec = QuantizerSpec(Family.NUQ, 3)
    quantize(weight, spec, rotation_seed=SEED, hessian=rotated_hessian(inputs))
    with pytest.raises(QuantizerError, match="not positive definite with a damping of 0"):
        quantize(weight, spec, rotation_seed=SEED, hessian=rotated_hessian(inputs, damping=0.0))


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.zeros(4, 4), {}, "positive trace"),
        (torch.full((4, 4), float("nan")), {}, "finite Hessian"),
        (torch.eye(4)[:3], {}, "expected a floating-point Hessian"),
        (torch.eye(4, dtype=torch.int32), {}, "expected a floating-point Hessian"),
        (torch.eye(4), {"damping": -0.1}, "damping of at least 0"),
    ],
)
def test_bad_hessians_are_refused(matrix, options, message):
    with pytest.raises(QuantizerError, match=message):
        Hessian(matrix, SEED, **options)


@pytest.mark.parametrize(("size", "seed"), [(64, 12), (48, 11), (64, None)])
def test_a_hessian_of_another_input_is_refused(size, seed):
    with pytest.raises(QuantizerError, match="64 inputs rotated by the seed 11; got"):
        quantize(torch.randn(16, 64), SHORT["nuq-3"], rotation_seed=SEED, hessian=Hessian(torch.eye(size), seed))
