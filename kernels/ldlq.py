"""Adaptive rounding with linear feedback: later columns of a row make up for the errors of earlier ones.

LDLQ of QuIP (arXiv 2307.13304, section 3) in the block form of QuIP# (arXiv 2402.04396, section 4.1), the same as GPTQ
(arXiv 2210.17323) up to the order of columns. With ``H = L D L^T``, L unit lower triangular in blocks, and errors
``E = W - Q``, the proxy loss is ``tr((E L) D (E L)^T)``, and block k of ``E L`` is

    W_k + sum_{j > k} E_j L_jk - Q_k,

so going from the last block to the first, each block encodes its weights plus that feedback of the errors behind it.
A tile column (16 input columns) is encoded at a time; families whose codes stand alone get feedback inside it too.

D falls along the way that errors are fed back: what is encoded last has nothing left to make up for its error, so its
error counts most. A quantizer of two rates therefore goes the other way, from the first columns, which have its low
rate, to the last, which have the high one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .hessian import Hessian
from .packing import from_pairs, to_pairs
from .quantizers.base import PairCoder
from .specs import TILE


def encode_with_feedback(
    unit: Tensor, coders: Sequence[PairCoder], segment_tiles: Sequence[int], codebook: Tensor, hessian: Hessian
) -> list[Tensor]:
    """Codes of a weight whose rows have unit variance, under a Hessian.

    Args:
        unit: ``(out_features, in_features)`` float32.
        coders: one for each segment of columns, low rate first.
        segment_tiles: tile columns of each segment.
        hessian: of the inputs, in the basis of `unit`.

    Returns:
        For each segment ``(row_tiles, tiles, 128)`` int32.
    """
    rows, columns = unit.shape
    ascending = goes_up(coders)
    factor = hessian.factor(coders[0].block, ascending=ascending).to(unit.device)
    weight = F.pad(unit, (0, -columns % TILE, 0, -rows % TILE))
    errors = torch.zeros_like(weight)
    coders_of = [coder for coder, tiles in zip(coders, segment_tiles, strict=True) for _ in range(tiles)]
    codes: list[Tensor] = []
    order = range(len(coders_of)) if ascending else reversed(range(len(coders_of)))
    for tile in order:
        here = slice(tile * TILE, (tile + 1) * TILE)
        done = slice(0, here.start) if ascending else slice(here.stop, None)
        target = weight[:, here] + errors[:, done] @ factor[done, here]
        _feed_back_inside(target, weight[:, here], coders_of[tile], codebook, factor[here, here])
        found = coders_of[tile].encode(to_pairs(target).flatten(0, 1), codebook)
        decoded = from_pairs(coders_of[tile].decode(found, codebook).unsqueeze(1), len(weight), TILE)
        errors[:, here] = weight[:, here] - decoded
        codes.append(found)
    return list(torch.stack(codes if ascending else codes[::-1], dim=1).split(list(segment_tiles), dim=1))


def goes_up(coders: Sequence[PairCoder]) -> bool:
    """Whether errors are fed back from the first columns to the last."""
    return len(coders) > 1


def _feed_back_inside(target: Tensor, weight: Tensor, coder: PairCoder, codebook: Tensor, factor: Tensor) -> None:
    """Adds to the columns of one tile column, ``(rows, 16)``, the feedback from its own later columns, in place.

    Args:
        target: the weights with the feedback from the tile columns behind.
        weight: the weights alone.
        factor: the diagonal block of L for these columns, ``(16, 16)``.
    """
    for first in range(TILE - coder.block, 0, -coder.block):
        last = slice(first, first + coder.block)
        codes = coder.encode(target[:, last].contiguous().view(1, -1, 2), codebook)
        error = weight[:, last] - coder.decode(codes, codebook).reshape(-1, coder.block)
        target[:, :first] += error @ factor[last, :first]
