"""What trellis states stand for, against QTIP's own arithmetic; and the codes' way through encode and decode."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from msq.kernels.codebooks import gaussian_error
from msq.kernels.errors import QuantizerError
from msq.kernels.mad import LARGEST_WIDTH, mad_code
from msq.kernels.quantize import (
    coders,
    decode,
    from_tensors,
    normalized_error,
    packed_names,
    quantize,
    tensor_shapes,
)
from msq.kernels.quantizers.codes import one_mad_values, state_points, three_inst_values
from msq.kernels.quantizers.viterbi import viterbi_encode
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode

SINGLE_WEIGHTS = [TrellisCode.ONE_MAD, TrellisCode.THREE_INST]
WITHOUT_TABLE = [
    *(QuantizerSpec(Family.TCQ, bits, 11, code=code) for code in SINGLE_WEIGHTS for bits in (2, 4)),
    *(QuantizerSpec(Family.TCQ, bits, 11) for bits in (1.5, 2, 3.5, 5)),
    QuantizerSpec(Family.HALF_TCQ, 3.25, 11),
]


def test_one_mad_sums_the_bytes_of_a_hash():
    values = one_mad_values(16)
    for state in (0, 1, 255, 40000, 65535):
        hashed = (34038481 * state + 76625530) % 2**32
        assert float(values[state]) == pytest.approx((sum(hashed.to_bytes(4, "little")) - 510) / 147.800537109375)
    assert float(values.mean()) == pytest.approx(0, abs=0.01) and float(values.std()) == pytest.approx(1, abs=0.01)


def test_three_inst_adds_two_halves():
    values = three_inst_values(16)
    for state in (0, 1, 255, 40000, 65535):
        word = (89226354 * state + 64248484) % 2**32 & 0x8FFF8FFF ^ 0x3B603B60
        low, high = np.array([word], dtype=np.uint32).view(np.float16)
        assert float(values[state]) == float(np.float16(np.float32(low) + np.float32(high)))
    assert float(values.mean()) == pytest.approx(0, abs=0.02) and 0.8 < float(values.std()) < 1.4


def mad_values(width: int, state: int) -> tuple[float, float]:
    """A state's pair, byte by byte."""
    code, first, second = mad_code(width), 0.0, 0.0
    for multiplier, addend in zip(code.multipliers, code.addends, strict=True):
        hashed = ((multiplier * state + addend) % 2**32).to_bytes(4, "little")
        q0, q1, q2, q3 = (byte - 256 if byte > 127 else byte for byte in hashed)
        first += q3 + 0.75 * (q2 - q0)
        second += q1 + 0.75 * (q2 + q0)
    return code.gain * first, code.gain * second


@pytest.mark.parametrize("width", range(3, LARGEST_WIDTH + 1))
def test_mad_takes_the_bytes_of_its_hashes_along_four_directions(width):
    points = state_points(torch.empty(0, 1), 16, TrellisCode.MAD, width)
    for state in (0, 1, 255, 40000, 65535):
        assert points[state].tolist() == [float(np.float32(value)) for value in mad_values(width, state)]
    assert points.shape == (65536, 2) and float(points.mean(0).abs().max()) < 0.02
    deviations, correlation = points.std(0), float(torch.corrcoef(points.T)[0, 1])
    assert deviations.tolist() == pytest.approx([mad_code(width).deviation] * 2, rel=0.02) and abs(correlation) < 0.03


@pytest.mark.parametrize("width", range(3, LARGEST_WIDTH + 1))
def test_a_search_among_points_in_fp16_finds_the_same_before_their_gain(width):
    """As the kernel searches."""
    (coder,) = coders(QuantizerSpec(Family.TCQ, width / 2, 12))
    points = coder.points(torch.empty(0, 1), torch.device("cpu"))
    halves = (points / coder.gain).half().float()
    assert torch.allclose(halves * coder.gain, points, rtol=2e-7 if len(mad_code(width).multipliers) == 1 else 5e-4)
    pairs = torch.randn(8, 128, 2, generator=torch.Generator().manual_seed(width))
    found = viterbi_encode(pairs / coder.gain, halves, width)
    assert torch.equal(found, coder.encode(pairs, torch.empty(0, 1)))


def test_states_and_their_mirror_images_share_a_hash_at_16_bits():
    points = state_points(torch.randn(512, 2), 16)
    assert torch.equal(points, points.flip(0))
    shorter = state_points(torch.randn(512, 2), 12)
    assert not torch.equal(shorter, shorter.flip(0))


@pytest.mark.parametrize("code", SINGLE_WEIGHTS)
@pytest.mark.parametrize("bits", [2, 3])
def test_a_state_of_one_weight_is_the_window_that_begins_with_its_bits(code, bits):
    """Decoded weight w is the value of the 11 stream bits from bit w * bits on; the packed stream is that of `tcq`."""
    spec = QuantizerSpec(Family.TCQ, bits, 11, code=code)
    (coder,) = coders(spec)
    codes = torch.randint(1 << coder.width, (1, 128), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    decoded = coder.decode(codes, torch.empty(0, 1)).flatten()
    stream = sum(int(c) << i * coder.width for i, c in enumerate(codes[0]))
    circle = stream | stream << 256 * bits
    values = state_points(torch.empty(0, 1), 11, code, coder.width).flatten()
    expected = [float(values[circle >> bits * w & 0x7FF]) for w in range(256)]
    assert decoded.tolist() == expected


@pytest.mark.parametrize("spec", WITHOUT_TABLE, ids=lambda spec: spec.label)
def test_codes_without_a_table_store_codes_and_scales_alone(spec):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, spec, rotation_seed=3)
    stored = dict(quantized.tensors())
    assert set(stored) == {*packed_names(spec), "scales"} == set(tensor_shapes(spec, 32, 64))
    assert quantized.size_bytes == spec.size_bytes(32, 64)
    assert torch.equal(decode(from_tensors(spec, 32, 64, 3, stored)), decode(quantized))
    recorded = gaussian_error(replace(spec, state_bits=12))
    assert recorded is not None
    assert normalized_error(weight, quantized) < 1.6 * recorded


def test_a_table_of_all_states_is_read_at_the_state():
    spec = QuantizerSpec(Family.TCQ, 2, 9, code=TrellisCode.LUT)
    table = torch.randn(512, 2, generator=torch.Generator().manual_seed(1)).half()
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    with pytest.raises(QuantizerError, match="tcq-2-lut-L9 ships no table"):
        quantize(weight, spec, rotation_seed=0)
    quantized = quantize(weight, spec, rotation_seed=0, codebook=table)
    assert normalized_error(weight, quantized) < 0.12
    (coder,) = coders(spec)
    codes = torch.arange(128, dtype=torch.int32).unsqueeze(0) % 16
    stream = [int(codes[0, t] | codes[0, (t + 1) % 128] << 4 | codes[0, (t + 2) % 128] << 8) & 511 for t in range(128)]
    assert torch.equal(coder.decode(codes, table)[0], table[stream].float())
