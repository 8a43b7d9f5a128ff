"""The attention kernel: its source run on the CPU against the operator's twin, and that twin against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from msq.kernels.cuda import attention, step_ops  # noqa: F401 (registers the operators)
from msq.kernels.cuda.attention import Turning, shape_for, unsupported_reason
from msq.kernels.cuda.compiler import ARCHITECTURES, compile_source
from msq.kernels.cuda.limits import Limits
from msq.kernels.errors import KernelError, QuantizerError

from .emulate import Emulated, needs_compiler

H200 = Limits(132, 227 << 10, has_clusters=True)
A100 = Limits(108, 163 << 10)
SMALL = Limits(16, 99 << 10)
CASES = [  # heads, key heads, head size, positions, capacity, window, dtype, norm
    (8, 2, 128, (37, 0), 48, 0, torch.float16, False),
    (8, 2, 128, (47, 5), 48, 9, torch.bfloat16, True),
    (4, 4, 64, (3,), 40, 0, torch.float16, True),
    (14, 2, 64, (99, 63, 16), 100, 0, torch.float16, False),
    (6, 2, 96, (30,), 64, 17, torch.bfloat16, False),
    (10, 1, 256, (20, 19), 32, 0, torch.float16, True),
    (3, 1, 40, (200,), 256, 0, torch.float16, False),
]


def inputs(heads, key_heads, size, positions, capacity, dtype, norm):
    generator = torch.Generator().manual_seed(heads)
    batch = len(positions)

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    fused = make(batch, (heads + 2 * key_heads) * size)  # as one product gives them: rows are apart
    q, k, v = fused.split([heads * size, key_heads * size, key_heads * size], dim=1)
    angles = torch.arange(capacity)[:, None] * 10000.0 ** -(torch.arange(size // 2) / (size // 2))
    weights = (1 + make(size) / 4, 1 + make(size) / 4) if norm else (None, None)
    turning = Turning(angles.cos(), angles.sin(), *weights, 1e-5)
    cache = make(2, batch, key_heads, capacity, size)
    for row, position in enumerate(positions):
        cache[:, row, :, position:] = torch.nan  # what is not written yet must not be read
    return q, k, v, turning, torch.tensor(positions, dtype=torch.int32), *cache


def twin(q, k, v, turning, positions, keys, values, scale, window):
    fields = (turning.cosines, turning.sines, turning.q_weight, turning.k_weight, turning.epsilon)
    return torch.ops.msq.attend(q, k, v, *fields, positions, keys, values, torch.zeros(0), scale, window)


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """`attention` with kernels that run on the CPU."""
    count = iter(range(100))
    monkeypatch.setattr(attention, "load", lambda code, device: Emulated(code, tmp_path / str(next(count))))
    attention._ready.cache_clear(), shape_for.cache_clear()
    yield
    attention._ready.cache_clear(), shape_for.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("limits", "run"),
    [(SMALL, 512), (SMALL, 16), (replace(SMALL, has_clusters=True), 4), (Limits(132, 99 << 10, has_clusters=True), 1)],
    ids=["alone", "runs", "clusters", "clusters and runs"],
)
@pytest.mark.parametrize(("heads", "key_heads", "size", "positions", "capacity", "window", "dtype", "norm"), CASES)
def test_the_kernels_source_computes_the_twin(
    emulated, monkeypatch, heads, key_heads, size, positions, capacity, window, dtype, norm, limits, run
):
    monkeypatch.setattr(attention, "_FEWEST_POSITIONS", run)
    monkeypatch.setattr(attention, "_limits", lambda device: limits)
    given = inputs(heads, key_heads, size, positions, capacity, dtype, norm)
    *rest, keys, values = given
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[expected_keys.isnan()] = expected_values[expected_values.isnan()] = 0
    expected = twin(*rest, expected_keys, expected_values, size**-0.5, window)
    shape = shape_for(heads, key_heads, size, len(positions), capacity, limits)
    workspace = torch.zeros(shape.workspace_words(len(positions)) + 4, dtype=torch.int32)
    counters = len(positions) * key_heads * shape.groups
    for _ in range(2):  # the second time counters are as the first left them
        found = attention.attend(
            *rest, keys, values, scale=size**-0.5, window=window, workspace=workspace.view(-1)[:-4]
        )
        assert not workspace[:counters].any() and not workspace[-4:].any()
        assert found.dtype == dtype and relative_error(found, expected) < (1e-3 if dtype is torch.float16 else 6e-3)
    tolerance = 1e-3 if dtype is torch.float16 else 1e-2
    for row, position in enumerate(positions):
        for mine, theirs in ((keys, expected_keys), (values, expected_values)):
            assert relative_error(mine[row, :, : position + 1], theirs[row, :, : position + 1]) < tolerance
            assert mine[row, :, position + 1 :].isnan().all()


def test_the_twin_is_causal_attention_of_the_whole_sequence():
    heads, key_heads, size, length, window = 6, 2, 32, 12, 5
    q, k, v, turning, _, _, _ = inputs(heads, key_heads, size, (0,) * length, 16, torch.float32, True)
    keys, values = torch.zeros(2, 1, key_heads, 16, size)
    steps = []
    for n in range(length):
        rows, position = slice(n, n + 1), torch.tensor([n], dtype=torch.int32)
        steps.append(twin(q[rows], k[rows], v[rows], turning, position, keys, values, 0.2, window))
    places = torch.arange(length)
    mask = (places[None] <= places[:, None]) & (places[None] > places[:, None] - window)

    def heads_of(rows, count, weight):
        rows = rows.view(length, count, size)
        if weight is not None:
            rows = torch.nn.functional.rms_norm(rows, (size,), weight, 1e-5)
            cosines, sines = (torch.cat([t, t], -1)[:length, None] for t in (turning.cosines, turning.sines))
            low, high = rows.chunk(2, -1)
            rows = rows * cosines + torch.cat([-high, low], -1) * sines
        return rows.transpose(0, 1)

    expected = torch.nn.functional.scaled_dot_product_attention(
        heads_of(q, heads, turning.q_weight),
        heads_of(k, key_heads, turning.k_weight).repeat_interleave(3, 0),
        heads_of(v, key_heads, None).repeat_interleave(3, 0),
        attn_mask=mask,
        scale=0.2,
    )
    assert torch.allclose(torch.cat(steps), expected.transpose(0, 1).reshape(length, -1), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("batch", "capacity"), [(1, 8192), (1, 1 << 20), (16, 4096)])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(32, 8, 128), (28, 4, 128), (16, 8, 64), (8, 1, 256)])
def test_every_shape_compiles(arch, batch, capacity, heads, key_heads, size):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    limits = H200 if int(arch.removeprefix("sm_")) >= 90 else A100
    shape = shape_for(heads, key_heads, size, batch, capacity, limits)
    assert compile_source(shape.source(torch.bfloat16, norm=True), arch)


@pytest.mark.parametrize("limits", [H200, A100])
def test_blocks_cover_all_heads_and_fill_the_device(limits):
    for heads, key_heads in ((32, 8), (28, 4), (64, 8), (40, 40), (24, 2), (71, 71), (22, 2)):
        for batch in (1, 4, 16):
            shape = shape_for(heads, key_heads, 128, batch, 1 << 20, limits)
            assert shape.key_heads * shape.groups * shape.group == heads
            assert shape.splits == shape.cluster == 1 or shape.blocks(batch) <= limits.multiprocessors
            assert 4 * shape.blocks(batch) > limits.multiprocessors or shape.splits == 32


def test_few_positions_meet_in_clusters_and_many_in_memory():
    def division(batch, capacity, limits):
        shape = shape_for(32, 8, 128, batch, capacity, limits)
        return shape.cluster, shape.splits

    assert division(1, 4096, H200) == (8, 1) and division(2, 4096, H200) == (4, 1)
    assert division(8, 512, H200) == (1, 1) and division(8, 513, H200) == (1, 2)
    assert division(1, 8193, H200) == (1, 16)
    assert division(1, 512, A100) == (1, 1) and division(1, 4096, A100) == (1, 8)


def test_what_does_not_fit_says_so():
    assert unsupported_reason(32, 8, 128) is None
    with pytest.raises(KernelError, match="got 20"):
        shape_for(4, 4, 20, 1, 64, H200)
    with pytest.raises(KernelError, match="got 5 and 2"):
        shape_for(5, 2, 64, 1, 64, H200)
    q, k, v, turning, positions, keys, values = inputs(4, 2, 32, (3,), 8, torch.float16, False)
    with pytest.raises(QuantizerError, match="int32 positions"):
        twin(q, k, v, turning, positions.long(), keys, values, 1.0, 0)
    with pytest.raises(QuantizerError, match="new keys"):
        twin(q, k.float(), v, turning, positions, keys, values, 1.0, 0)
