"""The kernels' layout, read lane by lane as `sources/units.cuh` says, gives the weights of the PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from msq.experiments.kernel_checks import random_weight
from msq.kernels.cuda.layout import from_units, pair_width, plane_bits, prepare, to_units
from msq.kernels.quantize import coders, decode_unit
from msq.kernels.quantizers.trellis import TrellisCoder
from msq.kernels.specs import Family, QuantizerSpec, default_palette, every_quantizer

SPECS = {spec.label: spec for spec in every_quantizer()}
PALETTE = default_palette()


def lane_words(unit: torch.Tensor, width: int) -> list[int]:
    """The `width` words of each lane of a unit, as one number a lane, the first word lowest."""
    octets, start, streams = unit.tolist(), 0, [0] * 32
    done = 0  # bits of each lane so far
    for size in [16] * (width // 4) + [8] * (width >> 1 & 1) + [4] * (width & 1):
        for lane in range(32):
            piece = octets[start + lane * size : start + (lane + 1) * size]
            streams[lane] |= int.from_bytes(bytes(piece), "little") << done
        start, done = start + 32 * size, done + 8 * size
    return streams


def plane_code(words: int, width: int, bits: int, n: int) -> int:
    """Code `n` of a lane whose words are byte planes."""
    octet, byte = divmod(n, 4)
    if octet < width:
        return words >> 32 * octet + 8 * byte & (1 << bits) - 1
    code = 0
    for bit in range(bits):
        word, place = divmod((octet - width) * bits + bit, 8 - bits)
        code |= (words >> 32 * word + 8 * byte + bits + place & 1) << bit
    return code


def half_plane_code(words: int, width: int, n: int) -> int:
    """Code `n` of a lane whose words are half planes: that of pair ``n // 2``, in half ``n % 2`` of a word."""
    bits, (pair, half) = width // 2, divmod(n, 2)
    step = bits if bits <= 5 else 8
    first, in_word = 16 * half, 16 // step
    codes = [[(1 + place * step + bit) % 16 for bit in range(bits)] for place in range(in_word)]
    spare = sorted(set(range(16)).difference(*codes))
    if pair < width * in_word:
        word, place = divmod(pair, in_word)
        places = [(word, bit) for bit in codes[place]]
    else:
        left = (pair - width * in_word) * bits
        places = [(i // len(spare), spare[i % len(spare)]) for i in range(left, left + bits)]
    return sum((words >> 32 * word + first + bit & 1) << i for i, (word, bit) in enumerate(places))


def nibble_code(words: int, bits: int, block: int, quad: int, column: int) -> int:
    """Code of a weight of a quad in a lane whose words are nibbles."""
    own = words >> 32 * bits * block
    if bits == 2:
        return own >> 32 * (quad // 4) + 16 * (quad % 2) + 4 * column + quad % 4 // 2 * 2 & 3
    if quad < 6:
        return own >> 32 * (quad // 2) + 16 * (quad % 2) + 4 * column & 7
    return sum((own >> 32 * bit + 16 * (quad % 2) + 4 * column + 3 & 1) << bit for bit in range(3))


def stream_of_quads(quads: list[tuple[int, int]], width: int) -> int:
    """A lane's stream of pairs from the codes of both pairs of each quad, block by block."""
    stream = 0
    for n, codes in enumerate(quads):
        (block, quad), columns = divmod(n, 8), n % 8 // 2 * 4
        for half, code in enumerate(codes):
            column = columns + 2 * half
            pair = 4 * (column % 8 // 2) + 2 * (column // 8) + quad % 2
            stream |= code << width * (16 * block + pair)
    return stream


def lane_streams(unit: torch.Tensor, width: int, spec: QuantizerSpec) -> list[int]:
    """The codes of each lane's pairs one behind another."""
    streams = lane_words(unit, width)
    if spec.family is Family.INT:
        half = width // 2
        return [sum(half_plane_code(words, width, n) << half * n for n in range(64)) for words in streams]
    if spec.family is Family.NUQ and spec.has_byte_levels:
        half = width // 2
        lanes = [
            [[nibble_code(words, half, n // 8, n % 8, column) for column in range(4)] for n in range(16)]
            for words in streams
        ]
        return [stream_of_quads([(a | b << half, c | d << half) for a, b, c, d in lane], width) for lane in lanes]
    bits = plane_bits(spec, width)
    if bits == 0:
        return streams
    if spec.has_byte_levels:
        octets = [[plane_code(words, width, bits, n) for n in range(16)] for words in streams]
        return [stream_of_quads([(o & (1 << width) - 1, o >> width) for o in lane], width) for lane in octets]
    return [sum(plane_code(words, width, bits, n) << bits * n for n in range(32 * width // bits)) for words in streams]


def decode_lanes(unit: torch.Tensor, width: int, spec: QuantizerSpec, coder, codebook: torch.Tensor) -> torch.Tensor:
    """``(16, 128)``: what the lanes of a warp decode of a unit, put where the multiplications take it to be."""
    streams, run_bits = lane_streams(unit, width, spec), 16 * width
    points = coder.points(codebook, codebook.device) if isinstance(coder, TrellisCoder) else None
    result = torch.full((16, 128), torch.nan)
    for lane, block in ((lane, block) for lane in range(32) for block in range(2)):
        g, t = divmod(lane, 4)
        own, following = (streams[n] >> run_bits * block & (1 << run_bits) - 1 for n in (lane, (lane + 4) % 32))
        circle = own | following << run_bits
        for i in range(16):
            bits = circle >> width * i
            if points is None:
                code = torch.tensor(bits & (1 << width) - 1, dtype=torch.int32)
                pair = coder.decode(code, codebook)
            else:
                pair = points[bits & (1 << coder.state_bits) - 1]
            m, j = divmod(i, 4)
            column = 64 * block + 16 * t + 2 * m + 8 * (j // 2)
            result[g + 8 * (j % 2), column : column + 2] = pair
    return result


@pytest.mark.parametrize(
    "label",
    [
        "int-2",
        "int-3",
        "int-5",
        "int-6",
        "int-7",
        "int-8",
        "nuq-2",
        "nuq-3",
        "nuq-5",
        "vq-1.5",
        "vq-2",
        "vq-2.5",
        "vq-3.5",
        "vq-4",
        "tcq-1.5",
        "tcq-4",
        "tcq-4.5",
        "half-tcq-2.75",
        "half-tcq-3.25",
        "tcq-3-hyb",
        "tcq-4.5-hyb",
        "half-tcq-2.75-hyb",
    ],
)
def test_lanes_decode_what_the_twin_does(label):
    spec = SPECS[label]
    weight = random_weight(spec, 32, 320, torch.device("cpu"))
    prepared, expected, start = prepare(weight), decode_unit(weight), 0
    for units, coder, columns in zip(prepared.units, coders(spec), prepared.segment_columns, strict=True):
        row, last = 1, units.shape[1] - 1
        for unit in {0, last}:
            found = decode_lanes(units[row, unit], coder.width, spec, coder, weight.codebook)
            here = expected[16 * row :, start + 128 * unit : start + min(128 * unit + 128, columns)]
            assert torch.equal(found[:, : here.shape[1]], here)
        start += columns


@pytest.mark.parametrize("spec", PALETTE, ids=lambda spec: spec.label)
def test_the_layout_is_a_permutation(spec):
    weight = random_weight(spec, 48, 288, torch.device("cpu"))
    prepared = prepare(weight)
    for packed, units, rate in zip(weight.packed, prepared.units, spec.rates, strict=True):
        assert units.shape == (3, -(-packed.shape[1] // 8), 128 * pair_width(rate))
        assert torch.equal(from_units(units, packed.shape[1], spec), packed)
    whole = random_weight(spec, 16, 512, torch.device("cpu"))
    assert prepare(whole).size_bytes == whole.size_bytes == spec.size_bytes(16, 512)


def test_bytes_of_plain_streams_move_and_do_not_change():
    packed = torch.randint(256, (2, 8, 16 * 7), dtype=torch.uint8)
    assert torch.equal(to_units(packed, SPECS["tcq-3.5"]).flatten().sort().values, packed.flatten().sort().values)
