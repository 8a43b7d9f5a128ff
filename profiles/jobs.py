"""A list of jobs that any number of processes work through together, by way of one directory.

A job is one (layer, quantizer). Its result is one file, there whole or not at all, and the same whoever computes it, so
that a job which is done twice does no harm and one whose result is there is never done again. A process that works on a
job holds a lease, so that others leave it alone: a lock on one byte of the file `leases`, which the system takes back
when the process ends, by `kill -9` or with its host, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..kernels.specs import QuantizerSpec
from .errors import ProfileError
from .files import sweep_temporaries, write_atomic
from .inventory import LayerInfo

if sys.platform != "win32":
    import fcntl

_LEASES = "leases"
_LOOK_AGAIN_SECONDS = 0.2
"""How long `Leases.each` waits when other processes hold all that is left."""


@dataclass(frozen=True)
class Job:
    """One layer to be quantized one way; `index` is its place in the list."""

    index: int
    layer: LayerInfo
    spec: QuantizerSpec


@dataclass(frozen=True)
class JobList:
    """Jobs and the directory of their results; the directory serves one list only, the caller sees to that.

    Attributes:
        directory: on a file system that all who work on the list share.
        jobs: in order; jobs of a layer stand together.
    """

    directory: Path
    jobs: tuple[Job, ...]

    @classmethod
    def open(cls, directory: Path, pairs: Sequence[tuple[LayerInfo, QuantizerSpec]]) -> JobList:
        """The list of these (layer, quantizer), with the results that an interrupted process left.

        Raises:
            ProfileError: the directory can't be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(directory)
        except OSError as cause:
            raise ProfileError(f"can't write results to {directory}: {cause.strerror or cause}.") from cause
        return cls(directory, tuple(Job(index, *pair) for index, pair in enumerate(pairs)))

    def path(self, job: Job) -> Path:
        """The file of a job's result."""
        return self.directory / f"{job.index:06d}"

    def is_done(self, job: Job) -> bool:
        return self.path(job).exists()

    def done(self) -> set[int]:
        """Indices of the jobs that are done."""
        return {int(path.name) for path in self.directory.iterdir() if path.name.isdigit()}

    def store(self, job: Job, content: bytes) -> None:
        """Write a result.

        Raises:
            ProfileError: the disk refuses.
        """
        write_atomic(self.path(job), content)

    def load(self, job: Job) -> bytes:
        """The result of a job that is done."""
        return self.path(job).read_bytes()


class Leases:
    """The leases of one process on the jobs of a list.

    Locks are those of POSIX records, which hold between hosts on a network file system. Windows has none: there every
    lease is given, and processes may do the same job twice.

    Raises:
        ProfileError: the directory or its file system is no good.
    """

    def __init__(self, jobs: JobList) -> None:
        self._jobs = jobs
        try:
            self._file = (jobs.directory / _LEASES).open("ab")
        except OSError as cause:
            raise ProfileError(f"can't write to {jobs.directory}: {cause.strerror or cause}.") from cause

    def each(self, first: int, *, wait: bool) -> Iterator[Job]:
        """Every job that is not done, leased; it stays leased until `release` or the end of the process.

        Args:
            first: index to begin at; the jobs before it come last.
            wait: whether to wait for jobs that others hold, and do those whose holders ended without a result.
        """
        left = [*self._jobs.jobs[first:], *self._jobs.jobs[:first]]
        while left:
            held = []
            for job in left:
                if self._jobs.is_done(job):
                    continue
                if not self._take(job):
                    held.append(job)
                elif self._jobs.is_done(job):  # in the meantime
                    self.release(job)
                else:
                    yield job
            left = held if wait else []
            if left:
                time.sleep(_LOOK_AGAIN_SECONDS)

    def release(self, job: Job) -> None:
        """Give a job back, done or not."""
        if sys.platform != "win32":
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, job.index)

    def _take(self, job: Job) -> bool:
        """Lock the job's byte, which need not exist, unless another process holds it."""
        if sys.platform != "win32":
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job.index)
            except (BlockingIOError, PermissionError):
                return False
            except OSError as cause:
                raise ProfileError(
                    f"the file system of {self._file.name} gives no locks ({cause.strerror or cause}), which processes "
                    "need to share work; mount it with locks, or write elsewhere."
                ) from cause
        return True

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
