"""The overhead of a decoding step as this executor runs it, for profiles: everything but the products.

Only shapes matter, so the model is one of random packed weights; its products are left out while its step is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...kernels.specs import Family, QuantizerSpec
from ...profiles.inventory import LayerInfo
from ...profiles.models import load_config
from .benchmark import measure_without_products
from .random_model import random_model, uniform_quantization

_SPEC = QuantizerSpec(Family.NUQ, 2)
"""The smallest weights: what they would take doesn't count."""


class ExecutorOverhead:
    """Measures overheads for `profiles.job` and `profiles.latency_job`."""

    method = "decoding step without products"

    def __call__(
        self,
        config: Path,
        layers: Sequence[LayerInfo],
        batch_sizes: Sequence[int],
        context: int,
        device: torch.device,
    ) -> dict[int, float]:
        """µs of a step beside the products of the planned layers, their rotations included, by batch size.

        Args:
            config: config.json of the model, or its directory.
            layers: that are planned.
            context: tokens in the cache.
        """
        head = _SPEC if any(layer.is_head for layer in layers) else None
        embedding = _SPEC if any(layer.is_embedding for layer in layers) else None
        settings = load_config(config)
        quantization = uniform_quantization(settings, _SPEC, head=head, embedding=embedding)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        return measure_without_products(random_model(settings, quantization, device, dtype=dtype), batch_sizes, context)
