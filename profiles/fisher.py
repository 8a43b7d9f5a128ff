"""Sensitivity of all layers from one backward pass for each group of windows.

To second order the KL divergence of a small change dw is half ``dw^T F dw`` with F the Fisher information, which for a
softmax output is the Gauss-Newton matrix. Its trace over a layer is the expected squared norm of the gradient of
``log p(y | x)`` with labels y drawn from the model itself, not from the text. Labels of different tokens are
independent given the input and scores are zero on average, so the gradient of the sum over all tokens of a group, one
backward pass, gives an unbiased estimate of the sum of their traces. Errors of a rotated weight know no direction, so

    KL per token ~ a_l * |dW|^2 / |W|^2,     a_l = 1/2 * (trace of F_l per token) * |W|^2 / (out * in).

Rows of an embedding are taken one by one, each with its own norm: most tokens are rare, some not there at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.rotation import input_seed
from .errors import ProfileError
from .inventory import LayerInfo
from .journal import Journal
from .model_config import EMBEDDING, HEAD_WEIGHT
from .progress import progress
from .schema import HEAD
from .sensitivity import Sensitivity, estimate, window_groups


def measure_fisher(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    tokens: Tensor,
    *,
    seed: int,
    windows_per_group: int,
    journal: Journal,
) -> dict[str, Sensitivity]:
    """One backward pass for each group of windows; groups already in the journal are not measured again.

    Args:
        model: the stock model; unchanged when this returns, but for a tied head that is among the layers without the
            embedding: it gets a weight of its own.
        tokens: ``(windows, length)`` int64, at least two windows; cut into groups of nearly equal size.
        seed: of the labels.
        windows_per_group: windows that are in memory together.

    Raises:
        ProfileError: a gradient is not finite.
    """
    if any(
        layer.name == HEAD and layer.stored_as == EMBEDDING for layer in layers
    ):  # else its gradient would be the embedding's too
        head = model.get_submodule(HEAD)
        head.weight = nn.Parameter(model.get_parameter(HEAD_WEIGHT).detach().clone())
    weights = [cast(Tensor, model.get_parameter(f"{layer.name}.weight")) for layer in layers]
    device = weights[0].device
    groups = window_groups(tokens, windows_per_group)
    done = sum(("sensitivity", layers[-1].name, index) in journal for index in range(len(groups)))
    with progress("sensitivity", len(groups), done=done) as advance:
        for index, group in enumerate(groups):
            missing = [layer for layer in layers if ("sensitivity", layer.name, index) not in journal]
            if not missing:
                continue
            with torch.enable_grad():
                scores = F.log_softmax(model(group.to(device), use_cache=False).logits.float(), dim=-1).flatten(0, 1)
                generator = torch.Generator(device).manual_seed(input_seed(f"labels:{index}", seed))
                labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
                gradients = torch.autograd.grad(scores.gather(1, labels).sum(), weights)
            for layer, weight, gradient in zip(layers, weights, gradients, strict=True):
                along = (1,) if layer.is_embedding else (0, 1)
                power = weight.detach().float().square().mean(dim=along, dtype=torch.float64)
                trace = gradient.float().square().sum(dim=along, dtype=torch.float64) / group.numel()
                value = float((trace * power).sum()) / 2
                if not np.isfinite(value):
                    raise ProfileError(
                        f"the gradient of {layer.name} gives a sensitivity of {value}; expected a finite number: use "
                        "--loss data-free or calibration."
                    )
                if layer in missing:
                    journal.add(("sensitivity", layer.name, index), value)
            advance()
    return {layer.name: estimate(layer, len(groups), 1.0, journal) for layer in layers}
