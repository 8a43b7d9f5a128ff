"""Large weights in pieces of rows, so that the memory quantization takes does not grow with the layer.

Rows are encoded alone, whatever the family and with or without a Hessian, and a piece holds whole tiles, so joining the
pieces' packed tensors gives the layer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from .errors import QuantizerError
from .quantize import QuantizedWeight
from .specs import TILE

_CHUNK_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights that are quantized together; quantization takes some 50 bytes for each."""


def row_chunks(out_features: int, in_features: int, device_type: str) -> tuple[slice, ...]:
    """Rows to quantize together, of nearly equal counts; all but the last chunk hold whole tiles."""
    limit = _CHUNK_WEIGHTS.get(device_type, _CHUNK_WEIGHTS["cpu"])
    row_tiles = -(-out_features // TILE)
    pieces = min(row_tiles, -(-out_features * in_features // limit))
    edges = [row_tiles * piece // pieces * TILE for piece in range(pieces)] + [out_features]
    return tuple(slice(first, last) for first, last in pairwise(edges))


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The layer whose row chunks these are, in order.

    Raises:
        QuantizerError: the chunks differ in quantizer, width, rotation or codebook.
    """
    first = parts[0]
    for part in parts[1:]:
        own, other = ((weight.spec, weight.in_features, weight.rotation_seed) for weight in (first, part))
        if own != other or not torch.equal(first.codebook, part.codebook):
            raise QuantizerError(f"expected row chunks of one layer, quantized alike; got {own} and {other}.")
    if len(parts) == 1:
        return first
    packed = tuple(torch.cat(segment) for segment in zip(*(part.packed for part in parts), strict=True))
    scales = torch.cat([part.scales for part in parts])
    return QuantizedWeight(
        first.spec, len(scales), first.in_features, first.rotation_seed, packed, scales, first.codebook
    )


def join_errors(errors: Sequence[float], powers: Sequence[float]) -> float:
    """The normalised error of a layer from those of its row chunks.

    Args:
        powers: ``|W|^2`` of each chunk.
    """
    if len(errors) == 1:
        return errors[0]
    total = math.fsum(powers)
    return math.fsum(error * power for error, power in zip(errors, powers, strict=True)) / total if total else 0.0
