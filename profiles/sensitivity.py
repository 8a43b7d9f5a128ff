"""Sensitivity a_l of every layer: how much the model's output changes per unit of normalised error.

By the linearity theorem (HIGGS, arXiv 2411.17525), dL ~ sum_l a_l * err_l. As in Q-Palette (arXiv 2509.20214, section
4), a layer's weight gets Gaussian noise of a small relative size, |dW|^2 / |W|^2 = noise^2, and a_l is the KL
divergence to the unchanged model over noise^2. The noise is symmetric, so its first-order effect averages out. Each
group of windows draws its own noise; the standard error is taken over these groups and so covers both the tokens and
the draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.rotation import input_seed
from .blockwise import BlockwiseModel
from .errors import ProfileError
from .inventory import LayerInfo
from .journal import Journal
from .progress import progress


@dataclass(frozen=True)
class Sensitivity:
    """A layer's estimate.

    Attributes:
        value: a_l, nats of KL per unit of normalised error.
        standard_error: of `value`, over groups of windows.
    """

    value: float
    standard_error: float


def measure_sensitivities(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    tokens: Tensor,
    *,
    noise: float,
    seed: int,
    windows_per_group: int,
    journal: Journal,
) -> dict[str, Sensitivity]:
    """Perturb each layer in turn and measure the KL divergence; rows already in the journal are not measured again.

    Args:
        model: the stock model; unchanged when this returns.
        layers: what to perturb.
        tokens: ``(windows, length)`` int64, at least two windows; cut into groups of nearly equal size.
        noise: relative size of the perturbation, |dW| / |W|.
        windows_per_group: windows that share a noise draw and are in memory together.

    Raises:
        ProfileError: a KL divergence is not finite.
    """
    count = max(2, -(-len(tokens) // windows_per_group))  # two groups at least: a standard error needs them
    groups = tokens.tensor_split(count)
    blockwise = BlockwiseModel(model)
    rows = len(groups) * len(layers)
    with progress("sensitivity", rows, done=journal.count("sensitivity")) as advance:
        for index, group in enumerate(groups):
            missing = [layer for layer in layers if ("sensitivity", layer.name, index) not in journal]
            if not missing:
                continue
            recording = blockwise.record(group.to(next(model.parameters()).device))
            for layer in missing:
                with _perturbed(
                    model.get_parameter(f"{layer.name}.weight"), noise, input_seed(f"{layer.name}:{index}", seed)
                ):
                    changed = blockwise.resume(recording, layer.block)
                kl = float(blockwise.kl_per_window(recording, changed).mean())
                if not np.isfinite(kl):
                    raise ProfileError(f"the KL divergence of a noisy {layer.name} is {kl}; expected a finite number.")
                journal.add(("sensitivity", layer.name, index), kl)
                advance()
    return {layer.name: _estimate(layer, len(groups), noise, journal) for layer in layers}


def _estimate(layer: LayerInfo, groups: int, noise: float, journal: Journal) -> Sensitivity:
    values = np.array([journal["sensitivity", layer.name, index] for index in range(groups)]) / noise**2
    # A KL divergence is not negative; rounding can make a tiny one so.
    return Sensitivity(max(0.0, float(values.mean())), float(values.std(ddof=1) / np.sqrt(groups)))


class _perturbed:  # noqa: N801 (a context manager, used as a verb)
    """Adds seeded noise to a weight inside a `with` block and puts the original back."""

    def __init__(self, weight: Tensor, noise: float, seed: int) -> None:
        self.weight = weight
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(weight.shape, generator=generator).to(weight.device)
        scale = noise * weight.detach().float().norm() / draw.norm()
        self.noisy = (weight.detach().float() + scale * draw).to(weight.dtype)

    def __enter__(self) -> None:
        self.original = self.weight.data
        self.weight.data = self.noisy

    def __exit__(self, *_: object) -> None:
        self.weight.data = self.original
