"""Compiled kernels on disk: one file a kernel, named by the digest of all that went into it.

A file is ``msqcubin``, the SHA-256 of the code, the code. It is written under another name and renamed, so any number
of processes may read and write at once; a file that is cut short or changed is not used but compiled and written anew.
The directory can be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

from ..errors import KernelError

DIRECTORY_VARIABLE = "MSQ_CACHE_DIR"
_MAGIC = b"msqcubin"
_HEADER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``kernels`` under ``$MSQ_CACHE_DIR`` or in msq's part of the user's cache.

    Raises:
        KernelError: the user has no home directory.
    """
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute() / "kernels"
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            stated = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG rules: a relative path counts as unset
            base = stated if stated.is_absolute() else Path.home() / ".cache"
    except RuntimeError as cause:
        raise KernelError(f"there is no home directory for compiled kernels; set {DIRECTORY_VARIABLE}.") from cause
    return base / "msq" / "kernels"


def _path(digest: str) -> Path:
    return cache_directory() / f"{digest}.cubin"


def read(digest: str) -> bytes | None:
    """The code stored under a digest; None where there is none, or none that is whole."""
    try:
        stored = _path(digest).read_bytes()
    except OSError:
        return None
    code = stored[_HEADER_BYTES:]
    if not code or stored[:_HEADER_BYTES] != _MAGIC + hashlib.sha256(code).digest():
        return None
    return code


def write(digest: str, code: bytes) -> None:
    """Store code; where the directory can't be written, warn that the next process will compile again."""
    target = _path(digest)
    draft = None
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{digest[:16]}-")
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(target)
    except OSError as cause:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        warnings.warn(
            f"compiled kernels can't be kept in {target.parent} ({cause.strerror or cause}), so every process compiles "
            f"them again; make it writable or set {DIRECTORY_VARIABLE}.",
            stacklevel=2,
        )


def cache_size() -> tuple[int, int]:
    """Kernels in the cache, and their bytes."""
    sizes = [path.stat().st_size for path in cache_directory().glob("*.cubin")]
    return len(sizes), sum(sizes)
