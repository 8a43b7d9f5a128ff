"""Packed weights of random codes: what a kernel costs does not depend on them."""

from __future__ import annotations

import torch

from .codebooks import codebook
from .quantize import QuantizedWeight, packed_names, tensor_shapes
from .specs import Family, QuantizerSpec

ROTATION_SEED = 0
"""Of every rotation: layers of one input must share it, others may."""


def random_weight(
    spec: QuantizerSpec, out_features: int, in_features: int, generator: torch.Generator
) -> QuantizedWeight:
    """A packed weight of random codes, its rows of about unit length, on the generator's device."""
    device = generator.device
    shapes = tensor_shapes(spec, out_features, in_features)
    packed = tuple(
        torch.randint(256, shapes[name][0], dtype=torch.uint8, device=device, generator=generator)
        for name in packed_names(spec)
    )
    size = 2.0 ** (spec.bits - 1) / 3**0.5 if spec.family is Family.INT else 1.0  # of a decoded code, about
    scales = torch.full((out_features,), in_features**-0.5 / size, dtype=torch.float16, device=device)
    seed = None if spec.family is Family.INT else ROTATION_SEED
    return QuantizedWeight(spec, out_features, in_features, seed, packed, scales, codebook(spec).to(device))
