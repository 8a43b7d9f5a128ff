"""Which codebook entry every decoded weight takes, so that codebooks can be changed under codes that stay.

A decoded weight is an entry's coordinate, for HYB with a sign: ``unit[r, c] = sign[r, c] * codebook[index[r, c]]``,
linear in the codebook. `CodebookMap` holds index and sign, and has the adjoint: sums over all weights of an entry. They
go over weights sorted by entry, so they repeat bit for bit on a GPU, where scattered additions don't.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .quantize import QuantizedWeight, decode_unit


class CodebookMap:
    """Entry and sign of every weight of a layer.

    Args:
        weight: a layer whose quantizer has a codebook.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        entries = weight.codebook.numel()
        numbers = torch.arange(1, entries + 1, device=weight.scales.device, dtype=torch.float32)
        found = decode_unit(replace(weight, codebook=numbers.view(weight.codebook.shape)))
        self.sign = found.sign().to(torch.int8)
        self.index = found.abs().to(torch.int32) - 1
        flat = self.index.flatten()
        self._order = flat.argsort(stable=True).to(torch.int32)
        self._counts = torch.bincount(flat, minlength=entries)

    def values(self, codebook: Tensor) -> Tensor:
        """The decoded codes before the row scale, ``(out_features, in_features)`` in the codebook's dtype.

        Args:
            codebook: ``QuantizerSpec.codebook_shape``; gradients flow to it.
        """
        values: Tensor = _Lookup.apply(codebook.flatten(), self)  # type: ignore[no-untyped-call]
        return values

    def sums(self, values: Tensor) -> Tensor:
        """Adjoint of `values`: for every entry the signed sum over its weights.

        Args:
            values: ``(out_features, in_features)``.

        Returns:
            ``(entries * dimension,)``.
        """
        by_entry = (values * self.sign).flatten()[self._order]
        return torch.segment_reduce(by_entry, "sum", lengths=self._counts, unsafe=True)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, places: CodebookMap) -> Tensor:
        ctx.places = places
        return codebook[places.index] * places.sign

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.places.sums(gradients[0]), None
