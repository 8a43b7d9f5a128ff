"""The overhead of a decoding step as this executor runs it, for profiles: what a step takes beside its products.

Only shapes matter, so the model is one of random packed weights. On a GPU its whole step is timed, and its products by
themselves, back to back as the rows of a profile are; the overhead is what the step takes more. Without products, the
kernels between them would find room to start early that a model doesn't give them: steps of Llama-3.1-8B on an H200
take 3 to 8% more than their rows and such a step together. Elsewhere nothing overlaps; there the products, which would
take long, are left out of the step that is timed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ...kernels.specs import Family, QuantizerSpec
from ...profiles.inventory import LayerInfo
from ...profiles.journal import JOURNAL_FILE, Journal
from ...profiles.latency import measure_latency, monitored
from ...profiles.models import load_config
from ...profiles.schema import WITHOUT_PRODUCTS
from ...profiles.timing import timer_for
from .benchmark import measure_step, measure_without_products
from .manifest import QuantizationConfig
from .random_model import random_model, uniform_quantization

_SPEC = QuantizerSpec(Family.NUQ, 2)
"""The smallest weights, so that the model fits wherever one of a plan does."""


class ExecutorOverhead:
    """Measures overheads for `profiles.job` and `profiles.latency_job`."""

    methods: Mapping[str, str] = {"cpu": WITHOUT_PRODUCTS, "cuda": "decoding step less its products"}

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
        if device.type != "cuda":
            model = random_model(settings, quantization, device, dtype=torch.float32)
            return measure_without_products(model, batch_sizes, context)
        products = products_us(quantization, layers, batch_sizes, device, torch.float16)
        model = random_model(settings, quantization, device, dtype=torch.float16)
        return less_products(model, products, context)


def less_products(model: nn.Module, products: dict[int, float], context: int) -> dict[int, float]:
    """µs that a step takes more than its products by themselves, by batch size; for less 0, and a warning."""
    found = {}
    for batch, us in products.items():
        found[batch] = measure_step(model, batch, context).step_us - us
        if found[batch] < 0:
            warnings.warn(
                f"at batch size {batch} a step took {-found[batch]:.1f} us less than its products by themselves; its "
                "overhead is taken for 0: profile again if something else ran on the GPU.",
                stacklevel=2,
            )
    return {batch: max(us, 0.0) for batch, us in found.items()}


def products_us(
    quantization: QuantizationConfig,
    layers: Sequence[LayerInfo],
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, float]:
    """µs of a model's products and lookups, each measured as a row of a profile, by batch size.

    Args:
        quantization: of all `layers`, with one quantizer.
        dtype: of the activations.
    """
    (quantizer,) = quantization.quantizers.values()
    with (
        TemporaryDirectory() as directory,
        Journal(Path(directory) / JOURNAL_FILE, {}) as journal,
        monitored(device) as monitor,
    ):
        rows = measure_latency(
            layers,
            (quantizer.spec(),),
            batch_sizes=batch_sizes,
            device=device,
            dtype=dtype,
            timer=timer_for(device),
            journal=journal,
            monitor=monitor,
        )
    times: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row.shape.pattern, row.batch_size)
        times[key] = min(times.get(key, math.inf), row.latency_us)
    roles = {layer.name: layer.role for layer in layers}
    names = ["+".join(roles[path] for path in pattern) for pattern in quantization.patterns()]
    return {batch: sum(times[name, batch] for name in names) for batch in batch_sizes}
