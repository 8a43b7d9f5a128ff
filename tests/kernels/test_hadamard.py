import math

import pytest
import torch
from msq.kernels.hadamard import apply_hadamard, hadamard_matrix, hadamard_plan
from msq.kernels.rotation import input_seed, rotate, rotation_note, rotation_signs, unrotate

REAL_SIZES = [
    256, 512, 896, 1536, 2560, 3072, 3584, 4096, 4864, 5120, 6144, 8192, 8960, 9728, 11008, 12288, 13824, 14336, 17408,
    18944, 25600, 27648, 28672, 29568,
]  # fmt: skip


@pytest.mark.parametrize("size", REAL_SIZES)
def test_every_size_of_a_real_model_is_rotated_as_a_whole(size):
    plan = hadamard_plan(size)
    assert plan.is_complete and math.prod(plan.factors) == size
    for order in set(plan.factors):
        matrix = hadamard_matrix(order)
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))
        assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 96, 344, 1536])
def test_the_product_is_the_kronecker_product_of_its_factors(size):
    plan = hadamard_plan(size)
    whole = torch.ones(1, 1, dtype=torch.float64)
    for order in plan.factors:
        whole = torch.kron(whole, hadamard_matrix(order))
    x = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose(apply_hadamard(x, plan), x @ whole)
    assert torch.allclose(apply_hadamard(apply_hadamard(x, plan), plan, inverse=True), x)


def test_a_size_that_nothing_fits_falls_back_to_blocks_and_says_so():
    plan = hadamard_plan(14)
    assert not plan.is_complete and plan.block == 2
    assert "rotated in blocks of 2" in (rotation_note(14) or "") and rotation_note(1536) is None
    x = torch.randn(2, 14, dtype=torch.float64)
    pairs = x.view(2, 7, 2)
    expected = torch.stack([pairs.sum(-1), pairs[..., 0] - pairs[..., 1]], dim=-1) / math.sqrt(2)
    assert torch.allclose(apply_hadamard(x, plan), expected.flatten(1))


def test_rotation_keeps_products_and_comes_back():
    weight, x = torch.randn(8, 96), torch.randn(5, 96)
    assert torch.allclose(rotate(x, 7) @ rotate(weight, 7).T, x @ weight.T, atol=1e-4)
    assert torch.allclose(unrotate(rotate(x, 7), 7), x, atol=1e-5)


def test_signs_are_the_same_on_every_platform():
    signs = rotation_signs(64, 0)
    assert set(signs.tolist()) == {1.0, -1.0}
    bits = sum((sign < 0) << i for i, sign in enumerate(signs.tolist()))
    assert bits == SIGNS_OF_SEED_0
    assert input_seed("model.layers.0.self_attn.qkv") == SEED_OF_QKV_0
    assert not torch.equal(signs, rotation_signs(64, 1))


# Fixed by definition (splitmix64 and SHA-256): a change here breaks every checkpoint.
SIGNS_OF_SEED_0 = 0x9ECC3104737AFA89
SEED_OF_QKV_0 = 0x66A767260BB791B5
