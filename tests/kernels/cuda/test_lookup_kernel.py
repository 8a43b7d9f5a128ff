"""The lookup kernel and the inverse rotation: their source compiled for every GPU, and run on the CPU."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import random_weight
from msq.kernels.cuda import hadamard, lookup
from msq.kernels.cuda.compiler import ARCHITECTURES, compile_source
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.limits import Limits
from msq.kernels.cuda.rotation_plan import rotation_tables
from msq.kernels.errors import KernelError
from msq.kernels.hadamard import apply_hadamard, hadamard_plan
from msq.kernels.quantize import decode
from msq.kernels.rotation import rotate, rotation_signs
from msq.kernels.specs import every_quantizer

from .emulate import Emulated, needs_compiler

SPECS = {spec.label: spec for spec in every_quantizer()}
ROWS = {
    "int-3": (48, 256),
    "int-8": (32, 2080),
    "nuq-2": (144, 512),
    "nuq-3": (32, 416),
    "nuq-5": (48, 1184),
    "nuq-7": (16, 96),
    "vq-1.5": (48, 96),
    "vq-2": (32, 2080),
    "vq-2.5": (32, 416),
    "vq-5": (32, 320),
    "tcq-1.5": (32, 1056),
    "tcq-4": (64, 640),
    "tcq-4.5": (32, 96),
    "half-tcq-2.25": (176, 544),
    "half-tcq-3.75": (32, 2112),
    "tcq-1.5-hyb": (32, 1056),
    "half-tcq-3.75-hyb": (32, 2112),
}


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """Kernels that run on the CPU."""
    count = iter(range(100))
    for module in (lookup, hadamard):
        monkeypatch.setattr(module, "load", lambda code, device: Emulated(code, tmp_path / str(next(count))))
    monkeypatch.setattr(lookup, "device_limits", lambda _: Limits(1, 227 << 10))
    hadamard._steps.cache_clear()
    yield
    hadamard._steps.cache_clear()


@needs_compiler
@pytest.mark.parametrize("label", ROWS)
def test_rows_are_those_of_the_twin(emulated, label):
    weight = random_weight(SPECS[label], *ROWS[label], torch.device("cpu"))
    last = ROWS[label][0] - 1
    tokens = torch.tensor([last, 0, 9, 8, 7, 9, last - 16 if last > 16 else 1, *range(40 % (last + 1))])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = lookup.lookup(tokens, prepare(weight), dtype)
        assert torch.equal(found, decode(weight)[tokens].to(dtype))
        if dtype is torch.float32 and label.startswith("int"):
            break  # the formats are written by the same lines for every family


@needs_compiler
def test_no_tokens_are_no_launch(emulated):
    weight = random_weight(SPECS["nuq-3"], 16, 96, torch.device("cpu"))
    assert lookup.lookup(torch.empty(0, dtype=torch.int64), prepare(weight)).shape == (0, 96)
    with pytest.raises(KernelError, match=r"int64 tokens .* got \(2,\) torch.int32"):
        lookup.lookup(torch.zeros(2, dtype=torch.int32), prepare(weight))


CASES = [(4096, 1), (4096, 33), (512, 2), (96, 3), (1536, 40), (4304, 2), (2816, 32), (29568, 1)]


@needs_compiler
@pytest.mark.parametrize(("size", "rows"), CASES)
def test_the_inverse_rotation_undoes_the_rotation(emulated, size, rows):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    tables = rotation_tables(size, 3, torch.device("cpu"), inverse=True)
    assert torch.allclose(hadamard.unrotate(rotate(x, 3), tables, torch.float32), x, atol=1e-5)
    expected = apply_hadamard(x.double(), hadamard_plan(size), inverse=True) * rotation_signs(size, 3)
    found = hadamard.unrotate(x, tables, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert float((found.double() - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("label", ["int-6", "nuq-5", "vq-3.5", "tcq-4.5", "half-tcq-3.25", "half-tcq-2.25-hyb"])
def test_lookup_kernels_compile(label, arch):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    for rate in SPECS[label].rates:
        code, shared_bytes = lookup.source(SPECS[label], rate, torch.float32)
        assert compile_source(code, arch)[:4] == b"\x7fELF"
        assert shared_bytes <= 99 << 10


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inverse_rotations_compile(arch):
    pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')
    for size, many_rows in ((4096, False), (8192, True), (3584, False)):
        for code in hadamard.sources(size, many_rows, torch.float32, inverse=True, out_dtype=torch.float16):
            assert compile_source(code, arch)
