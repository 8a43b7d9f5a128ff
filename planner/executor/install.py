"""Quantized modules into the places of a stock model's linear layers, each with the implementation it shall run on.

On a CPU everything runs on `reference`. On a CUDA device a layer runs on the implementation that the plan names; where
the plan names `reference` (it was made for another machine), kernels run what they can and `reference` the rest.
Whoever asks for an implementation by name gets it everywhere, or one sentence that says why not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.cuda.linear import KernelLinear
from ...kernels.linear import IMPLEMENTATIONS, FusedLinear, FusedSlice, QuantizedLinear, unstack
from ...kernels.quantize import QuantizedWeight
from .errors import CheckpointError
from .manifest import QuantizationConfig

REFERENCE, KERNELS = "reference", "tensor_core"


@dataclass(frozen=True)
class Place:
    """Layers that run as one product.

    Attributes:
        layers: module paths, in the order in which their rows are stacked.
        implementation: a name of `IMPLEMENTATIONS`.
    """

    layers: tuple[str, ...]
    implementation: str


def choose_places(
    quantization: QuantizationConfig, device: torch.device, *, implementation: str | None = None, fused: bool = True
) -> list[Place]:
    """Which layers of a checkpoint run together, and on what.

    Args:
        implementation: for every layer; None for those of the plan, as far as they are for this kind of device.
        fused: run patterns as the plan says; False runs every layer alone.

    Raises:
        CheckpointError: an implementation is unknown, or can't run a layer on this device.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise CheckpointError(f"expected an implementation of {', '.join(IMPLEMENTATIONS)}; got '{implementation}'.")
    patterns = quantization.patterns()
    if not fused:
        patterns = [(name,) for pattern in patterns for name in pattern]
    return [Place(names, _choose(quantization, names, device, implementation)) for names in patterns]


def _choose(quantization: QuantizationConfig, names: tuple[str, ...], device: torch.device, asked: str | None) -> str:
    layers = [quantization.layers[name] for name in names]
    rows = sum(layer.out_features for layer in layers)

    def reason(name: str) -> str | None:
        if name not in IMPLEMENTATIONS:
            return f"this version of msq has {', '.join(IMPLEMENTATIONS)}."
        spec = quantization.spec(names[0])
        return IMPLEMENTATIONS[name].unsupported_reason(spec, rows, layers[0].in_features, 1, device)

    planned = layers[0].implementation
    if asked is None and (device.type == "cpu" or planned == REFERENCE):
        return REFERENCE if device.type == "cpu" or reason(KERNELS) is not None else KERNELS
    wanted = planned if asked is None else asked
    why = reason(wanted)
    if why is not None:
        raise CheckpointError(
            f"{'+'.join(names)} can't run on {wanted}: {why} Load it with the implementation {REFERENCE}, which runs "
            "anywhere and slowly, or plan for this device."
        )
    return wanted


def install(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, Tensor | None],
    places: Sequence[Place],
) -> None:
    """Put quantized modules in the places of a model's linear layers, in place.

    Args:
        model: module tree that has something at the layers' paths.
        weights: every layer of `places`.
        biases: likewise, ``(out_features,)`` or None.
    """
    for place in places:
        implementation = IMPLEMENTATIONS[place.implementation]
        if len(place.layers) > 1:
            chosen = [weights[name] for name in place.layers], [biases[name] for name in place.layers]
            for name, module in zip(place.layers, FusedLinear(*chosen, implementation).slices(), strict=True):
                replace_module(model, name, module)
        else:
            (name,) = place.layers
            replace_module(model, name, implementation.linear(weights[name], biases[name]))


def installed_layers(model: nn.Module) -> dict[str, tuple[QuantizedWeight, Tensor | None]]:
    """Packed weight and bias of every quantized layer of a model, by path: what `install` was given."""
    found: dict[str, tuple[QuantizedWeight, Tensor | None]] = {}
    apart: dict[int, tuple[list[QuantizedWeight], list[Tensor | None]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedSlice):
            whole = module.fused_linear
            if id(whole) not in apart:
                linear = cast(QuantizedLinear | KernelLinear, whole.linear)
                rows = whole.rows
                shares = [None] * len(rows) if linear.bias is None else list(linear.bias.split(rows))
                apart[id(whole)] = unstack(linear.weight, rows), shares
            weights, biases = apart[id(whole)]
            found[path] = weights[module.index], biases[module.index]
        elif isinstance(module, QuantizedLinear | KernelLinear) and path.rpartition(".fused.")[0] not in found:
            found[path] = module.weight, module.bias
    return found


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path such as ``model.layers.0.mlp.up_proj``."""
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
