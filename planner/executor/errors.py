"""The exception that this folder raises for a checkpoint or model it can't accept."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or doesn't fit its plan; the message says what to do."""
