"""The rotation kernels on a device, against fp64; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from msq.kernels.cuda import hadamard
from msq.kernels.cuda.rotation_plan import MANY_ROWS, fuses_norm, rotation_tables
from msq.kernels.hadamard import apply_hadamard, hadamard_plan
from msq.kernels.rotation import rotate, rotation_signs

pytestmark = pytest.mark.gpu
SIZES = [32, 64, 96, 256, 512, 896, 1024, 1536, 2048, 3072, 3584, 4096, 4304, 4864, 5120, 8192, 8960, 9216, 11008,
         13824, 14336, 17920, 18944, 25600, 28672, 29568, 53248]  # fmt: skip
LARGEST_ERROR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}
DEVICE = torch.device("cuda")


def check(found, values, size, dtype):
    """`found` must be the rotation of the float64 `values`, and no more wrong than its rounding."""
    expected = apply_hadamard(values * rotation_signs(size, 3).to(values.device), hadamard_plan(size))
    assert found.dtype == dtype and found.shape == values.shape
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < LARGEST_ERROR[dtype], f"relative error {error:.2e}"


@pytest.fixture
def poisoned(monkeypatch):
    """New float tensors hold NaN until something is written."""
    real = torch.empty

    def empty(*args, **options):
        made = real(*args, **options)
        return made.fill_(torch.nan) if made.is_cuda and made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_rotated(poisoned, size):
    tables = rotation_tables(size, 3, DEVICE)
    for dtype, rows in [(torch.float16, 1), (torch.bfloat16, 7), (torch.float16, MANY_ROWS + 1), (torch.float32, 2)]:
        x = torch.randn(rows, size, device=DEVICE).to(dtype)
        found = hadamard.rotate(x, tables)
        check(found, x.double(), size, dtype)
        assert all(torch.equal(hadamard.rotate(x, tables), found) for _ in range(5))
    assert torch.allclose(hadamard.rotate(x, tables).cpu(), rotate(x.cpu(), 3), atol=1e-4)


@pytest.mark.parametrize("size", [256, 1536, 4096, 5120, 11008, 14336, 28672, 29568])
@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.float16, 16), (torch.bfloat16, 50)]
)
def test_what_stands_before_is_fused(poisoned, size, dtype, rows):
    tables = rotation_tables(size, 3, DEVICE)
    both = torch.randn(rows, 2 * size, device=DEVICE).to(dtype)
    gate, up = both.split(size, dim=1)  # rows are apart
    values = F.silu(gate.double()) * up.double()
    check(hadamard.rotate_gated(gate, up, tables), values, size, dtype)
    if fuses_norm(size):
        weight = torch.randn(size, device=DEVICE).to(dtype)
        values = F.rms_norm(gate.double(), (size,), weight.double(), 1e-5)
        check(hadamard.rotate_normed(gate, weight, 1e-5, tables), values, size, dtype)


def test_rows_anywhere_and_none_at_all():
    tables = rotation_tables(1536, 3, DEVICE)
    long = torch.randn(4, 1600, device=DEVICE).half()
    for x in (long[:, :1536], long[:, 1:1537], long[:, 64:].T.contiguous().T, long[:0, :1536]):
        check(hadamard.rotate(x, tables), x.double(), 1536, torch.float16) if len(x) else hadamard.rotate(x, tables)


def test_many_rows():
    x = torch.randn(70_000, 512, device=DEVICE).half()
    check(hadamard.rotate(x, rotation_tables(512, 3, DEVICE)), x.double(), 512, torch.float16)
