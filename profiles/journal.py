"""What an interrupted profiling job has measured so far: one JSON object a line, appended and flushed to disk.

The first line says which job the rows belong to (model digest, method, palette, seeds); a job with other settings
refuses to go on from it. A line cut short by a kill is dropped: its row is measured again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import ProfileError
from .files import try_lock
from .schema import MANIFEST_FILE

JOURNAL_FILE = "unfinished.jsonl"


def make_directory(out: Path, *, restart: bool) -> None:
    """Make the directory of a profile, unless a finished one is in it that is not to be replaced, or others' files.

    A manifest beside a journal is the profile that the journal led to: its job was interrupted while it cleaned up.

    Raises:
        ProfileError: it can't be made, holds a profile, or other files and none.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # a dot: a write that was killed
        held = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")}
    except OSError as cause:
        raise ProfileError(f"can't write the profile {out}: {cause.strerror or cause}.") from cause
    if held and not held & {MANIFEST_FILE, JOURNAL_FILE}:
        raise ProfileError(f"{out} holds {min(held)} and no profile; choose a new or empty directory as --out.")
    if restart and (out / MANIFEST_FILE).exists():
        (out / JOURNAL_FILE).touch()  # first: a job that is killed now finds its directory again
        (out / MANIFEST_FILE).unlink()
    elif (out / MANIFEST_FILE).exists() and not (out / JOURNAL_FILE).exists():
        raise ProfileError(f"{out} already holds a profile; choose another --out, or add --restart to replace it.")


class Journal:
    """Finished rows of a job by key, kept across interruptions.

    Args:
        path: the file; made if missing.
        job: settings that the rows depend on, JSON values only.
        restart: drop the rows of an earlier job.

    Raises:
        ProfileError: another process writes to the file, it belongs to another job, or is not a journal.
    """

    def __init__(self, path: Path, job: dict[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self._rows: dict[tuple[Any, ...], Any] = {}
        head = json.dumps(job, sort_keys=True)
        whole = 0
        try:
            self._file = path.open("a+b")
        except OSError as cause:
            raise ProfileError(f"can't write {path}: {cause.strerror or cause}.") from cause
        try:
            if not try_lock(self._file):
                raise ProfileError(f"another msq profile is writing to {path.parent}; wait for it, or stop it.")
            self._file.seek(0)
            lines = [] if restart else self._file.read().split(b"\n")
            if len(lines) > 1:
                self._check_job(lines[0], head)
                whole = len(lines[0]) + 1
                for line in lines[1:-1]:
                    try:
                        key, row = json.loads(line)
                        self._rows[tuple(key)] = row
                    except (ValueError, TypeError):
                        break
                    whole += len(line) + 1
            self._file.truncate(whole)
            if not whole:
                self._append(head)
        except BaseException:
            self._file.close()
            raise

    def _check_job(self, line: bytes, head: str) -> None:
        try:
            found, wanted = json.loads(line), json.loads(head)
        except ValueError as cause:
            raise ProfileError(f"{self.path} is not a profiling journal; remove it or choose another --out.") from cause
        if found != wanted:
            changed = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            raise ProfileError(
                f"{self.path.parent} holds an unfinished profile made with other settings ({', '.join(changed)}); "
                "repeat its command to finish it, or add --restart to drop it."
            )

    def _append(self, text: str) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._rows

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self._rows[key]

    def add(self, key: tuple[Any, ...], row: Any) -> None:
        """Record a finished row; it survives whatever happens after this returns."""
        self._append(json.dumps([list(key), row]))
        self._rows[key] = row

    def count(self, kind: str) -> int:
        """How many finished rows have `kind` as the first part of their key."""
        return sum(key[0] == kind for key in self._rows)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._rows:  # nothing to go on from
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                self.path.parent.rmdir()  # if nothing else is in it
        self._file.close()
