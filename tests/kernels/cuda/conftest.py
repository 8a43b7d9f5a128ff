"""Every test compiles into a cache of its own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The directory that stands for the user's cache."""
    monkeypatch.setenv("MSQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"
