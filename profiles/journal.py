"""What an interrupted profiling job has measured so far: one JSON object a line, appended and flushed to disk.

The first line says which job the rows belong to (model digest, method, palette, seeds); a job with other settings
refuses to go on from it. A line cut short by a kill is dropped: its row is measured again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import ProfileError

JOURNAL_FILE = "unfinished.jsonl"


class Journal:
    """Finished rows of a job by key, kept across interruptions.

    Args:
        path: the file; made if missing.
        job: settings that the rows depend on, JSON values only.

    Raises:
        ProfileError: the file belongs to another job, or is not a journal.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path = path
        self._rows: dict[tuple[Any, ...], Any] = {}
        self._file = None
        head = json.dumps(job, sort_keys=True)
        whole = 0
        if path.exists():
            lines = path.read_bytes().split(b"\n")
            if len(lines) > 1:
                self._check_job(lines[0], head)
                whole = len(lines[0]) + 1
                for line in lines[1:-1]:
                    try:
                        key, row = json.loads(line)
                    except ValueError:
                        break
                    self._rows[tuple(key)] = row
                    whole += len(line) + 1
        self._file = path.open("r+b" if whole else "wb")
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._append(head)

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
        assert self._file is not None
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
        if self._file is not None:
            self._file.close()
