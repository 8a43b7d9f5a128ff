"""The exceptions that this folder raises; the command line maps them to exit codes."""


class ChartError(ValueError):
    """A chart can't be drawn; the message says what to do (exit code 2)."""
