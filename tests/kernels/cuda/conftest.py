"""Every test without a GPU compiles into a cache of its own; those with one share the user's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that stands for the user's cache."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("MSQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"
