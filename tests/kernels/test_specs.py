import pytest
from msq.kernels.errors import QuantizerError
from msq.kernels.specs import Family, QuantizerSpec, default_palette, match_labels

PUBLISHED_TABLE_BYTES = {"tcq-4": 2048, "tcq-4.5": 4096, "tcq-5": 8192, "half-tcq-4.25": 4096, "half-tcq-4.75": 8192}


def test_the_palette_holds_what_the_design_lists():
    labels = [spec.label for spec in default_palette()]
    assert len(labels) == len(set(labels)) == 7 + 7 + 10 + 8 + 7
    assert {"int-4", "nuq-8", "vq-1.5", "vq-6", "tcq-1.5", "tcq-5", "half-tcq-1.75", "half-tcq-4.75"} <= set(labels)


def test_table_sizes_are_those_of_the_published_kernels():
    by_label = {spec.label: spec for spec in default_palette()}
    assert {label: by_label[label].table_bytes for label in PUBLISHED_TABLE_BYTES} == PUBLISHED_TABLE_BYTES
    assert by_label["nuq-4"].table_bytes == 32 and by_label["vq-6"].table_bytes == 16384


def test_size_counts_codes_scales_codebook_and_padding():
    spec = QuantizerSpec(Family.TCQ, 3, 16)
    assert spec.size_bytes(32, 64) == 32 * 64 * 3 // 8 + 2 * 32 + 2048
    assert spec.size_bytes(17, 33) == 32 * 48 * 3 // 8 + 2 * 17 + 2048


def test_half_tcq_splits_tile_columns_low_rate_first():
    spec = QuantizerSpec(Family.HALF_TCQ, 2.75, 16)
    assert spec.rates == (2.5, 3.0)
    assert spec.segment_tiles(64) == (2, 2) and spec.segment_tiles(80) == (3, 2)


@pytest.mark.parametrize(
    "arguments", [("tcq", 3.25, 16), ("nuq", 9, 0), ("nuq", 3, 16), ("tcq", 3, 6), ("tcq", 3, 17), ("half_tcq", 2, 16)]
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
