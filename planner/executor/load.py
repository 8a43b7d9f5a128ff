"""Load a checkpoint into the stock Hugging Face model, with its planned layers swapped for quantized modules.

The model is built without weights, the layers of each pattern are replaced by one (possibly fused) module, and the rest
of the tensors is filled in from the checkpoint. Decoded weights equal those that were saved, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...kernels.codebooks import check_levels
from ...kernels.errors import QuantizerError
from ...kernels.quantize import QuantizedWeight, from_tensors, tensor_shapes
from ...profiles.models import choose_device, load_config
from ...profiles.schema import HEAD
from .errors import CheckpointError
from .install import REFERENCE, choose_places, install
from .manifest import QuantizationConfig, parse_quantization_config, read_manifest


def load_checkpoint(
    directory: Path,
    *,
    device: str = "cpu",
    fused: bool = True,
    implementation: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model of a checkpoint, in evaluation mode.

    Args:
        fused: run patterns as the plan says; False runs every layer alone, with the same result up to rounding.
        implementation: what every layer runs on; None for the plan's choice, on a CPU the reference (see `install`).
        dtype: of the unplanned weights and so of activations; None for float32 on a CPU and as stored on a GPU, where
            bfloat16 stands for float32, which kernels don't take.

    Raises:
        CheckpointError: no checkpoint, a changed or truncated file, tensors that don't fit the config, or an
            implementation that can't run here.
    """
    from transformers import AutoModelForCausalLM

    target = choose_device(device)
    manifest = read_manifest(directory)
    config = load_config(directory)
    quantization = parse_quantization_config(getattr(config, "quantization_config", None), f"{directory}/config.json")
    del config.quantization_config
    if HEAD in quantization.layers:
        config.tie_word_embeddings = False  # a quantized head is its own weight, whatever it was made from
    places = choose_places(
        quantization, target, tied=config.tie_word_embeddings, implementation=implementation, fused=fused
    )
    tensors = read_tensors([directory / name for name in sorted(manifest.files) if name.endswith(".safetensors")])
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    rest = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in quantization.layers}
    wanted = dtype or _default_dtype(rest, target, kernels=any(place.implementation != REFERENCE for place in places))
    rest = {name: tensor.to(target, wanted if tensor.is_floating_point() else None) for name, tensor in rest.items()}
    weights = {name: weight.to(target) for name, weight in quantized_weights(quantization, tensors).items()}
    biases = {name: tensors.get(f"{name}.bias") for name in quantization.layers}
    moved = {name: None if bias is None else bias.to(target, wanted) for name, bias in biases.items()}
    install(model, weights, moved, places, wanted)
    _fill(model, rest, directory)
    config.dtype = wanted
    return model.to(target).eval()


def _default_dtype(tensors: Mapping[str, Tensor], device: torch.device, *, kernels: bool) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    stored = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float16)
    return torch.bfloat16 if kernels and stored == torch.float32 else stored


def quantized_weights(quantization: QuantizationConfig, tensors: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """The packed layers of a checkpoint by name.

    Raises:
        CheckpointError: a tensor is missing, unknown or of the wrong shape, or a codebook holds what is no level.
    """
    weights = {}
    for name, layer in quantization.layers.items():
        prefix = f"{name}."
        spec, size = quantization.spec(name), (layer.out_features, layer.in_features)
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        try:
            weights[name] = from_tensors(spec, *size, layer.rotation_seed, own)
            check_levels(spec, weights[name].codebook)
        except QuantizerError as cause:
            raise CheckpointError(f"{name}: {cause} Apply the plan again.") from cause
        unknown = sorted(own.keys() - tensor_shapes(spec, *size).keys() - {"bias"})
        if unknown:
            raise CheckpointError(f"{name} has the unknown tensor {unknown[0]}; apply the plan again.")
    return weights


def read_tensors(paths: Sequence[Path], layers: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint's safetensors files.

    Args:
        layers: read only what belongs to these; None for all.

    Raises:
        CheckpointError: a file is damaged, holds a name that another one has, or NaN or infinite numbers.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if layers is not None and name.rpartition(".")[0] not in layers:
                        continue
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
    fresh_buffers(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unexpected:
        odd = f"lacks {empty[0]}" if empty else f"has the unknown tensor {unexpected[0]}"
        raise CheckpointError(f"the checkpoint {directory} {odd}; apply the plan again.")


def fresh_buffers(model: nn.Module) -> None:
    """Compute the buffers of a model built without weights that are never stored: rotary frequencies."""
    config = cast(Any, model).config
    for module in list(model.modules()):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                fresh: Any = type(module)(config=config)
                setattr(module, name, getattr(fresh, name))
