"""Quantized modules into the places of a stock model's linear layers and embedding, each with its implementation.

On a CPU everything runs on `reference`. On a CUDA device a layer runs on the implementation that the plan names; where
the plan names `reference` (it was made for another machine), kernels run what they can and `reference` the rest.
Whoever asks for an implementation by name gets it everywhere, or one sentence that says why not. An embedding alone is
looked up by `lookup` where products run on kernels; one that is the head as well has the head's implementation, and one
module holds the weight of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.cuda.linear import KernelLinear
from ...kernels.embedding import PackedEmbedding
from ...kernels.linear import IMPLEMENTATIONS, LOOKUPS, FusedLinear, FusedSlice, Lookup, QuantizedLinear, unstack
from ...kernels.quantize import QuantizedWeight
from ...profiles.schema import EMBED, HEAD
from .errors import CheckpointError
from .manifest import QuantizationConfig

REFERENCE, KERNELS, LOOKUP = "reference", "tensor_core", "lookup"


@dataclass(frozen=True)
class Place:
    """Layers that run as one product.

    Attributes:
        layers: module paths, in the order in which their rows are stacked.
        implementation: a name of `IMPLEMENTATIONS`; of `LOOKUPS` for an embedding of its own.
        tied: the layer is the embedding, and the head too.
    """

    layers: tuple[str, ...]
    implementation: str
    tied: bool = False


def choose_places(
    quantization: QuantizationConfig,
    device: torch.device,
    *,
    tied: bool = False,
    implementation: str | None = None,
    fused: bool = True,
) -> list[Place]:
    """Which layers of a checkpoint run together, and on what.

    Args:
        tied: whether the head's weight is the embedding (``tie_word_embeddings`` of the config).
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
    places = []
    for names in patterns:
        alone = names == (EMBED,) and not tied
        asked = LOOKUP if alone and implementation == KERNELS else implementation
        chosen = _choose(quantization, names, device, asked, LOOKUPS if alone else IMPLEMENTATIONS)
        places.append(Place(names, chosen, tied=tied and names == (EMBED,)))
    return places


def _choose(
    quantization: QuantizationConfig,
    names: tuple[str, ...],
    device: torch.device,
    asked: str | None,
    offered: Mapping[str, Lookup],
) -> str:
    layers = [quantization.layers[name] for name in names]
    rows = sum(layer.out_features for layer in layers)

    def reason(name: str) -> str | None:
        if name not in offered:
            return f"this version of msq has {', '.join(offered)}."
        spec = quantization.spec(names[0])
        return offered[name].unsupported_reason(spec, rows, layers[0].in_features, 1, device)

    planned, kernels = layers[0].implementation, next(name for name in offered if name != REFERENCE)
    if asked is None and (device.type == "cpu" or planned == REFERENCE):
        return REFERENCE if device.type == "cpu" or reason(kernels) is not None else kernels
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
    dtype: torch.dtype,
) -> None:
    """Put quantized modules in the places of a model's linear layers and embedding, in place.

    Args:
        model: module tree that has something at the layers' paths.
        weights: every layer of `places`.
        biases: likewise, ``(out_features,)`` or None.
        dtype: of the activations, which an embedding makes.
    """
    for place in places:
        if place.layers == (EMBED,):
            _install_embedding(model, weights[EMBED], place, dtype)
            continue
        implementation = IMPLEMENTATIONS[place.implementation]
        if len(place.layers) > 1:
            chosen = [weights[name] for name in place.layers], [biases[name] for name in place.layers]
            for name, module in zip(place.layers, FusedLinear(*chosen, implementation).slices(), strict=True):
                replace_module(model, name, module)
        else:
            (name,) = place.layers
            replace_module(model, name, implementation.linear(weights[name], biases[name]))


def _install_embedding(model: nn.Module, weight: QuantizedWeight, place: Place, dtype: torch.dtype) -> None:
    offered: Mapping[str, Lookup] = IMPLEMENTATIONS if place.tied else LOOKUPS
    embedding = offered[place.implementation].embedding(weight, dtype)
    replace_module(model, EMBED, embedding)
    if place.tied:
        replace_module(model, HEAD, embedding.linear)
        leave_untied(model)


def leave_untied(model: nn.Module) -> None:
    """Keep transformers from tying parameters of an embedding and a head that are one packed module."""
    untyped: Any = model
    untyped._tied_weights_keys = None
    untyped.all_tied_weights_keys = {}


def installed_layers(model: nn.Module) -> dict[str, tuple[QuantizedWeight, Tensor | None]]:
    """Packed weight and bias of every quantized layer of a model, by path: what `install` was given."""
    found: dict[str, tuple[QuantizedWeight, Tensor | None]] = {}
    apart: dict[int, tuple[list[QuantizedWeight], list[Tensor | None]]] = {}
    looked_up = {module.linear for module in model.modules() if isinstance(module, PackedEmbedding)}
    for path, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            found[path] = module.weight, None
        elif module in looked_up:
            continue
        elif isinstance(module, FusedSlice):
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
