"""Files as msq reads and writes them: atomic writes, digests, strict YAML and CSV.

A reader never sees half a file: content goes to a temporary file in the same directory, is flushed to
disk, and is renamed over the target. Every function turns a missing or corrupt file into one sentence,
raised as the `error` type of the caller's folder.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import re
import secrets
import sys
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ProfileError

if sys.platform != "win32":
    import fcntl

JOB_FILE = "job.json"
"""Says in a working directory which job its files belong to."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")


def check_writable(path: Path, error: type[ValueError] = ProfileError) -> None:
    """Refuses a path that `write_atomic` would, so that work isn't done for nothing.

    Raises:
        error: the directory is missing, or the target is not a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise error(f"can't write {path}: it exists and is not a regular file; choose another name.")
    if not target.parent.is_dir():
        raise error(f"can't write {path}: the directory {target.parent} does not exist; create it first.")


def write_atomic(path: Path, content: bytes | str, error: type[ValueError] = ProfileError) -> None:
    """Replaces `path` by `content` (text is written as UTF-8), or leaves it untouched.

    A symbolic link is followed; anything else that isn't a regular file is refused.

    Raises:
        error: the directory is missing, the target is not a file, or the disk refuses.
    """
    check_writable(path, error)
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        # Not tempfile: its files are private (0600) and would stay so after the rename.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        if os.name == "posix":  # elsewhere a directory can't be opened
            directory = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as cause:
        raise error(f"can't write {path}: {cause.strerror or cause}.") from cause
    finally:
        temporary.unlink(missing_ok=True)


def sweep_temporaries(directory: Path) -> None:
    """Removes what `write_atomic` left in a directory when it was killed; no other process may be writing there."""
    for path in directory.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def try_lock(file: IO[bytes]) -> bool:
    """Locks a file until it is closed, unless someone else holds it; the system frees it when this process ends.

    Windows has no such locks: there every lock is given.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def claim_directory(directory: Path, job: dict[str, Any], what: str, error: type[ValueError] = ProfileError) -> None:
    """Makes a directory the working place of one job, or checks that it is that already.

    Args:
        directory: made if missing; new, empty or this job's.
        job: settings that its files depend on, JSON values only; kept in `JOB_FILE`.
        what: kind of files, for messages.

    Raises:
        error: the directory can't be written, or holds another job's files or others.
    """
    path = directory / JOB_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(path.read_bytes())
            if found != job:
                changed = ", ".join(key for key in job if found.get(key) != job[key])
                raise error(
                    f"{directory} holds {what} made with other settings ({changed}); remove it, or repeat the command "
                    "that made them."
                )
        elif any(not entry.name.startswith(".") for entry in directory.iterdir()):  # a dot: a write that was killed
            raise error(f"{directory} holds other files than {what}; remove it, or choose another directory.")
        else:
            write_atomic(path, json.dumps(job, indent=2) + "\n", error)
    except OSError as cause:
        raise error(f"can't write {what} to {directory}: {cause.strerror or cause}.") from cause
    sweep_temporaries(directory)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits; reads it in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise ProfileError(f"can't read {path}: {cause.strerror or cause}.") from cause


def read_bytes(path: Path, kind: str, error: type[ValueError] = ProfileError) -> bytes:
    """The content of `path`; `kind` ("profile manifest") is for the message when it can't be read."""
    if not path.is_file():
        state = "it is not a regular file" if path.exists() else "there is no such file"
        raise error(f"can't read the {kind} {path}: {state}.")
    try:
        return path.read_bytes()
    except OSError as cause:
        raise error(f"can't read the {kind} {path}: {cause.strerror or cause}.") from cause


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice, where PyYAML keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' is given twice", key_node.start_mark
                    )
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse_yaml(content: bytes, where: str, error: type[ValueError] = ProfileError) -> dict[str, Any]:
    """The mapping at the top of a YAML file; `where` names the file in messages."""
    try:
        value = yaml.load(content, _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        detail = getattr(cause, "problem", None) or " ".join(str(cause).split())
        raise error(f"{where} is not valid YAML{line}: {detail}; restore or rewrite the file.") from cause
    if not isinstance(value, dict):
        raise error(f"{where} should hold named fields (key: value); got {_kind_of(value)}.")
    return value


def read_yaml(path: Path, kind: str, error: type[ValueError] = ProfileError) -> dict[str, Any]:
    """The mapping at the top of the YAML file `path`."""
    return parse_yaml(read_bytes(path, kind, error), str(path), error)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Safe YAML without anchors, which would tie equal entries together."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(str(value)))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def dump_yaml(model: BaseModel, *, exclude_none: bool = False) -> str:
    """A model as YAML: fields in their order, the innermost on one line, floats that read back exactly."""
    return yaml.dump(
        model.model_dump(exclude_none=exclude_none),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=110,
    )


def parse_csv(content: bytes, where: str, error: type[ValueError] = ProfileError) -> dict[str, list[str]]:
    """The columns of a CSV table with a header row, cells as text, blank lines left out.

    Raises:
        error: not UTF-8, no header, a column named twice, a row with too few or too many cells, no rows.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig")), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as cause:
        raise error(f"{where} is not a CSV table in UTF-8: {cause}; restore or rewrite the file.") from cause
    if not rows:
        raise error(f"{where} is empty; expected a header row and at least one row of data.")
    header, *body = rows
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise error(f"{where} names the column '{repeated[0]}' twice; keep one.")
    if not body:
        raise error(f"{where} has no rows; expected at least one row of data below the header.")
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise error(
                f"{where}, row {number}: expected {len(header)} cells as in the header, got {len(row)}; "
                "the file may be cut short."
            )
    return {name: list(cells) for name, cells in zip(header, zip(*body, strict=True), strict=True)}


def validation_sentence(cause: ValidationError, where: str, fields: tuple[str, ...] = ()) -> str:
    """One sentence for a pydantic error: the file, the field, what was expected and what arrived.

    Args:
        cause: the error; its first entry is told, the others counted.
        where: the file.
        fields: names to offer as near matches of an unknown field.
    """
    first, *others = cause.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"])
    more = f" ({len(others)} more problem{'s' if len(others) > 1 else ''} in this file)" if others else ""
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        near = difflib.get_close_matches(name, [other for other in fields if other != name], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "remove it, or upgrade msq if a newer one wrote it."
        return f"{where}: unknown field '{field}'; {hint}{more}"
    if first["type"] == "missing":
        return f"{where}: the field '{field}' is missing; add it.{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not field:  # a rule between fields
        return f"{where}: {message.rstrip('.')}.{more}"
    value = first["input"]
    got = f"; got {value!r}" if isinstance(value, (str, int, float, type(None))) else ""
    return f"{where}: the field '{field}' is wrong: {message.rstrip('.')}{got}.{more}"


def _kind_of(value: object) -> str:
    if value is None:
        return "an empty file"
    return "a list" if isinstance(value, list) else f"the single value {value!r}"[:80]
