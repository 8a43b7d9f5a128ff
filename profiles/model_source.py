"""From what a user calls a model to a directory on this machine."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from .errors import ProfileError

EMBEDDED = Path(__file__).parent / "embedded"
"""Small models that ship with msq, for demonstrations and tests."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja")


def embedded_models() -> tuple[str, ...]:
    """Names of the models that ship with msq."""
    return tuple(sorted(path.parent.name for path in EMBEDDED.glob("*/config.json")))


def resolve_model(name: str) -> Path:
    """The directory of a model: a local directory, an embedded model, or a download from the Hugging Face Hub.

    A local directory wins over an embedded name, and both over a hub id ("org/name"). Only a hub id touches
    the network.

    Raises:
        ProfileError: nothing of that name; or the hub can't be reached or refuses.
    """
    if not name.strip():
        raise ProfileError('expected a model directory or name such as "ref-tiny-3m"; got an empty one.')
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        raise ProfileError(f"{name} is a file; give the directory of the model, with config.json and weights.")
    embedded = embedded_models()
    if name in embedded:
        return EMBEDDED / name
    if _HUB_ID.fullmatch(name):
        return _download(name)
    here = [path.name for path in local.parent.iterdir() if path.is_dir()] if local.parent.is_dir() else []
    close = difflib.get_close_matches(local.name, [*embedded, *here], n=3)
    hint = f"near matches: {', '.join(close)}" if close else f"models that ship with msq: {', '.join(embedded)}"
    raise ProfileError(f'there is no model directory "{name}" and no hub id looks like it (org/name); {hint}.')


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_WANTED)))
    except GatedRepoError as cause:
        problem = "is gated; accept its licence on the hub and log in with `hf auth login`"
        raise ProfileError(f"the model {repository} {problem}, or give a local directory.") from cause
    except RepositoryNotFoundError as cause:
        problem = "does not exist on the Hugging Face Hub or is private"
        raise ProfileError(f"the model {repository} {problem}; check the name, or give a local directory.") from cause
    except Exception as cause:  # its transport is another library in every major version; type and text are told
        detail = " ".join(str(cause).split())[:160]
        raise ProfileError(
            f"can't fetch the model {repository} from the Hugging Face Hub ({type(cause).__name__}: {detail}); "
            "connect to it, or give a local directory."
        ) from cause
