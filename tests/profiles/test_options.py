"""What users type for a palette."""

import pytest
from msq.kernels.errors import QuantizerError
from msq.kernels.specs import default_palette
from msq.profiles.options import parse_palette


def labels(globs, state_bits=16):
    return [spec.label for spec in parse_palette(globs, state_bits)]


def test_without_globs_it_is_the_default_palette():
    assert parse_palette(None, 12) == default_palette(12)


def test_globs_prefer_the_default_palette():
    assert labels("tcq-*") == [f"tcq-{1.5 + i / 2:g}" for i in range(8)]
    assert labels("half-tcq-2.*") == ["half-tcq-2.25", "half-tcq-2.75"]


def test_globs_that_match_nothing_there_reach_all_that_ships():
    assert labels("half-tcq-2.?[27]5") == ["half-tcq-2.125", "half-tcq-2.375", "half-tcq-2.625", "half-tcq-2.875"]
    assert labels("tcq-4-hyb-T*, nuq-3") == ["nuq-3", "tcq-4-hyb-T9", "tcq-4-hyb-T10", "tcq-4-hyb-T12"]
    assert labels("tcq-?-hyb") == [f"tcq-{bits}-hyb" for bits in (2, 3, 4, 5)]
    assert labels("half-tcq-3.25*") == ["half-tcq-3.25"]
    assert labels("tcq-3-1mad,tcq-3") == ["tcq-3", "tcq-3-1mad"]


def test_the_trellis_length_may_be_left_out():
    assert labels("tcq-3", 12) == labels("tcq-3-L12", 12) == ["tcq-3-L12"]
    assert labels("tcq-4-hyb-T9,tcq-2-3inst", 12) == ["tcq-2-3inst-L12", "tcq-4-hyb-L12-T9"]
    assert labels("tcq-4-hyb", 12) == labels("tcq-4-hyb-L12", 12) == ["tcq-4-hyb-L12"]


def test_only_what_is_selected_must_fit_the_trellis_length():
    assert labels("tcq-2,nuq-3,tcq-3-L*", 8) == ["nuq-3", "tcq-2-L8", "tcq-3-L8"]
    with pytest.raises(QuantizerError, match="tcq trellis at 5 bits needs a state of 11 to 16 bits; got 10"):
        parse_palette("tcq-2,tcq-5", 10)


@pytest.mark.parametrize("globs", ["tqc-3", "tcq-2.7", " , "])
def test_globs_that_select_nothing_are_refused(globs):
    with pytest.raises(QuantizerError):
        parse_palette(globs, 16)
