"""Registering with transformers when, and only if, it is imported: `import msq` itself loads nothing heavy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"
"""The module that holds transformers' registers."""


def _register() -> None:
    try:
        importlib.import_module(".transformers_plugin", __package__)
    except ImportError as cause:  # transformers itself must go on working
        warnings.warn(f"msq can't register with transformers ({cause}): its checkpoints won't load.", stacklevel=2)


class _Waiting(MetaPathFinder):
    """Lets the others find `_TRIGGER`, and adds a step to its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Another loader's work, and then the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


def register_with_transformers() -> None:
    """Make `from_pretrained` know msq's checkpoints, now if transformers is loaded, else as soon as it is."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
