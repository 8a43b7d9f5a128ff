"""The packed layout of every quantized weight: 16 x 16 tiles, pairs in fragment order, one bit stream a tile.

A weight ``(out_features, in_features)`` is padded with zeros to multiples of 16 and cut into 16 x 16 tiles.
The 256 weights of a tile are 128 *pairs* of horizontal neighbours, numbered as a warp holds the A operand of
``mma.m16n8k16``: pair ``4 * lane + j`` of lane 0..31 lies

    at row     lane // 4 + 8 * (j % 2)
    at columns 2 * (lane % 4) + 8 * (j // 2), and the next one.

So a lane that reads consecutive pairs holds exactly its registers. Each pair has a code of ``width`` = 2 x bits
bits, and the codes of a tile form one little-endian bit stream: bit ``i`` of the stream is bit ``i % 8`` of byte
``i // 8``, and pair ``p`` owns stream bits ``[p * width, (p + 1) * width)``. A tile takes ``16 * width`` bytes.

Packed tensor: ``(row_tiles, column_tiles, 16 * width)`` uint8. Rows of tiles are independent, so layers that share
an input are fused by concatenating their packed tensors along the first dimension.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import QuantizerError
from .specs import PAIRS_PER_TILE, TILE


@cache
@torch.inference_mode(False)  # whoever asks first, gradients may need it later
def _pair_positions(device: torch.device) -> tuple[Tensor, Tensor]:
    """``order``: flat position in a row-major tile of each weight in pair order, ``(256,)``; and its inverse.

    Kept for each device: nothing can be copied there while a CUDA graph is captured.
    """
    pair = torch.arange(PAIRS_PER_TILE)
    lane, j = pair // 4, pair % 4
    row = lane // 4 + 8 * (j % 2)
    column = 2 * (lane % 4) + 8 * (j // 2)
    first = row * TILE + column
    order = torch.stack([first, first + 1], dim=1).flatten()
    return order.to(device), torch.argsort(order).to(device)


def to_pairs(weight: Tensor) -> Tensor:
    """``(out_features, in_features)`` -> ``(row_tiles, column_tiles, 128, 2)``, zero-padded, in pair order."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2).flatten(2)
    order = _pair_positions(weight.device)[0]
    pairs: Tensor = tiles[..., order].unflatten(2, (PAIRS_PER_TILE, 2))
    return pairs


def from_pairs(pairs: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of `to_pairs`: ``(row_tiles, column_tiles, 128, 2)`` -> ``(out_features, in_features)``."""
    inverse = _pair_positions(pairs.device)[1]
    tiles = pairs.flatten(2)[..., inverse].unflatten(2, (TILE, TILE))
    weight: Tensor = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:out_features, :in_features]
    return weight


def pack(codes: Tensor, width: int) -> Tensor:
    """``(..., 128)`` integer codes below ``2**width`` -> ``(..., 16 * width)`` uint8.

    Raises:
        QuantizerError: a code does not fit its width.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> width):
        raise QuantizerError(
            f"codes of {width} bits must lie in 0..{2**width - 1}; got {int(codes.min())}..{int(codes.max())}."
        )
    shifts = torch.arange(width, device=codes.device, dtype=torch.int32)
    bits = (codes.to(torch.int32).unsqueeze(-1) >> shifts & 1).to(torch.uint8)
    octets = bits.flatten(-2).unflatten(-1, (-1, 8))
    weights = (1 << torch.arange(8, device=codes.device, dtype=torch.int32)).to(torch.uint8)
    packed: Tensor = (octets * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack`: ``(..., 16 * width)`` uint8 -> ``(..., 128)`` int32."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts & 1).flatten(-2).unflatten(-1, (PAIRS_PER_TILE, width))
    places = torch.arange(width, device=packed.device, dtype=torch.int32)
    codes: Tensor = (bits.to(torch.int32) << places).sum(-1, dtype=torch.int32)
    return codes


def sliding_states(codes: Tensor, width: int, state_bits: int) -> Tensor:
    """Trellis states of tail-biting streams.

    State ``t`` is the ``state_bits`` stream bits that start with code ``t``; the stream is a circle, so the last
    states run over into the first codes.

    Args:
        codes: ``(..., 128)`` integers of `width` bits.

    Returns:
        ``(..., 128)`` int32 below ``2**state_bits``.
    """
    codes = codes.to(torch.int32)
    states = codes.clone()
    for step in range(1, -(-state_bits // width)):
        states |= codes.roll(-step, dims=-1) << step * width
    return states.bitwise_and((1 << state_bits) - 1)
