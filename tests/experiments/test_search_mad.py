"""The search for the constants of the code MAD, at sizes of a moment."""

from __future__ import annotations

import sys

import pytest
from msq.experiments import search_mad
from msq.experiments.search_mad import Search, Settings, error_of
from msq.experiments.train_codebooks import gaussian_pairs
from msq.kernels.mad import MadCode, mad_code

SMALL = Settings(count=6, pairs=4, tiles=4, test_tiles=8, state_bits=11, seed=3)
ONE_HASH, TWO_HASHES = 4, 7


@pytest.mark.parametrize("width", [ONE_HASH, TWO_HASHES])
def test_what_it_finds_beats_a_code_that_does_not_scramble_its_states(width):
    code, error = Search(SMALL).best(width)
    assert len(code.multipliers) == (2 if width == TWO_HASHES else 1)
    assert all(multiplier % 2 for multiplier in code.multipliers)
    bad = MadCode((1,) * len(code.multipliers), (0,) * len(code.addends), code.deviation)
    fresh = gaussian_pairs(64, 99, "cpu")
    found, poor = (error_of(each, width, fresh, SMALL.state_bits) for each in (code, bad))
    assert 2.0**-width < found < 0.5 * poor
    assert found == pytest.approx(error, rel=0.2)


def test_the_same_seed_finds_the_same_whatever_else_is_asked_for():
    search = Search(SMALL)
    search.best(ONE_HASH)
    assert search.best(TWO_HASHES) == Search(SMALL).best(TWO_HASHES)


def test_it_prints_lines_for_the_table_of_codes(monkeypatch, capsys):
    sizes = ["--count", "3", "--tiles", "2", "--test-tiles", "4", "--state-bits", "9"]
    monkeypatch.setattr(sys, "argv", ["search_mad", *sizes, "--widths", str(ONE_HASH)])
    search_mad.main()
    (line,) = capsys.readouterr().out.splitlines()
    width, _, rest = line.strip().partition(": ")
    found = eval(rest.partition("  #")[0].rstrip(","), {"MadCode": MadCode})
    assert int(width) == ONE_HASH and isinstance(found, MadCode)
    errors = [float(part.split()[-1]) for part in rest.split("# ")[1].split(";")]
    assert errors[1] == pytest.approx(error_of(mad_code(ONE_HASH), ONE_HASH, gaussian_pairs(4, 1, "cpu"), 9), abs=1e-6)


def test_sizes_that_leave_nothing_to_choose_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search_mad", "--count", "1"])
    with pytest.raises(SystemExit):
        search_mad.main()
    assert "expected --count of at least 2; got 1" in capsys.readouterr().err
