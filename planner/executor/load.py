"""Load a checkpoint into the stock Hugging Face model, with its planned layers swapped for quantized modules.

The model is built without weights, the layers of each pattern are replaced by one (possibly fused) module, and the rest
of the tensors is filled in from the checkpoint. Decoded weights equal those that were saved, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...kernels.errors import QuantizerError
from ...kernels.linear import IMPLEMENTATIONS, FusedLinear
from ...kernels.quantize import QuantizedWeight, from_tensors
from ...profiles.models import choose_device, load_config
from .errors import CheckpointError
from .manifest import QuantizationConfig, parse_quantization_config, read_manifest


def load_checkpoint(directory: Path, *, device: str = "cpu", fused: bool = True) -> nn.Module:
    """The model of a checkpoint, in evaluation mode; unplanned weights in float32 on a CPU, as stored on a GPU.

    Args:
        fused: run patterns as the plan says; False runs every layer alone, with the same result up to rounding.

    Raises:
        CheckpointError: no checkpoint, a changed or truncated file, or tensors that don't fit the config.
    """
    from transformers import AutoModelForCausalLM

    target = choose_device(device)
    manifest = read_manifest(directory)
    config = load_config(directory)
    quantization = parse_quantization_config(getattr(config, "quantization_config", None), f"{directory}/config.json")
    del config.quantization_config
    tensors = read_tensors([directory / name for name in sorted(manifest.files) if name.endswith(".safetensors")])
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    rest = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in quantization.layers}
    biases = {name: tensors.get(f"{name}.bias") for name in quantization.layers}
    if target.type == "cpu":
        rest = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in rest.items()}
    install(model, quantized_weights(quantization, tensors), biases, quantization.patterns(), fused=fused)
    _fill(model, rest, directory)
    return model.to(target).eval()


def quantized_weights(quantization: QuantizationConfig, tensors: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The packed layers of a checkpoint by name.

    Raises:
        CheckpointError: a tensor is missing or of the wrong shape.
    """
    weights = {}
    for name, layer in quantization.layers.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        try:
            weights[name] = from_tensors(
                quantization.spec(name), layer.out_features, layer.in_features, layer.rotation_seed, own
            )
        except QuantizerError as cause:
            raise CheckpointError(f"{name}: {cause} Apply the plan again.") from cause
    return weights


def install(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, Tensor | None],
    patterns: Sequence[tuple[str, ...]],
    *,
    fused: bool = True,
) -> None:
    """Put quantized modules in the places of a model's linear layers, in place.

    Args:
        model: module tree that has something at the layers' paths.
        weights: every layer of `patterns`.
        biases: likewise, ``(out_features,)`` or None.
        patterns: layers that run as one product.
    """
    implementation = IMPLEMENTATIONS["reference"]
    for pattern in patterns:
        if fused and len(pattern) > 1:
            together = FusedLinear([weights[name] for name in pattern], [biases[name] for name in pattern])
            for name, module in zip(pattern, together.slices(), strict=True):
                _replace(model, name, module)
        else:
            for name in pattern:
                _replace(model, name, implementation.linear(weights[name], biases[name]))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def read_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files.

    Raises:
        CheckpointError: a file is damaged, holds a name that another one has, or NaN or infinite numbers.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in tensors:
                        raise CheckpointError(f"'{name}' is in {path} and in another file; apply the plan again.")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(f"{path} is not a whole safetensors file ({cause}); apply the plan again.") from cause
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"'{name}' holds NaN or infinite numbers; apply the plan again.")
    return tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Give the unplanned parameters their stored values and recompute what is never stored."""
    untyped: Any = model
    unexpected = untyped.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    untyped.tie_weights()
    for module in list(model.modules()):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # rotary frequencies: computed from the config, never stored
                fresh: Any = type(module)(config=untyped.config)
                setattr(module, name, getattr(fresh, name))
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unexpected:
        odd = f"lacks {empty[0]}" if empty else f"has the unknown tensor {unexpected[0]}"
        raise CheckpointError(f"the checkpoint {directory} {odd}; apply the plan again.")
