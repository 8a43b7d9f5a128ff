"""Layers of random codes: any bits are valid, and quantizing would take longer than what is tested."""

from __future__ import annotations

import torch
from msq.kernels.quantize import QuantizedWeight, from_tensors, tensor_shapes
from msq.kernels.specs import Family, QuantizerSpec


def random_layer(
    spec: QuantizerSpec, out_features: int, in_features: int, device: str | torch.device = "cpu"
) -> QuantizedWeight:
    """A packed layer whose codes, scales and codebook are random, the same every time."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, dtype) in tensor_shapes(spec, out_features, in_features).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(256, shape, dtype=dtype, generator=generator).to(device)
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(device, dtype)
    seed = None if spec.family is Family.INT else 0
    return from_tensors(spec, out_features, in_features, seed, tensors)
