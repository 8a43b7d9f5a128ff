"""Results as CSV, with what made them."""

from __future__ import annotations

import csv
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..profiles.device import describe_device
from ..profiles.models import choose_device


def environment(device: str, commit: str | None = None) -> dict[str, str]:
    """Python, torch, device and commit.

    Args:
        commit: what to record; None for that of this checkout.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": describe_device(choose_device(device)).name,
        "commit": commit or checkout_commit(),
    }


def checkout_commit() -> str:
    """The commit of this checkout, marked where files were changed."""
    if shutil.which("git") is None:
        return "not in a git checkout"
    describe = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "not in a git checkout"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replaces a file by a table."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
