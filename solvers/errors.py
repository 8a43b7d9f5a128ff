"""The exception that this folder raises for input it can't accept."""


class SolverError(ValueError):
    """A problem, an argument or an answer is not usable; the message says what to do."""
