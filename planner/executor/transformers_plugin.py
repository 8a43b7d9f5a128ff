"""Checkpoints through transformers' own `from_pretrained` and `save_pretrained`, after `import msq`.

Planned layers are left out when transformers builds the model and fills it; then their packed tensors are read from the
same files and installed as `load_checkpoint` does, on the device where the model has come to lie. Saving gives back the
stored tensors of each original layer, so a checkpoint stays the same however it was fused and wherever it ran.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...kernels.quantize import QuantizedWeight
from ...profiles.schema import EMBED, HEAD
from .errors import CheckpointError
from .install import Place, choose_places, install, installed_layers, leave_untied, replace_module
from .load import quantized_weights, read_tensors
from .manifest import METHOD, QuantizationConfig, parse_quantization_config


@register_quantization_config(METHOD)
class MsqConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json; `manifest.QuantizationConfig` says what the fields mean."""

    def __init__(self, **fields: Any) -> None:
        fields["quant_method"] = METHOD
        self.__dict__.update(fields)

    def parsed(self) -> QuantizationConfig:
        """The fields, checked.

        Raises:
            CheckpointError: they are of a newer schema, or contradict themselves.
        """
        return parse_quantization_config(self.to_dict(), "quantization_config")


@register_quantizer(METHOD)
class MsqQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves."""

    requires_calibration = True  # only `msq apply` quantizes

    def __init__(self, quantization_config: MsqConfig, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self._quantization = quantization_config.parsed()
        self._files: list[Path] = []

    def _process_model_before_weight_loading(self, model: nn.Module, **arguments: Any) -> None:
        places = set((arguments.get("device_map") or {"": None}).values())
        if len(places) > 1:
            raise CheckpointError(f"msq runs a model on one device; device_map names {sorted(map(str, places))}.")
        self._files = [Path(name) for name in arguments.get("checkpoint_files") or []]
        untyped: Any = model
        for name in self._quantization.layers:
            replace_module(model, name, nn.Identity())
        if EMBED in self._quantization.layers and untyped.config.tie_word_embeddings:
            replace_module(model, HEAD, nn.Identity())
            leave_untied(model)
        known = set(untyped._keys_to_ignore_on_load_unexpected or ())
        untyped._keys_to_ignore_on_load_unexpected = known | {rf"^{re.escape(n)}\." for n in self._quantization.layers}

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        tensors = read_tensors(self._files, self._quantization.layers)
        weights = quantized_weights(self._quantization, tensors)
        layers = {name: (weight, tensors.get(f"{name}.bias")) for name, weight in weights.items()}
        untyped: Any = model
        put(model, layers, self.places(model, untyped.device))
        return model

    def places(self, model: nn.Module, device: torch.device, implementation: str | None = None) -> list[Place]:
        """Where the layers of a model go on a device; as `choose_places`."""
        untyped: Any = model
        tied = untyped.config.tie_word_embeddings
        return choose_places(self._quantization, device, tied=tied, implementation=implementation)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every tensor as a checkpoint stores it: packed codes per original layer, biases and the rest as they are."""
        layers = installed_layers(model)
        packed = {*layers, *([HEAD] if EMBED in layers and cast(Any, model).config.tie_word_embeddings else [])}
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not any(name.startswith(f"{layer}.") for layer in _parents(name) & packed)
        }
        for name, (weight, bias) in layers.items():
            stored = dict(weight.tensors()) | ({} if bias is None else {"bias": bias})
            state |= {f"{name}.{key}": tensor.clone() for key, tensor in stored.items()}  # no storage shared
        return state, {}

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _parents(name: str) -> set[str]:
    """Every module path that a tensor's name begins with."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def put(model: nn.Module, layers: dict[str, tuple[QuantizedWeight, Tensor | None]], places: list[Place]) -> None:
    """Install packed layers on the device and in the dtype of a model."""
    untyped: Any = model
    device, dtype = untyped.device, untyped.dtype
    weights = {name: weight.to(device) for name, (weight, _) in layers.items()}
    biases = {name: None if bias is None else bias.to(device, dtype) for name, (_, bias) in layers.items()}
    install(model, weights, biases, places, dtype)


def to_device(model: nn.Module, device: str | torch.device, *, implementation: str | None = None) -> nn.Module:
    """Move a model that `from_pretrained` loaded, and give its layers what runs best there (see `install`).

    ``model.to("cuda")`` alone moves the reference implementation along, which is right and slow.

    Raises:
        CheckpointError: the model is no msq model, or the implementation can't run there.
    """
    untyped: Any = model
    quantizer = getattr(untyped, "hf_quantizer", None)
    if not isinstance(quantizer, MsqQuantizer):
        raise CheckpointError("expected a model that from_pretrained loaded from an msq checkpoint; use .to(device).")
    target = torch.device(device)
    places = quantizer.places(model, target, implementation)
    layers = installed_layers(model)
    model.to(target)
    put(model, layers, places)
    return model
