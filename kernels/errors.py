"""The exception that this folder raises for input it can't accept."""


class QuantizerError(ValueError):
    """A quantizer, weight or packed tensor is not usable; the message says what to do."""
