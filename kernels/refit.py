"""Row scales and codebooks of least proxy error for codes that stay: linear least squares.

With codes fixed, a layer is ``S U(c)``: row scales S, and U linear in the codebook c. The proxy loss
``tr((W - S U(c)) H (W - S U(c))^T)`` is quadratic in either, so scales have a closed form row by row, and the codebook
solves normal equations of its own size, which conjugate gradients do without forming them. Layers that run as one
kernel share a codebook and are fitted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codebook_map import CodebookMap
from .codebooks import rounded
from .hessian import Hessian
from .quantize import QuantizedWeight, decode, decode_unit, least_squares_scales
from .rotation import rotate

ROUNDS = 2
"""Alternations between codebook and scales."""
_ITERATIONS = 24
"""Of conjugate gradients; fewer where the residual is gone."""
_SOLVED = 1e-8
"""Squared residual, relative to the right side's, at which they stop."""


@dataclass(frozen=True)
class FittedLayer:
    """A layer to fit.

    Attributes:
        original: the weight that was quantized, ``(out_features, in_features)``.
        packed: what became of it.
        hessian: of its inputs, in the basis of the packed codes; None for the identity.
    """

    original: Tensor
    packed: QuantizedWeight
    hessian: Hessian | None = None

    def target(self) -> Tensor:
        """The original in the basis of the codes, ``(out_features, in_features)`` float32."""
        values = self.original.detach().float()
        return values if self.packed.rotation_seed is None else rotate(values, self.packed.rotation_seed)

    def weighted(self, values: Tensor) -> Tensor:
        """``values @ H``."""
        return values if self.hessian is None else values @ self.hessian.matrix.to(values.device)

    def loss(self) -> float:
        """``tr((W - Q) H (W - Q)^T)``."""
        errors = self.target() - decode(self.packed)
        return float((errors * self.weighted(errors)).sum(dtype=torch.float64))


def refit(layers: Sequence[FittedLayer]) -> list[QuantizedWeight]:
    """Fit row scales, and the codebook that the layers share if their quantizer has one.

    Args:
        layers: of one quantizer and one codebook.

    Returns:
        The layers with the same codes; those given where fitting did not lower the sum of their losses.
    """
    if not layers[0].packed.codebook.numel():
        return [layer.packed for layer in layers]  # their scales are those of least squares already
    fitted = list(layers)
    maps = [CodebookMap(layer.packed) for layer in layers]
    for _ in range(ROUNDS):
        table = _codebook(fitted, maps)
        moved = [replace(layer.packed, codebook=table) for layer in fitted]
        fitted = [
            replace(layer, packed=replace(packed, scales=_scales(layer, packed)))
            for layer, packed in zip(fitted, moved, strict=True)
        ]
    before, after = (sum(layer.loss() for layer in group) for group in (layers, fitted))
    return [layer.packed for layer in (fitted if after < before else layers)]


def _scales(layer: FittedLayer, packed: QuantizedWeight) -> Tensor:
    unit = decode_unit(packed)
    return least_squares_scales(layer.target(), unit, layer.weighted(unit))


def _codebook(layers: Sequence[FittedLayer], maps: Sequence[CodebookMap]) -> Tensor:
    """The codebook of least loss for the layers' scales, as it is stored."""
    scales = [layer.packed.scales.float().unsqueeze(1) for layer in layers]
    parts = list(zip(layers, maps, scales, strict=True))

    def normal(table: Tensor) -> Tensor:
        terms = [places.sums(layer.weighted(places.values(table) * scale) * scale) for layer, places, scale in parts]
        return torch.stack(terms).sum(dim=0)

    old = layers[0].packed.codebook.float().flatten()
    right = torch.stack([places.sums(layer.weighted(layer.target()) * scale) for layer, places, scale in parts])
    total = right.sum(dim=0)
    table, residual = old, total - normal(old)
    direction, power = residual, residual.square().sum()
    limit = _SOLVED * float(total.square().sum())
    for _ in range(_ITERATIONS):
        if float(power) <= limit:
            break
        image = normal(direction)
        step = power / (direction * image).sum()
        table, residual = table + step * direction, residual - step * image
        last, power = power, residual.square().sum()
        direction = residual + power / last * direction
    first = layers[0].packed
    return rounded(first.spec, table.view(first.codebook.shape))
