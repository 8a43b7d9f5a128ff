"""Layers that share one input, run together: its norm and rotation once, each product once.

The stock model's modules stay where they are; `Projections` only looks at what stands in the places of a few of them.
A kernel module wants its input rotated and a reference or stock module wants it plain; layers of one input share the
rotation, so it is made once, in one kernel with what stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cuda.linear import KernelLinear
from ...kernels.linear import FusedSlice


@dataclass(frozen=True)
class _Product:
    """One kernel.

    Attributes:
        run: from the input to the rows of all its layers.
        rotated: whether it wants the input rotated.
        rows: of each of its layers; none where it has just one.
        places: where the result of each layer goes.
    """

    run: Callable[[Tensor], Tensor]
    rotated: bool
    rows: tuple[int, ...]
    places: tuple[int, ...]


class Projections:
    """What stands in the places of layers that share one input.

    Args:
        modules: in the order in which results are wanted: quantized modules, slices of fused ones, stock linears.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        fused: dict[int, list[tuple[int, FusedSlice]]] = {}
        found: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = []
        for place, module in enumerate(modules):
            if isinstance(module, FusedSlice):
                fused.setdefault(id(module.fused_linear), []).append((place, module))
            else:
                found.append((module, (), (place,)))
        for slices in fused.values():
            slices.sort(key=lambda entry: entry[1].index)
            whole = slices[0][1].fused_linear
            if len(slices) != len(whole.rows):  # a pattern that reaches beyond these layers: each slice by itself
                found += [(module, (), (place,)) for place, module in slices]
            else:
                found.append((whole.linear, tuple(whole.rows), tuple(place for place, _ in slices)))
        seeds = {module.rotation_seed for module, *_ in found if isinstance(module, KernelLinear)} - {None}
        self._rotation: tuple[Tensor, list[Tensor]] | None = None
        self._products = []
        for module, rows, places in found:
            run: Callable[[Tensor], Tensor] = module
            rotated = False
            if isinstance(module, KernelLinear) and module.rotation is not None and len(seeds) == 1:
                self._rotation, rotated, run = module.rotation, True, module.product
            self._products.append(_Product(run, rotated, rows, places))
        self._wants_plain = any(not product.rotated for product in self._products)
        self._count = len(modules)

    def normed(self, x: Tensor, residual: Tensor | None, norm: nn.Module) -> tuple[list[Tensor], Tensor]:
        """The layers of ``norm(x + residual)``, and that sum; without a residual, of ``norm(x)``, and `x`.

        Args:
            x, residual: ``(batch, in_features)``.
            norm: the stock model's RMS norm.
        """
        untyped: Any = norm
        weight, epsilon = untyped.weight, untyped.variance_epsilon
        rotated, total = None, x
        if self._rotation is None:
            total = x if residual is None else x + residual
        elif residual is None:
            rotated = torch.ops.msq.rotate_normed(x, weight, epsilon, *self._rotation)
        else:
            rotated, total = torch.ops.msq.rotate_added(x, residual, weight, epsilon, *self._rotation)
        plain = F.rms_norm(total, weight.shape, weight, epsilon) if self._wants_plain else None
        return self._run(rotated, plain), total

    def gated(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        """The layers of ``silu(gate) * up``, ``(batch, in_features)`` each."""
        rotated = None if self._rotation is None else torch.ops.msq.rotate_gated(gate, up, *self._rotation)
        return self._run(rotated, F.silu(gate) * up if self._wants_plain else None)

    def plain(self, x: Tensor) -> list[Tensor]:
        """The layers of `x`, ``(batch, in_features)``."""
        return self._run(None if self._rotation is None else torch.ops.msq.rotate(x, *self._rotation), x)

    def _run(self, rotated: Tensor | None, plain: Tensor | None) -> list[Tensor]:
        results: list[Any] = [None] * self._count
        for product in self._products:
            y = product.run(rotated if product.rotated else plain)  # type: ignore[arg-type]
            parts = y.split(product.rows, dim=-1) if product.rows else (y,)
            for place, part in zip(product.places, parts, strict=True):
                results[place] = part
        return results
