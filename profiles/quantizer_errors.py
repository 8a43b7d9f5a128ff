"""Normalised error and exact size of every (layer, quantizer), measured by encoding the rotated weight.

Without Hessians the error is ``|W - Q|^2 / |W|^2`` of data-free quantization. With them it is the proxy error of
quantization under the Hessian (see `kernels.hessian`), in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..kernels.codebooks import gaussian_error
from ..kernels.errors import QuantizerError
from ..kernels.quantize import normalized_error, quantize
from ..kernels.rotation import input_seed
from ..kernels.specs import QuantizerSpec
from .errors import ProfileError
from .hessians import HessianFiles
from .inventory import LayerInfo
from .journal import Journal
from .progress import progress

_SAMPLE = (256, 1024)
"""Shape of the N(0,1) sample for quantizers whose error was not measured beforehand."""


def read_weight(directory: Path, layer: LayerInfo) -> Tensor:
    """One weight from its safetensors file, ``(out_features, in_features)``, on the CPU."""
    with safe_open(directory / layer.file, framework="pt") as file:
        weight: Tensor = file.get_tensor(layer.stored_as)
    return weight


def measure_errors(
    directory: Path,
    layers: Sequence[LayerInfo],
    specs: Sequence[QuantizerSpec],
    *,
    seed: int,
    device: torch.device,
    journal: Journal,
    hessians: HessianFiles | None = None,
) -> dict[tuple[str, str], tuple[float, int]]:
    """(error, size_bytes) by (layer, quantizer label); one weight in memory at a time, journalled pair by pair.

    Args:
        hessians: of the layers' inputs, for the same `seed`; None for data-free quantization.

    Raises:
        ProfileError: a weight can't be quantized (NaN, infinite), or a Hessian can't be read.
    """
    with progress("quantizer errors", len(layers) * len(specs), done=journal.count("error")) as advance:
        for layer in layers:
            missing = [spec for spec in specs if ("error", layer.name, spec.label) not in journal]
            if not missing:
                continue
            weight = read_weight(directory, layer).to(device)
            hessian = None if hessians is None else hessians.load(layer, device)
            for spec in missing:
                try:
                    quantized = quantize(
                        weight, spec, rotation_seed=input_seed(layer.fusion_group, seed), hessian=hessian
                    )
                except QuantizerError as cause:
                    raise ProfileError(f"{layer.name}: {cause}") from cause
                error = normalized_error(weight, quantized, hessian)
                journal.add(("error", layer.name, spec.label), [error, quantized.size_bytes])
                advance()
    pairs = ((layer.name, spec.label) for layer in layers for spec in specs)
    return {(layer, label): tuple(journal["error", layer, label]) for layer, label in pairs}


def measured_gaussian_error(spec: QuantizerSpec, seed: int) -> float:
    """The quantizer's error on N(0,1): from the shipped measurements, else from a seeded sample of 262,144 weights."""
    known = gaussian_error(spec)
    if known is not None:
        return known
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(seed))
    return normalized_error(sample, quantize(sample, spec, rotation_seed=seed))
