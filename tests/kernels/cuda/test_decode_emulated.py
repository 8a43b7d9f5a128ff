"""The decode kernel's source, run on the CPU thread by thread, against fp64 products of the PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import LARGEST_ERROR, random_weight
from msq.kernels import mad
from msq.kernels.cuda.decode import kernel_arguments, new_workspace
from msq.kernels.cuda.layout import prepare
from msq.kernels.cuda.limits import Limits
from msq.kernels.cuda.tuning import Tuning, launch_for
from msq.kernels.quantize import decode
from msq.kernels.quantizers import codes
from msq.kernels.specs import every_quantizer

from .emulate import Emulated, needs_compiler

SPECS = {spec.label: spec for spec in every_quantizer()}
LIMITS = Limits(multiprocessors=3, shared_bytes=227 << 10)

CASES = [
    ("int-3", (48, 256), 1, torch.float16, Tuning(4)),
    ("int-2", (48, 256), 2, torch.float16, Tuning(4, steps_at_start=2)),
    ("int-4", (48, 256), 1, torch.float16, Tuning(4)),
    ("int-5", (64, 256), 1, torch.float16, Tuning(4, rows=1, steps_at_start=2)),
    ("int-6", (48, 256), 1, torch.float16, Tuning(4)),
    ("int-8", (48, 256), 1, torch.float16, Tuning(4)),
    ("int-7", (96, 160), 3, torch.bfloat16, Tuning(4, rows=1)),
    ("int-5", (80, 416), 3, torch.bfloat16, Tuning(8, row_groups=4, rows=1, steps_at_start=2, splits=2)),
    ("half-tcq-2.75-hyb", (176, 544), 11, torch.bfloat16, Tuning(8, replicas=4, row_groups=2, splits=2)),
    ("half-tcq-3.25-hyb", (64, 96), 9, torch.bfloat16, Tuning(8, replicas=4, row_groups=2, splits=4, waves=2)),
    ("nuq-2", (144, 512), 1, torch.float16, Tuning(8, row_groups=2)),
    ("nuq-2", (112, 1056), 5, torch.bfloat16, Tuning(4, ring=2)),
    ("nuq-2", (64, 96), 16, torch.float16, Tuning(8, rows=1, row_groups=2, splits=2)),
    ("nuq-3", (112, 1056), 1, torch.float16, Tuning(4, ring=2)),
    ("nuq-3", (80, 416), 3, torch.bfloat16, Tuning(8, row_groups=4, rows=1, steps_at_start=2, splits=2)),
    ("nuq-3", (48, 256), 8, torch.float16, Tuning(4)),
    ("nuq-4", (80, 384), 4, torch.float16, Tuning(4, rows=1, row_groups=2)),
    ("nuq-6", (48, 256), 8, torch.bfloat16, Tuning(4, replicas=4, splits=3)),
    ("vq-1.5", (176, 640), 6, torch.bfloat16, Tuning(4)),
    ("vq-1.5", (112, 416), 3, torch.bfloat16, Tuning(4, ring=2)),
    ("nuq-2", (112, 416), 4, torch.float16, Tuning(4, rows=1, ring=3)),
    ("vq-2", (112, 640), 1, torch.float16, Tuning(8)),
    ("vq-2", (80, 160), 8, torch.float16, Tuning(4, rows=1, splits=2)),
    ("vq-2.5", (208, 416), 13, torch.float16, Tuning(4, rows=1, waves=2)),
    ("vq-3.5", (64, 1184), 2, torch.float16, Tuning(4, rows=1)),
    ("vq-5", (64, 320), 1, torch.float16, Tuning(4, replicas=4)),
    ("tcq-3-hyb", (112, 640), 1, torch.bfloat16, Tuning(8, replicas=8, steps_at_start=2)),
    ("tcq-4.5-hyb", (32, 320), 5, torch.float16, Tuning(4, replicas=4, signed=False, splits=2)),
    ("half-tcq-2.75-hyb", (176, 544), 2, torch.float16, Tuning(8, replicas=4, row_groups=2)),
    ("half-tcq-3.25-hyb", (64, 576), 1, torch.float16, Tuning(4, replicas=4, splits=2, rows=1)),
    ("tcq-1.5", (48, 256), 1, torch.float16, Tuning(4)),
    ("tcq-2", (112, 640), 2, torch.float16, Tuning(4, rows=1, steps_at_start=2)),
    ("tcq-2.5", (80, 416), 5, torch.bfloat16, Tuning(8, row_groups=4, rows=1, splits=2)),
    ("tcq-3", (112, 640), 1, torch.bfloat16, Tuning(8)),
    ("tcq-3", (112, 1056), 1, torch.float16, Tuning(4, ring=3)),
    ("int-3", (112, 1056), 1, torch.float16, Tuning(4, ring=2)),
    ("half-tcq-2.75", (176, 1056), 2, torch.float16, Tuning(8, rows=1, row_groups=2, ring=4)),
    ("tcq-3.5", (48, 256), 3, torch.float16, Tuning(4, row_groups=2)),
    ("tcq-4", (96, 160), 8, torch.float16, Tuning(4)),
    ("tcq-4.5", (32, 320), 1, torch.float16, Tuning(4, rows=1)),
    ("tcq-5", (64, 256), 13, torch.bfloat16, Tuning(4, rows=1)),
    ("half-tcq-2.75", (176, 544), 11, torch.bfloat16, Tuning(8, row_groups=2, splits=2)),
    ("half-tcq-3.25", (64, 576), 1, torch.float16, Tuning(4, splits=2, rows=1)),
    ("half-tcq-3.25", (64, 96), 2, torch.float16, Tuning(8, row_groups=2, waves=2)),
]


@needs_compiler
@pytest.mark.parametrize(
    ("label", "shape", "batch", "dtype", "tuning"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)]
)
def test_products_are_those_of_the_twin(label, shape, batch, dtype, tuning, tmp_path):
    torch.manual_seed(0)
    spec, device = SPECS[label], torch.device("cpu")
    quantized = random_weight(spec, *shape, device)
    launch = launch_for(spec, *shape, batch, dtype, LIMITS, tuning)
    x, bias = torch.randn(batch, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    y = torch.full((batch, shape[0]), torch.nan, dtype=dtype)
    workspace = new_workspace(launch.workspace_words, device)
    arguments = kernel_arguments(x, prepare(quantized), bias, y, workspace, launch)
    Emulated(launch.source, tmp_path / "host").launch(launch.grid, launch.block, arguments)
    expected = x.double() @ decode(quantized).double().T + bias.double()
    rounding = 2**-8 if dtype is torch.bfloat16 else 0  # of the result, for the few numbers that there are here
    assert float((y.double() - expected).norm() / expected.norm()) < LARGEST_ERROR[torch.float16] + rounding
    assert bool((workspace == -1).all())


SIZES = {"smallest": 2**-24, "small": 1e-5, "large": 500.0}


@needs_compiler
@pytest.mark.parametrize("label", ["tcq-3", "nuq-3", "vq-2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_digits_hold_activations_of_any_size(dtype, label, tmp_path):
    torch.manual_seed(0)
    spec, shape = SPECS[label], (48, 512)
    quantized = random_weight(spec, *shape, torch.device("cpu"))
    x = torch.randn(len(SIZES) + 3, shape[1]).clamp(-4, 4)
    for token, size in enumerate(SIZES.values()):
        x[token] *= size
    x = x.to(dtype)
    x[-3], x[-2, 5], x[-1, 300] = 0, torch.inf, torch.nan
    # one column far above the others: what is lost is small beside it
    x[1, 7] *= 100
    tuning = Tuning(4, ring=2)
    launch = launch_for(spec, *shape, 3, dtype, LIMITS, tuning)  # few enough for quads
    kernel, results = Emulated(launch.source, tmp_path / "host"), []
    for tokens in x.split(3):
        y = torch.full((3, shape[0]), 7.0, dtype=dtype)
        kernel.launch(launch.grid, launch.block, kernel_arguments(tokens, prepare(quantized), None, y, None, launch))
        results.append(y)
    y = torch.cat(results)
    expected = x.double() @ decode(quantized).double().T
    assert bool((y[-3] == 0).all()) and bool(y[-2:].isnan().all())
    for token, name in enumerate(SIZES):
        resolution = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a result smaller than that is zero
        wrong = (y[token].double() - expected[token]).abs() - resolution
        rounding = 2**-8 if dtype is torch.bfloat16 else 2**-10
        assert float(wrong.clamp(min=0).norm() / expected[token].norm()) < LARGEST_ERROR[torch.float16] + rounding, name


@pytest.fixture
def rounding_gain(monkeypatch):
    """A gain whose products with hashes come close enough to ties to tell a factor that is not exact."""
    monkeypatch.setitem(mad._FOUND, 3, mad.MadCode((1914290651,), (1069721864,), 0.96))
    codes._mad_points_of.cache_clear()
    yield
    codes._mad_points_of.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("label", "batch"),
    [(label, 16) for label in ("tcq-1.5", "tcq-2", "tcq-3.5", "tcq-5", "half-tcq-3.25", "nuq-3", "vq-2")]
    + [(label, 4) for label in ("nuq-2", "nuq-3", "vq-1.5", "vq-2")],
)
def test_unit_vectors_pick_exact_weights(label, batch, rounding_gain, tmp_path):
    spec, shape = SPECS[label], (48, 96)
    quantized = random_weight(spec, *shape, torch.device("cpu"))
    launch = launch_for(spec, *shape, batch, torch.float16, LIMITS, Tuning(4, rows=1, ring=2))
    kernel, units, found = Emulated(launch.source, tmp_path / "host"), torch.eye(shape[1]).half(), []
    for x in units.split(batch):
        y = torch.full((batch, shape[0]), torch.nan, dtype=torch.float16)
        kernel.launch(launch.grid, launch.block, kernel_arguments(x, prepare(quantized), None, y, None, launch))
        found.append(y)
    assert torch.equal(torch.cat(found).T, decode(quantized).half())


def test_sums_of_bytes_do_not_overflow():
    shape = (SPECS["tcq-4"], 64, 40_000, 1, torch.float16, LIMITS)
    assert launch_for(*shape, Tuning(4, row_groups=4)) is None  # a warp has all columns
    assert launch_for(*shape, Tuning(4)) is not None
