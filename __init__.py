"""msq: plan, build and run mixed-scheme quantized language models.

After `import msq`, transformers' ``AutoModelForCausalLM.from_pretrained`` loads msq's checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .planner.executor.on_import import register_with_transformers

if TYPE_CHECKING:
    from .planner.executor.decoder import Decoder as Decoder
    from .planner.executor.load import load_checkpoint as load_checkpoint
    from .planner.executor.transformers_plugin import to_device as to_device

__version__ = "0.1.0"

_PUBLIC = {"Decoder": "decoder", "load_checkpoint": "load", "to_device": "transformers_plugin"}
"""Names that are loaded when they are asked for, and the modules of `planner.executor` that hold them."""

if __name__ == "msq":  # not where a tool takes this folder for a package of its own, as pytest does
    register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(f".planner.executor.{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module 'msq' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
