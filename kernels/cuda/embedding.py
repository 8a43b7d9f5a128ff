"""The embedding that runs on the kernels: look the tokens' rows up, turn them back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedding import PackedEmbedding
from . import embedding_ops  # noqa: F401 (registers its operators)
from .linear import KernelLinear
from .rotation_plan import rotation_tables


class KernelEmbedding(PackedEmbedding):
    """Rows of a packed weight on CUDA kernels; on a CPU, on the operators' twins.

    Args:
        linear: holds the weight, ``(num_embeddings, embedding_dim)``; the head's module where the two are tied.
        dtype: of the rows that it gives: fp16, bf16 or fp32.
    """

    linear: KernelLinear

    def __init__(self, linear: KernelLinear, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype)
        self._table_names: list[str] = []
        if linear.rotation_seed is not None:
            tables = rotation_tables(linear.in_features, linear.rotation_seed, linear.scales.device, inverse=True)
            for n, table in enumerate(tables.matrices):
                self.register_buffer(f"inverse_{n}", table, persistent=False)
                self._table_names.append(f"inverse_{n}")

    def forward(self, tokens: Tensor) -> Tensor:
        """``(...)`` int64 -> ``(..., embedding_dim)``; fp32 inside, rounded once."""
        linear, rotation = self.linear, self.linear.rotation
        spec, between = linear.spec, self.dtype if rotation is None else torch.float32
        rows: Tensor = torch.ops.msq.lookup(
            tokens,
            linear.units,
            linear.scales,
            linear.codebook,
            linear.in_features,
            between,
            str(spec.family),
            spec.bits,
            spec.state_bits,
        )
        if rotation is None:
            return rows
        inverse = [getattr(self, name) for name in self._table_names]
        turned: Tensor = torch.ops.msq.unrotate(rows, rotation[0], inverse, self.dtype)
        return turned
