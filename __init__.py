"""msq: plan, build and run mixed-scheme quantized language models."""

__version__ = "0.1.0"
