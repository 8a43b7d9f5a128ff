"""The rotation kernels against `rotation.rotate`: their passes in torch, and their source run on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from msq.kernels.cuda import hadamard
from msq.kernels.cuda.compiler import ARCHITECTURES, compile_source
from msq.kernels.cuda.hadamard import source, sources
from msq.kernels.cuda.rotation_plan import division, fuses_norm, matrix_table, passes, rotation_tables
from msq.kernels.hadamard import apply_hadamard, hadamard_matrix, hadamard_plan
from msq.kernels.rotation import rotate, rotation_signs

from .emulate import Emulated, needs_compiler

SIZES = [32, 64, 96, 256, 512, 896, 1536, 4096, 4304, 4864, 5120, 8960, 11008, 13824, 14336, 17920, 18944, 28672, 29568,
         53248]  # fmt: skip


@pytest.mark.parametrize("many_rows", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_passes_multiply_to_the_plan(size, many_rows):
    x = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x
    for step in passes(size, many_rows):
        split = division(step, many_rows)
        table = matrix_table(step, split.group).to(torch.int64)
        bits = (table[:, None, :] >> torch.arange(split.group)[:, None] & 1).reshape(step.order, step.order).T
        y = y.reshape(2, step.outer, step.order, step.inner)
        y = torch.einsum("roic,ij->rojc", y, (1.0 - 2.0 * bits).double()) / math.sqrt(step.order)
        if step.transform:
            y = y @ hadamard_matrix(step.columns)
    assert torch.allclose(y.reshape(2, size), apply_hadamard(x, hadamard_plan(size)), atol=1e-10)
    tables = rotation_tables(size, 5, torch.device("cpu"))
    signs = 1.0 - 2.0 * (tables.signs.repeat_interleave(8).view(-1, 8) >> torch.arange(8) & 1).flatten()[:size]
    assert torch.equal(signs, rotation_signs(size, 5))


CASES = [  # one for every way the work is divided, and every format
    (4096, 1, torch.float16, ""),
    (4096, 33, torch.bfloat16, "norm"),
    (4096, 3, torch.bfloat16, "norm"),
    (5120, 2, torch.float16, "gate"),
    (5120, 32, torch.float16, "gate"),
    (256, 5, torch.float16, "norm"),
    (512, 2, torch.bfloat16, "gate"),
    (1536, 2, torch.float16, "norm"),
    (1536, 40, torch.bfloat16, ""),
    (96, 3, torch.float16, "gate"),
    (4304, 2, torch.float16, ""),
    (11008, 1, torch.float16, "gate"),
    (2816, 32, torch.float32, ""),
    (14336, 1, torch.bfloat16, "gate"),
    (1152, 2, torch.float16, ""),
    (29568, 1, torch.float16, ""),
    (924, 33, torch.bfloat16, ""),
]


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """`hadamard` with kernels that run on the CPU."""
    count = iter(range(100))
    monkeypatch.setattr(hadamard, "load", lambda code, device: Emulated(code, tmp_path / str(next(count))))
    hadamard._steps.cache_clear()
    yield
    hadamard._steps.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("size", "rows", "dtype", "before"), CASES)
def test_the_kernels_source_computes_the_rotation(emulated, size, rows, dtype, before):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows, size + 16, generator=generator).to(dtype)[:, :size]  # rows are apart
    other = torch.randn(rows, size, generator=generator).to(dtype)
    tables = rotation_tables(size, 3, torch.device("cpu"))
    if before == "norm":
        expected = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * other[0].double()
        found = hadamard.rotate_normed(x, other[0], 1e-5, tables)
    elif before == "gate":
        expected = torch.nn.functional.silu(x.double()) * other.double()
        found = hadamard.rotate_gated(x, other, tables)
    else:
        expected, found = x.double(), hadamard.rotate(x, tables)
    expected = apply_hadamard(expected * rotation_signs(size, 3), hadamard_plan(size))
    assert found.dtype == dtype and found.shape == (rows, size)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}[dtype]
    if not before and dtype is torch.float32:
        assert torch.allclose(found, rotate(x, 3), atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("far", [-50.0, -100.0, -1e4, -1e20])
def test_gates_far_below_zero_leave_their_neighbours_alone(emulated, far):
    size, tables = 256, rotation_tables(256, 3, torch.device("cpu"))
    x = torch.full((1, size), far, dtype=torch.bfloat16)
    x[0, 1::2] = 3.0
    found = hadamard.rotate_gated(x, torch.ones_like(x), tables)
    x[0, ::2] = 0.0  # what is left of such a gate
    expected = hadamard.rotate_gated(x, torch.ones_like(x), tables)
    assert torch.equal(found, expected) and found.isfinite().all()


@needs_compiler
@pytest.mark.parametrize(
    ("size", "rows", "dtype"), [(4096, 1, torch.float16), (256, 5, torch.bfloat16), (1536, 33, torch.float16)]
)
def test_a_sum_is_normed_and_rotated_and_written_out(emulated, size, rows, dtype):
    generator = torch.Generator().manual_seed(size)
    x, residual = torch.randn(2, rows, size + 16, generator=generator).to(dtype)[..., :size]
    weight, tables = torch.randn(size, generator=generator).to(dtype), rotation_tables(size, 3, torch.device("cpu"))
    found, total = hadamard.rotate_added(x, residual, weight, 1e-5, tables)
    assert torch.equal(total, x + residual)
    assert torch.equal(found, hadamard.rotate_normed(total, weight, 1e-5, tables))


@needs_compiler
def test_outputs_are_written_once_and_nothing_else_is(emulated, monkeypatch):
    size, rows = 1536, 3
    room = torch.full((rows * size + 64,), float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: room[32:-32].view(rows, size))
    found = hadamard.rotate(torch.randn(rows, size), rotation_tables(size, 0, torch.device("cpu")))
    assert not found.isnan().any() and room[:32].isnan().all() and room[-32:].isnan().all()


def test_a_norm_is_fused_only_where_blocks_see_whole_rows():
    assert fuses_norm(4096) and fuses_norm(5120) and not fuses_norm(29568) and not fuses_norm(4304)
    with pytest.raises(hadamard.KernelError, match="apply the norm before"):
        tables = rotation_tables(4304, 0, torch.device("cpu"))
        hadamard.rotate_normed(torch.ones(1, 4304), torch.ones(4304), 1e-5, tables)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_of_pass_compiles(arch):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    for code in [
        *sources(14336, False, torch.bfloat16, gate=True),
        *sources(4096, True, torch.float16, norm=True, add=True),
    ]:
        assert compile_source(code, arch)


@pytest.mark.parametrize("size", [96, 4304, 11008, 29568])
def test_every_size_compiles(size):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    for many_rows in (False, True):
        for code in sources(size, many_rows, torch.float16):
            assert compile_source(code, "sm_90")


def test_a_source_says_what_it_is():
    step = passes(4096, False)[0]
    code = source(step, division(step, False), dtypes=(torch.float16, torch.float16), signs=True, norm=False, gate=True)
    assert "-DORDER=16" in str(code) and "-DGATE=1" in str(code) and "-DNORM=0" in str(code)
