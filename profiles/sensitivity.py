"""Sensitivity a_l of every layer: how much the model's output changes per unit of normalised error.

By the linearity theorem (HIGGS, arXiv 2411.17525), dL ~ sum_l a_l * err_l, with the KL divergence to the unchanged
model for L. Two ways to change a layer and measure it are here; `fisher` has the third, which changes nothing.

- Noise, as in Q-Palette (arXiv 2509.20214, section 4): the weight gets Gaussian noise of a small relative size,
  |dW|^2 / |W|^2 = noise^2, and a_l is the KL over noise^2. The noise is symmetric, so its first-order effect averages
  out. Each group of windows draws its own noise. That of an embedding is relative to each token's row.
- Direct: the weight is quantized, and a_l is the KL over the error that was measured.

The standard error is taken over groups of windows. With noise it covers both the tokens and the draws; a quantized
weight is always the same, so for the direct way it covers the tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.quantize import QuantizedWeight, dequantize, normalized_error, quantize
from ..kernels.rotation import input_seed
from ..kernels.specs import QuantizerSpec
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

    def noisy(layer: LayerInfo, group: int) -> Tensor:
        weight = model.get_parameter(f"{layer.name}.weight").detach().float()
        generator = torch.Generator().manual_seed(input_seed(f"{layer.name}:{group}", seed))
        draw = torch.randn(weight.shape, generator=generator).to(weight.device)
        along = 1 if layer.is_embedding else None  # every token's row by itself, as its error will be
        changed: Tensor = (
            weight + noise * weight.norm(dim=along, keepdim=True) / draw.norm(dim=along, keepdim=True) * draw
        )
        return changed

    groups = window_groups(tokens, windows_per_group)
    _measure_changes(model, layers, groups, noisy, journal)
    return {layer.name: estimate(layer, len(groups), noise**2, journal) for layer in layers}


def measure_direct(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    tokens: Tensor,
    *,
    spec: QuantizerSpec,
    seed: int,
    windows_per_group: int,
    journal: Journal,
) -> dict[str, Sensitivity]:
    """Quantize each layer in turn and measure the KL divergence; arguments and errors as `measure_sensitivities`.

    Args:
        spec: the quantizer, data-free.
        seed: of the rotations.
    """
    packed: dict[str, QuantizedWeight] = {}

    def quantized(layer: LayerInfo, _group: int) -> Tensor:
        if layer.name not in packed:
            weight = model.get_parameter(f"{layer.name}.weight").detach()
            packed[layer.name] = quantize(weight, spec, rotation_seed=input_seed(layer.fusion_group, seed))
            if ("direct", layer.name) not in journal:
                journal.add(("direct", layer.name), normalized_error(weight, packed[layer.name]))
        return dequantize(packed[layer.name])

    groups = window_groups(tokens, windows_per_group)
    _measure_changes(model, layers, groups, quantized, journal)
    errors = {layer.name: journal["direct", layer.name] for layer in layers}
    # A layer that the quantizer reproduces exactly, such as an all-zero one, tells nothing and needs nothing.
    return {
        layer.name: estimate(layer, len(groups), errors[layer.name], journal)
        if errors[layer.name]
        else Sensitivity(0.0, 0.0)
        for layer in layers
    }


def window_groups(tokens: Tensor, windows_per_group: int) -> tuple[Tensor, ...]:
    """``(windows, length)`` cut into groups of nearly equal size; two at least: a standard error needs them."""
    return tokens.tensor_split(max(2, -(-len(tokens) // windows_per_group)))


def _measure_changes(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    groups: Sequence[Tensor],
    change: Callable[[LayerInfo, int], Tensor],
    journal: Journal,
) -> None:
    """Journal the KL divergence of every layer and group of windows, nats a token.

    Args:
        change: the other weight of a layer for a group of windows, ``(out_features, in_features)``.
    """
    blockwise = BlockwiseModel(model)
    rows = len(groups) * len(layers)
    with progress("sensitivity", rows, done=journal.count("sensitivity")) as advance:
        for index, group in enumerate(groups):
            missing = [layer for layer in layers if ("sensitivity", layer.name, index) not in journal]
            if not missing:
                continue
            recording = blockwise.record(group.to(next(model.parameters()).device))
            for layer in missing:
                kl = float(blockwise.kl_of_change(recording, layer, change(layer, index)).mean())
                if not np.isfinite(kl):
                    raise ProfileError(
                        f"the KL divergence of a changed {layer.name} is {kl}; expected a finite number."
                    )
                journal.add(("sensitivity", layer.name, index), kl)
                advance()


def estimate(layer: LayerInfo, groups: int, error: float, journal: Journal) -> Sensitivity:
    """Mean and standard error over the groups' journalled rows, each divided by `error`."""
    values = np.array([journal["sensitivity", layer.name, index] for index in range(groups)]) / error
    # A KL divergence is not negative; rounding can make a tiny one so.
    return Sensitivity(max(0.0, float(values.mean())), float(values.std(ddof=1) / np.sqrt(groups)))
