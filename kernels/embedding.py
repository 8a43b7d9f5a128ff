"""Embeddings on quantized weights: the rows of a packed weight, one for each token.

A weight ``(tokens, embedding_dim)`` is packed like that of a linear layer, its rows rotated along the embedding. A
lookup decodes the tokens' rows and turns them back. The packed weight lies in a linear module inside, so that one
weight can serve a model's embedding and its head, where the two are tied: the head then *is* that module.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantize import QuantizedWeight, decode_rows
from .rotation import unrotate


class PackedModule(Protocol):
    """What an embedding asks of the linear module inside it."""

    out_features: int
    in_features: int
    rotation_seed: int | None

    @property
    def weight(self) -> QuantizedWeight: ...


class PackedEmbedding(nn.Module):
    """What all embeddings on packed weights have in common.

    Args:
        linear: holds the weight; its outputs are the tokens, its inputs the embedding.
        dtype: of the rows that it gives.
    """

    def __init__(self, linear: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.dtype = dtype
        packed = self.packed
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features

    @property
    def packed(self) -> PackedModule:
        """The linear module."""
        return cast(PackedModule, self.linear)

    @property
    def weight(self) -> QuantizedWeight:
        """The packed weight."""
        return self.packed.weight


class QuantizedEmbedding(PackedEmbedding):
    """The reference: decodes in plain torch, on any device; the twin of `cuda.embedding.KernelEmbedding`.

    Args:
        linear: a `linear.QuantizedLinear`; where it keeps its decoded weight, rows are taken from that.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """``(...)`` int64 -> ``(..., embedding_dim)``, computed in float32."""
        kept = cast(Tensor | None, self.linear.decoded)
        rows = decode_rows(self.weight, tokens) if kept is None else F.embedding(tokens, kept)
        seed = self.packed.rotation_seed
        return (rows if seed is None else unrotate(rows, seed)).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
