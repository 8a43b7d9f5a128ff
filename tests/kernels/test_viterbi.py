"""The search against all codes of a small trellis."""

from itertools import product

import pytest
import torch
from msq.kernels.quantizers.codes import hybrid_indices, state_points
from msq.kernels.quantizers.viterbi import _Search, viterbi_encode

STATE_BITS, WIDTH, STEPS = 4, 2, 5


@pytest.fixture
def brute():
    """Cost of every circular code of a tiny trellis: ``(tiles, codes)``, with the codes and their states."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(1 << STATE_BITS, 2, generator=generator)
    pairs = torch.randn(300, STEPS, 2, generator=generator)
    codes = torch.tensor(list(product(range(1 << WIDTH), repeat=STEPS)))
    states = (codes | codes.roll(-1, dims=1) << WIDTH) & (1 << STATE_BITS) - 1
    cost = (points[states][None] - pairs[:, None]).square().sum((2, 3))
    return points, pairs, codes, states, cost


def test_given_the_overlap_the_search_is_exact(brute):
    points, pairs, _codes, states, cost = brute
    search = _Search(points, WIDTH)
    norms = pairs.square().sum(-1, keepdim=True)
    inputs = torch.cat([pairs, torch.ones_like(norms), norms], -1).permute(1, 2, 0).contiguous()
    overlap = torch.arange(300) % search.overlaps
    path = search._trace_back(inputs, search._forward(inputs, overlap), overlap, STEPS).T
    assert torch.equal(path[:, 0] & search.overlaps - 1, overlap) and torch.equal(path[:, -1] >> WIDTH, overlap)
    assert torch.equal(path[:, :-1] >> WIDTH, path[:, 1:] & search.overlaps - 1)
    allowed = (states[:, 0] & search.overlaps - 1)[None] == overlap[:, None]
    best = torch.where(allowed, cost, torch.inf).min(dim=1).values
    assert torch.allclose((points[path] - pairs).square().sum((1, 2)), best, atol=1e-4)


def test_tail_biting_codes_are_close_to_the_best_of_all(brute):
    points, pairs, _codes, _states, cost = brute
    found = viterbi_encode(pairs, points, WIDTH)
    states = (found | found.roll(-1, dims=1) << WIDTH) & (1 << STATE_BITS) - 1
    reached = (points[states.long()] - pairs).square().sum((1, 2))
    best = cost.min(dim=1).values
    assert (reached >= best - 1e-4).all()
    assert (reached <= best + 1e-4).float().mean() > 0.7  # five steps are short; real tiles have 128
    assert float(reached.mean()) < 1.1 * float(best.mean())


def test_hybrid_code_uses_hash_bits_for_table_and_sign():
    index, sign = hybrid_indices(16, 512)
    for state in (0, 1, 3, 255, 40000, 65535):
        hashed = state * (state + 1)
        assert int(index[state]) == (hashed >> 6) % 512
        assert int(sign[state]) == (-1 if hashed >> 15 & 1 else 1)
    table = torch.randn(512, 2).half()
    points = state_points(table, 16)
    assert points.shape == (65536, 2)
    assert torch.equal(points[:, 1], table[index, 1].float())
    assert torch.equal(points[:, 0].abs(), table[index, 0].float().abs())
