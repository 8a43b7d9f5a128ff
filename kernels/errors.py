"""The exceptions that this folder raises."""


class QuantizerError(ValueError):
    """A quantizer, weight or packed tensor is not usable; the message says what to do."""


class KernelError(RuntimeError):
    """A CUDA kernel can't be compiled, loaded or launched here; the message says why and what to do."""
