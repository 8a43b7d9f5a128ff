"""A quantized layer whose row scales and codebook take gradients while its codes stay.

Scales change by a factor ``exp(t)``, t the parameter, so that rows of any size learn at one rate and no scale changes
its sign; codebooks, of unit variance, change themselves. Layers that run as one kernel share a codebook parameter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codebook_map import CodebookMap
from .codebooks import rounded
from .quantize import LARGEST_SCALE, QuantizedWeight, decode_unit
from .rotation import rotate


class TunableLinear(nn.Module):
    """``y = x W^T + b`` with W decoded from fixed codes.

    Args:
        weight: the packed layer.
        bias: ``(out_features,)`` or None; takes gradients.
        codebook: shared parameter, ``QuantizerSpec.codebook_shape`` float32; None keeps the codebook as it is.

    Attributes:
        scale_logs: ``(out_features,)`` float32, logarithms of the factors by which row scales have changed.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, codebook: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = weight
        self.scale_logs = nn.Parameter(torch.zeros(weight.out_features, device=weight.scales.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())
        self.codebook = codebook
        if codebook is None:
            self._unit: CodebookMap | Tensor = decode_unit(weight)
        else:
            self._unit = CodebookMap(weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, float32."""
        turned = x.float() if self.packed.rotation_seed is None else rotate(x, self.packed.rotation_seed)
        unit = self._unit if isinstance(self._unit, Tensor) else self._unit.values(self._table())
        scaled = F.linear(turned, unit) * (self.packed.scales.float() * self.scale_logs.exp())
        return scaled if self.bias is None else scaled + self.bias

    def _table(self) -> Tensor:
        assert self.codebook is not None
        return self.codebook

    def tuned(self) -> QuantizedWeight:
        """The layer as it is now, rounded to what is stored."""
        scales = self.packed.scales.float() * self.scale_logs.detach().exp()
        changed = replace(self.packed, scales=scales.clamp(0, LARGEST_SCALE).half())
        return (
            changed
            if self.codebook is None
            else replace(changed, codebook=rounded(changed.spec, self.codebook.detach()))
        )
