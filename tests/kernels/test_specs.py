import pytest
from msq.kernels.errors import QuantizerError
from msq.kernels.specs import (
    Family,
    QuantizerSpec,
    TrellisCode,
    default_palette,
    every_quantizer,
    match_labels,
    table_bits_of,
)


def test_the_palette_holds_what_the_design_lists():
    labels = [spec.label for spec in default_palette()]
    assert len(labels) == len(set(labels)) == 7 + 7 + 10 + 8 + 7
    assert {"int-4", "nuq-8", "vq-1.5", "vq-6", "tcq-1.5", "tcq-5", "half-tcq-1.75", "half-tcq-4.75"} <= set(labels)


def test_tables_grow_with_the_rate():
    sizes = {spec.label: spec.table_bytes for spec in default_palette()}
    sizes |= {spec.label: spec.table_bytes for spec in every_quantizer()}
    tcq = [sizes[f"tcq-{1.5 + i / 2:g}-hyb"] for i in range(8)]
    assert tcq == [2048, 2048, 2048, 2048, 4096, 8192, 8192, 16384]
    assert sizes["half-tcq-3.25-hyb"] == sizes["tcq-3.5-hyb"] and sizes["half-tcq-4.75-hyb"] == sizes["tcq-5-hyb"]
    assert sizes["nuq-4"] == 32 and sizes["vq-6"] == 16384 and sizes["int-4"] == 0


def test_the_table_may_be_chosen_and_the_label_says_so():
    spec = QuantizerSpec(Family.TCQ, 4, 12, 9)
    assert spec.label == "tcq-4-hyb-L12-T9" and spec.codebook_shape == (512, 2)
    assert QuantizerSpec(Family.TCQ, 4, 16, 11) == QuantizerSpec(Family.TCQ, 4, 16, code=TrellisCode.HYB)
    assert [table_bits_of(size) for size in (0, 4, 2048, 16384)] == [0, 0, 9, 12]
    for size in (2046, 6144):
        with pytest.raises(QuantizerError, match=f"got {size} bytes"):
            table_bits_of(size)


@pytest.mark.parametrize("family", [Family.TCQ, Family.HALF_TCQ])
def test_a_trellis_is_that_of_mad_unless_a_code_or_a_table_is_named(family):
    bits = 3 if family is Family.TCQ else 3.25
    usual, hybrid = QuantizerSpec(family, bits, 16), QuantizerSpec(family, bits, 16, code=TrellisCode.HYB)
    assert usual == QuantizerSpec(family, bits, 16, 0) == QuantizerSpec(family, bits, 16, 0, TrellisCode.MAD)
    assert (usual.code, usual.table_bytes, usual.pair_steps) == (TrellisCode.MAD, 0, 1)
    assert hybrid == QuantizerSpec(family, bits, 16, hybrid.table_bits) and hybrid.table_bytes > 0
    assert hybrid.label == f"{usual.label}-hyb" and "mad" not in usual.label
    assert usual.size_bytes(32, 64) == hybrid.size_bytes(32, 64) - hybrid.table_bytes


def test_codes_of_single_weights_carry_no_table_and_take_two_steps_a_pair():
    spec = QuantizerSpec(Family.TCQ, 3, 16, code=TrellisCode.ONE_MAD)
    assert (spec.label, spec.table_bytes, spec.pair_steps) == ("tcq-3-1mad", 0, 2)
    assert spec.size_bytes(32, 64) == 32 * 64 * 3 // 8 + 2 * 32
    lookup = QuantizerSpec(Family.TCQ, 2.5, 10, code=TrellisCode.LUT)
    assert (lookup.label, lookup.table_bytes, lookup.pair_steps) == ("tcq-2.5-lut-L10", 4096, 1)


def test_everything_on_offer_has_a_label_of_its_own():
    every = every_quantizer()
    labels = [spec.label for spec in every]
    assert len(set(labels)) == len(every) and set(default_palette()) < set(every)
    for code in (TrellisCode.MAD, TrellisCode.HYB):
        fine = {spec.bits for spec in every if spec.has_trellis and spec.code is code}
        assert sorted(fine) == [1.5 + i / 8 for i in range(29)]


def test_size_counts_codes_scales_codebook_and_padding():
    spec = QuantizerSpec(Family.TCQ, 3, 16, 9)
    assert spec.size_bytes(32, 64) == 32 * 64 * 3 // 8 + 2 * 32 + 2048
    assert spec.size_bytes(17, 33) == 32 * 48 * 3 // 8 + 2 * 17 + 2048


def test_half_tcq_splits_tile_columns_low_rate_first():
    spec = QuantizerSpec(Family.HALF_TCQ, 2.75, 16)
    assert spec.rates == (2.5, 3.0)
    assert spec.segment_tiles(64) == (2, 2) and spec.segment_tiles(80) == (3, 2)


@pytest.mark.parametrize(("bits", "rates", "tiles"), [(2.625, (2.5, 3.0), (6, 2)), (3.875, (3.5, 4.0), (2, 6))])
def test_half_tcq_splits_at_quarters_too(bits, rates, tiles):
    spec = QuantizerSpec(Family.HALF_TCQ, bits, 16)
    assert spec.rates == rates and spec.segment_tiles(128) == tiles
    assert spec.label == f"half-tcq-{bits:g}"
    weights = 64 * 128
    assert spec.size_bytes(64, 128) == weights * bits / 8 + 2 * 64 + spec.table_bytes


@pytest.mark.parametrize(
    "arguments",
    [
        ("tcq", 3.25, 16),
        ("nuq", 9, 0),
        ("nuq", 3, 16),
        ("tcq", 3, 6),
        ("tcq", 3, 17),
        ("half_tcq", 2, 16),
        ("tcq", 3, 16, 16),
        ("tcq", 3, 16, 0, TrellisCode.HYB),
        ("tcq", 3, 16, 9, TrellisCode.MAD),
        ("half_tcq", 2.25, 16, 9, TrellisCode.MAD),
        ("nuq", 3, 0, 0, TrellisCode.MAD),
        ("nuq", 3, 0, 9),
        ("half_tcq", 2.1875, 16),
        ("tcq", 2.5, 16, -1, TrellisCode.ONE_MAD),
        ("half_tcq", 2.25, 16, -1, TrellisCode.LUT),
        ("nuq", 3, 0, 0, TrellisCode.LUT),
        ("tcq", 3, 16, 9, TrellisCode.LUT),
        ("tcq", 3, 16, 9, TrellisCode.THREE_INST),
    ],
)
def test_impossible_quantizers_are_refused(arguments):
    with pytest.raises(QuantizerError, match=r"got|trellis"):
        QuantizerSpec(*arguments)


def test_globs_select_in_order_and_near_matches_are_named():
    labels = ["nuq-2", "tcq-2", "tcq-3"]
    assert match_labels(labels, "tcq-*, nuq-2") == labels
    with pytest.raises(QuantizerError, match="near matches: tcq-"):
        match_labels(labels, "tqc-3")
    with pytest.raises(QuantizerError, match="empty"):
        match_labels(labels, " , ")
