"""The kernels' sources as text."""

from __future__ import annotations

import pytest
from msq.kernels.cuda import jit

SOURCES = sorted(jit.SOURCES.iterdir())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_are_no_longer_than_pythons(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines and [line for line in lines if len(line) > 120] == []
