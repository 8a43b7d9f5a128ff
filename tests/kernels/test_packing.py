import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msq.kernels.errors import QuantizerError
from msq.kernels.packing import from_pairs, pack, sliding_states, to_pairs, unpack


@given(st.integers(3, 16), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_pack_and_unpack_are_inverse(width, seed):
    codes = torch.randint(1 << width, (2, 3, 128), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack(codes, width)
    assert packed.shape == (2, 3, 16 * width) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, width), codes)


def test_the_stream_is_little_endian_as_documented():
    codes = torch.zeros(128, dtype=torch.int32)
    codes[0], codes[1] = 0b101, 0b011  # width 5: bits 0..4 and 5..9
    packed = pack(codes, 5)
    assert packed[0] == 0b011_00101 & 0xFF and packed[1] == 0


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(QuantizerError, match=r"0\.\.7"):
        pack(torch.full((128,), 8), 3)


def test_pairs_follow_the_fragment_order_of_mma_m16n8k16():
    weight = torch.arange(256).view(16, 16)
    pairs = to_pairs(weight)[0, 0]
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        places = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
        for j, (r, c) in enumerate(places):
            assert pairs[4 * lane + j].tolist() == [16 * r + c, 16 * r + c + 1]


@pytest.mark.parametrize("shape", [(16, 16), (35, 50), (1, 1), (48, 17)])
def test_tiles_pad_with_zeros_and_come_back(shape):
    weight = torch.randn(shape)
    pairs = to_pairs(weight)
    assert pairs.shape == (-(-shape[0] // 16), -(-shape[1] // 16), 128, 2)
    assert torch.equal(from_pairs(pairs, *shape), weight)
    assert pairs.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize(("width", "state_bits"), [(3, 16), (6, 16), (10, 12), (4, 9)])
def test_states_are_windows_of_the_circular_stream(width, state_bits):
    codes = torch.randint(1 << width, (128,), dtype=torch.int32)
    stream = sum(int(code) << width * t for t, code in enumerate(codes))
    length = 128 * width
    circle = stream | stream << length
    expected = [circle >> width * t & (1 << state_bits) - 1 for t in range(128)]
    assert sliding_states(codes, width, state_bits).tolist() == expected
