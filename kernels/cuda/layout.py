"""Packed weights in the order in which the kernels read them: a permutation of bytes, made once when a layer is loaded.

The stored layout (`packing`) numbers a tile's pairs by lane, four a lane. A kernel wants each lane to read long runs of
the bit stream with few aligned loads. So a *unit* of 16 rows x 128 columns, 8 tiles, is dealt out anew: lane 4 g + t
takes pairs ``16 g .. 16 g + 15`` of tile ``t`` and then of tile ``4 + t``, ``2 * width`` bytes each, in all `width`
32-bit words. In memory the lanes' words are interleaved in pieces of 16 bytes a lane, then one of 8 where
``width & 2``, then one of 4 where ``width & 1``. `sources/units.cuh` is the other side of this.

`nuq` of 8 bits a pair and `vq` of at most 8 (`plane_bits`) have each lane's bits in *byte planes*: a code of one pair,
or of a quad where levels are bytes, is to be a byte that one instruction cuts out. Code ``4 i + j`` of a lane is the
low bits of byte ``j`` of word ``i``; the codes left over are spread over the bits above: plane ``n`` of those, one bit
in each of the four bytes, is the ``n % bits``-th of the codes ``4 * (width + n // bits) + j``.

Weights whose levels are bytes (`QuantizerSpec.has_byte_levels`) go by *quads*, four neighbouring columns of a row, a
word of a tensor-core multiplication: quad ``2 c + r`` of a block is columns ``4 c .. 4 c + 3`` of row ``g + 8 r``.
`nuq` of 2 and 3 bits has their codes in *nibbles*, four of them side by side, the first quad's in the low half of a
word: two codes of 2 bits to a nibble, the second one of a quad two further; or one of 3 bits, and the two quads left
over spread over the bits above, bit ``n`` in the block's word ``n``.

`int` has *half planes*: the codes of a pair are to lie at the same bits of a word's halves, so that one instruction
brings both to where they are numbers. Bit 0 of the first code is bit 1 of its half, the others follow in steps of their
bits, of 8 from 6 bits on, around to bit 0; the codes left over take the bits left over, word by word.

No bit is changed and none added, unless the tiles of a row are no multiple of 8: then the last unit is filled up with
zeros, which meet zeros in the input. Each segment of a two-rate quantizer is treated by itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codebooks import check_levels
from ..quantize import QuantizedWeight
from ..specs import TILE, Family, QuantizerSpec

UNIT_TILES = 8
UNIT_COLUMNS = UNIT_TILES * TILE
LARGEST_BYTE_CODE = 8
"""Bits of a pair's code up to which the kernels cut codes out of bytes."""


@dataclass(frozen=True)
class PreparedWeight:
    """A layer as the kernels read it.

    Attributes:
        spec: the quantizer.
        out_features, in_features: multiples of 16 and 32.
        units: per segment ``(row_tiles, units, 128 * width)`` uint8.
        scales: ``(out_features,)`` fp16.
        codebook: ``spec.codebook_shape`` fp16, empty for `int`.
    """

    spec: QuantizerSpec
    out_features: int
    in_features: int
    units: tuple[Tensor, ...]
    scales: Tensor
    codebook: Tensor

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def segment_columns(self) -> tuple[int, ...]:
        """Columns of the weight in each segment."""
        return tuple(TILE * tiles for tiles in self.spec.segment_tiles(self.in_features))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors; more than the spec's own only by the filling of last units."""
        return sum(t.numel() * t.element_size() for t in (*self.units, self.scales, self.codebook))


def pair_width(rate: float) -> int:
    """Bits of a pair's code at a rate in bits per weight."""
    return int(2 * rate)


def _pieces(width: int) -> list[int]:
    """Bytes a lane has in each piece of a unit."""
    return [16] * (width // 4) + [8] * (width >> 1 & 1) + [4] * (width & 1)


def plane_bits(spec: QuantizerSpec, width: int) -> int:
    """Bits of the codes that lie in byte planes; 0 where they don't."""
    if spec.has_trellis or spec.family is Family.INT or width > LARGEST_BYTE_CODE or in_nibbles(spec):
        return 0
    return 2 * width if spec.has_byte_levels else width


def in_nibbles(spec: QuantizerSpec) -> bool:
    """Whether codes lie in nibbles, to choose among the levels of a register: these need no table."""
    return spec.family is Family.NUQ and spec.has_byte_levels


@cache
def _plane_order(bits: int, width: int) -> Tensor:
    """For each bit of a lane's words in byte planes, which bit of the plain stream it is: ``(32 * width,)``."""
    word, byte, bit = torch.meshgrid(torch.arange(width), torch.arange(4), torch.arange(8), indexing="ij")
    plane = word * (8 - bits) + bit - bits
    octet = torch.where(bit < bits, word, width + plane // bits)
    return ((4 * octet + byte) * bits + torch.where(bit < bits, bit, plane % bits)).flatten()


@cache
def _half_plane_order(bits: int) -> Tensor:
    """The same for half planes, of codes of `bits` bits: ``(64 * bits,)``."""
    step, words = bits if bits <= 5 else 8, 2 * bits
    direct = [(1 + place * step + bit) % 16 for place in range(16 // step) for bit in range(bits)]
    spare = sorted(set(range(16)) - set(direct))
    places = [(word, bit) for word in range(words) for bit in direct]
    places += [(word, bit) for word in range(words) for bit in spare]
    order = torch.empty(32 * words, dtype=torch.int64)
    for n, (word, bit) in enumerate(places):
        pair, of_code = divmod(n, bits)
        for half in range(2):
            order[32 * word + 16 * half + bit] = (2 * pair + half) * bits + of_code
    return order


@cache
def _quad_order(width: int) -> Tensor:
    """For each bit of a lane's stream of quads, which bit of the plain stream it is: ``(32 * width,)``."""
    block, c, r, half, bit = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 2, 2, width)), indexing="ij")
    pair = 4 * (2 * (c % 2) + half) + 2 * (c // 2) + r
    return ((16 * block + pair) * width + bit).flatten()


@cache
def _nibble_order(bits: int) -> Tensor:
    """For each bit of a lane's words in nibbles, which bit of the stream of quads it is: ``(64 * bits,)``."""
    order = torch.empty(64 * bits, dtype=torch.int64)
    for block, quad, column, bit in itertools.product(range(2), range(8), range(4), range(bits)):
        if bits == 2:
            word, half, place = quad // 4, quad % 2, 2 * (quad % 4 // 2) + bit
        elif quad < 6:
            word, half, place = quad // 2, quad % 2, bit
        else:
            word, half, place = bit, quad % 2, 3
        order[32 * (bits * block + word) + 16 * half + 4 * column + place] = (
            (8 * block + quad) * 4 + column
        ) * bits + bit
    return order


@cache
def _lane_order(spec: QuantizerSpec, width: int) -> Tensor | None:
    """Which bit of the plain stream each bit of a lane's words is; None where they are in that order."""
    if spec.family is Family.INT:
        return _half_plane_order(width // 2)
    if in_nibbles(spec):
        return _quad_order(width)[_nibble_order(width // 2)]
    bits = plane_bits(spec, width)
    if not bits:
        return None
    planes = _plane_order(bits, width)
    return _quad_order(width)[planes] if spec.has_byte_levels else planes


def _reorder_bits(lanes: Tensor, order: Tensor) -> Tensor:
    """Bit ``i`` of the result is bit ``order[i]`` of `lanes` ``(..., bytes)`` uint8, row of tiles by row of tiles."""
    places = torch.arange(8, dtype=torch.uint8, device=lanes.device)
    values = (1 << torch.arange(8, device=lanes.device)).to(torch.uint8)
    order = order.to(lanes.device)
    out = torch.empty_like(lanes)
    for row, octets in enumerate(lanes):
        bits = (octets.unsqueeze(-1) >> places & 1).flatten(-2)[..., order]
        out[row] = (bits.unflatten(-1, (-1, 8)) * values).sum(-1, dtype=torch.uint8)
    return out


def to_units(packed: Tensor, spec: QuantizerSpec) -> Tensor:
    """``(row_tiles, column_tiles, 16 * width)`` -> ``(row_tiles, units, 128 * width)``, both uint8."""
    width = packed.shape[-1] // 16
    padded = F.pad(packed, (0, 0, 0, -packed.shape[1] % UNIT_TILES))
    dealt = padded.unflatten(1, (-1, 2, 4)).unflatten(4, (8, 2 * width))  # row, unit, block, t, g, bytes
    lanes = dealt.permute(0, 1, 4, 3, 2, 5).flatten(4).flatten(2, 3)  # row, unit, lane, 4 * width bytes
    order = _lane_order(spec, width)
    if order is not None:
        lanes = _reorder_bits(lanes, order)
    return torch.cat([piece.flatten(2) for piece in lanes.split(_pieces(width), dim=3)], dim=2)


def from_units(units: Tensor, column_tiles: int, spec: QuantizerSpec) -> Tensor:
    """Inverse of `to_units`: ``(row_tiles, units, 128 * width)`` -> ``(row_tiles, column_tiles, 16 * width)``."""
    width = units.shape[-1] // 128
    sizes = _pieces(width)
    parts = units.split([32 * size for size in sizes], dim=2)
    lanes = torch.cat([part.unflatten(2, (32, size)) for part, size in zip(parts, sizes, strict=True)], dim=3)
    order = _lane_order(spec, width)
    if order is not None:
        lanes = _reorder_bits(lanes, torch.argsort(order))
    dealt = lanes.unflatten(2, (8, 4)).unflatten(4, (2, 2 * width))  # row, unit, g, t, block, bytes
    tiles: Tensor = dealt.permute(0, 1, 4, 3, 2, 5).flatten(4).flatten(1, 3)
    return tiles[:, :column_tiles].contiguous()


def prepare(weight: QuantizedWeight) -> PreparedWeight:
    """A layer for the kernels, on the device of its tensors; `decode.unsupported_reason` says which layers fit.

    Raises:
        QuantizerError: the codebook isn't one that the kernels can read.
    """
    check_levels(weight.spec, weight.codebook)
    return PreparedWeight(
        weight.spec,
        weight.out_features,
        weight.in_features,
        tuple(to_units(part, weight.spec) for part in weight.packed),
        weight.scales.contiguous(),
        weight.codebook.clone(memory_format=torch.contiguous_format),  # its own memory, aligned as kernels read it
    )


def restore(weight: PreparedWeight, rotation_seed: int | None = None) -> QuantizedWeight:
    """Inverse of `prepare`; the seed of its rotation, which the kernels need not know, is the caller's to give."""
    tiles = weight.spec.segment_tiles(weight.in_features)
    packed = tuple(from_units(part, count, weight.spec) for part, count in zip(weight.units, tiles, strict=True))
    shape = (weight.out_features, weight.in_features)
    return QuantizedWeight(weight.spec, *shape, rotation_seed, packed, weight.scales, weight.codebook)
