"""`vq`: each pair takes the nearest point of a 2-D codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PairCoder

_DISTANCES_IN_FLIGHT = {"cpu": 1 << 20, "cuda": 1 << 28}


class VectorCoder(PairCoder):
    """A pair's code is the index of its nearest point; ``codebook``: ``(2**width, 2)``."""

    block = 2

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, pairs: Tensor, codebook: Tensor) -> Tensor:
        points = codebook.to(device=pairs.device, dtype=torch.float32)
        # argmin |x - p|^2 = argmax x.p - |p|^2 / 2
        offsets = points.square().sum(-1) / -2
        in_flight = _DISTANCES_IN_FLIGHT.get(pairs.device.type, _DISTANCES_IN_FLIGHT["cpu"])
        rows = pairs.reshape(-1, 2).split(max(1, in_flight // len(points)))
        codes = [torch.addmm(offsets, chunk, points.T).argmax(dim=1) for chunk in rows]
        return torch.cat(codes).view(pairs.shape[:-1]).to(torch.int32)

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        return codebook.to(device=codes.device, dtype=torch.float32)[codes]
