"""What a decode kernel must get right on a device, for random codes: any bits are valid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.codebooks import codebook
from ..kernels.cuda.decode import multiply, new_workspace, workspace_words
from ..kernels.cuda.dequantize import dequantize
from ..kernels.cuda.dequantize import source as dequantize_source
from ..kernels.cuda.jit import Source
from ..kernels.cuda.layout import prepare
from ..kernels.cuda.limits import Limits, device_limits
from ..kernels.cuda.tuning import Tuning, launch_for
from ..kernels.cuda.tuning_choice import tune
from ..kernels.quantize import QuantizedWeight, decode, from_tensors, tensor_shapes
from ..kernels.specs import QuantizerSpec, default_palette, every_quantizer

LARGEST_ERROR = {torch.float16: 2e-3, torch.bfloat16: 2.5e-3}
"""Of a product against fp64, relative, in the Frobenius norm; rounding the result to bf16 alone takes 1.7e-3."""


def random_weight(
    spec: QuantizerSpec, out_features: int, in_features: int, device: torch.device, seed: int = 0
) -> QuantizedWeight:
    """A layer of random codes and scales with the shipped codebook."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in tensor_shapes(spec, out_features, in_features).items():
        if name == "codebook":
            tensors[name] = codebook(spec)
        elif dtype is torch.uint8:
            tensors[name] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            tensors[name] = (0.5 + torch.rand(shape, generator=generator)).half()
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return from_tensors(spec, out_features, in_features, 0, on_device)


def check_dequantized(spec: QuantizerSpec, out_features: int, in_features: int, device: torch.device) -> str | None:
    """None where the dequantize kernel gives exactly the twin's values, rounded once; else what differs."""
    weight = random_weight(spec, out_features, in_features, device)
    for dtype in (torch.float16, torch.bfloat16):
        out = torch.full((out_features, in_features), torch.nan, dtype=dtype, device=device)
        found, expected = dequantize(prepare(weight), dtype, out), decode(weight).to(dtype)
        if not torch.equal(found, expected):
            wrong = int((found != expected).sum())
            return f"{spec.label} {out_features}x{in_features} {dtype}: {wrong} of {found.numel()} weights differ."
    return None


def check_product(
    spec: QuantizerSpec,
    out_features: int,
    in_features: int,
    batch: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    tuning: Tuning | None = None,
) -> str | None:
    """None where a product is right, complete and repeats bit for bit; else what is wrong."""
    quantized = random_weight(spec, out_features, in_features, device)
    weight, generator = prepare(quantized), torch.Generator(device).manual_seed(batch)
    x = torch.randn(batch, in_features, generator=generator, device=device).to(dtype)
    offset = torch.randn(out_features, generator=generator, device=device).to(dtype) if bias else None
    words = workspace_words(weight, batch, dtype, tuning)
    workspace = new_workspace(words, device) if words else None
    results = []
    for _ in range(3):
        out = torch.full((batch, out_features), torch.nan, dtype=dtype, device=device)
        results.append(multiply(x, weight, offset, out=out, workspace=workspace, tuning=tuning))
    expected = x.double() @ decode(quantized).double().T
    expected += 0 if offset is None else offset.double()
    error = float((results[0].double() - expected).norm() / expected.norm())
    what = f"{spec.label} {out_features}x{in_features} batch {batch} {dtype} {tuning}"
    if not error < LARGEST_ERROR[dtype]:
        missing = int(results[0].isnan().sum())
        return f"{what}: relative error {error:.1e}, {missing} of {out_features * batch} results missing."
    if not all(torch.equal(results[0], other) for other in results[1:]):
        return f"{what}: repeated runs differ."
    if workspace is not None and bool((workspace != -1).any()):
        return f"{what}: the workspace is not left empty."
    return None


_HYBRID = ("tcq-2.5-hyb", "tcq-4.5-hyb", "half-tcq-3.25-hyb")
CHECKED = (*default_palette(), *(spec for spec in every_quantizer() if spec.label in _HYBRID))
"""All quantizers of the palette, and some of the other code that the kernels know."""

CHECK_TUNINGS = [
    None,
    Tuning(8, rows=1, splits=2),
    Tuning(4, row_groups=2, splits=3, signed=False, resident=2),
    Tuning(16, rows=1, row_groups=4, replicas=16, waves=2),
]


def check_cases(
    thorough: bool,
) -> Iterator[tuple[QuantizerSpec, tuple[int, int], int, torch.dtype, bool, Tuning | None]]:
    """Products to check: every quantizer once, one of each family in every way (all of them when `thorough`)."""
    deep = {"int-7", "nuq-3", "vq-5.5", "tcq-2.5", "tcq-4.5", "half-tcq-3.25", *_HYBRID}
    for spec in CHECKED:
        yield spec, (272, 1056), 1, torch.float16, False, None
        if thorough or spec.label in deep:
            for batch, tuning in itertools.product((1, 3, 8, 13), CHECK_TUNINGS):
                yield spec, (272, 1056), batch, torch.float16, False, tuning
            yield spec, (4096, 4096), 2, torch.bfloat16, True, None
            yield spec, (1024, 14336), 16, torch.bfloat16, True, None


def check_all(device: torch.device, thorough: bool) -> int:
    """Run the checks, print what fails; the number of failures."""
    failures = checks = 0
    limits = device_limits(device.index)
    for spec in CHECKED:
        checks += 1
        problem = check_dequantized(spec, 272, 1056, device)
        if problem:
            failures += 1
            print("FAIL", problem, flush=True)
    for spec, shape, batch, dtype, bias, tuning in check_cases(thorough):
        if tuning is not None and launch_for(spec, *shape, batch, dtype, limits, tuning) is None:
            continue
        checks += 1
        problem = check_product(spec, *shape, batch, device, dtype=dtype, bias=bias, tuning=tuning)
        if problem:
            failures += 1
            print("FAIL", problem, flush=True)
    print(f"{checks} checks, {failures} failed", flush=True)
    return failures


def check_sources(limits: Limits, thorough: bool) -> Iterator[Source]:
    """The kernels that `check_all` needs."""
    for spec in CHECKED:
        for rate, dtype in itertools.product(spec.rates, (torch.float16, torch.bfloat16)):
            yield dequantize_source(spec, rate, dtype)[0]
    for spec, shape, batch, dtype, _, tuning in check_cases(thorough):
        chosen = tuning or tune(spec, *shape, batch, limits)
        launch = None if chosen is None else launch_for(spec, *shape, batch, dtype, limits, chosen)
        if launch is not None:
            yield launch.source
