"""What went wrong in a worker, told to the process that started it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from .errors import CorruptModelError, ProfileError


@dataclass(frozen=True)
class WorkerFailure:
    """An exception as text: one of another process may not survive pickling, nor its class be known here.

    Attributes:
        kind: name of its type.
        text: what it says.
        trace: its traceback.
    """

    kind: str
    text: str
    trace: str

    @classmethod
    def of(cls, cause: BaseException) -> WorkerFailure:
        return cls(type(cause).__name__, str(cause), "".join(traceback.format_exception(cause)))

    def error(self) -> ProfileError:
        """What to raise for it: the sentence of this folder's errors as it is, else type and text."""
        for kind in (ProfileError, CorruptModelError):
            if self.kind == kind.__name__:
                return kind(self.text)
        error = ProfileError(f"a worker failed with {self.kind}: {self.text or 'it says no more'}")
        error.add_note(self.trace)
        return error
