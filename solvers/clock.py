"""Wall time of one solve."""

from __future__ import annotations

import time


class Clock:
    """Seconds since it was made, against a limit in seconds (may be inf)."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.limit - self.seconds)

    @property
    def over(self) -> bool:
        """Whether the limit has passed."""
        return self.seconds >= self.limit
