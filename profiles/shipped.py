"""What ships with msq besides code: shapes of well-known models, and latency profiles of GPUs for them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from .errors import ProfileError
from .model_source import EMBEDDED, embedded_models
from .schema import MANIFEST_FILE

_SHAPES = Path(__file__).parent / "shapes"
"""A config.json for each model, written from public facts; weights are not part of it."""
_PROFILES = Path(__file__).parent / "gpus"
"""``GPU/MODEL`` directories as `latency_job` writes them."""


def shape_names() -> tuple[str, ...]:
    """Models whose shapes ship with msq."""
    return tuple(sorted(path.stem for path in _SHAPES.glob("*.json")))


def profile_names() -> tuple[str, ...]:
    """Latency profiles that ship with msq, ``gpu/model``."""
    return tuple(
        sorted(path.parent.relative_to(_PROFILES).as_posix() for path in _PROFILES.glob(f"*/*/{MANIFEST_FILE}"))
    )


def resolve_config(name: str) -> Path:
    """The config.json of a model: a JSON file, a model directory, or a model or shapes that ship with msq.

    Raises:
        ProfileError: nothing of that name.
    """
    local = Path(name).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        return local / "config.json"
    if name in embedded_models():
        return EMBEDDED / name / "config.json"
    if name in shape_names():
        return _SHAPES / f"{name}.json"
    raise ProfileError(f'there is no config or model directory "{name}"; {_hint(name, shape_names(), "shapes")}.')


def resolve_profile(name: str | Path) -> Path:
    """The directory of a profile: a local one, else one that ships with msq.

    A name that is neither comes back as it is, for the reader of profiles to refuse.
    """
    local = Path(name).expanduser()
    if not local.exists() and local.as_posix() in profile_names():
        return _PROFILES / local
    return local


def is_shipped(path: str | Path) -> bool:
    """Whether a profile's name or directory is one that ships with msq, so is not to be written to."""
    return resolve_profile(path).resolve().is_relative_to(_PROFILES.resolve())


def _hint(name: str, known: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name.casefold(), known, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"{what} that ship with msq: {', '.join(known) or 'none'}"
