"""Models of random packed weights from a config and a plan: the right bytes in the right shapes, to time and to test.

What a kernel costs does not depend on its codes, so tokens per second of a plan can be measured without the model's
weights, on any device that holds the packed ones.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.random_weight import ROTATION_SEED, random_weight
from ...kernels.specs import TILE, Family, QuantizerSpec
from ...profiles.schema import EMBED, HEAD, ROLES
from ..plan import Plan, PlannedLayer, PlanQuantizer
from .errors import CheckpointError
from .install import KERNELS, LOOKUP, choose_places, install
from .load import fresh_buffers
from .manifest import QuantizationConfig, QuantizedLayer

_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def linear_layers(model: nn.Module, *, head: bool, embedding: bool = False) -> list[str]:
    """Paths of the layers that a plan may hold: with `embedding` its own, those of the blocks, with `head` its own."""
    blocks = [name for name, module in model.named_modules() if name.rpartition(".")[2] in ROLES]
    return [*([EMBED] if embedding else []), *blocks, *([HEAD] if head else [])]


def model_without_weights(config: Any) -> nn.Module:
    """The stock model of a transformers config, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def uniform_quantization(
    config: Any,
    spec: QuantizerSpec,
    *,
    head: QuantizerSpec | None = None,
    embedding: QuantizerSpec | None = None,
    fused: bool = True,
) -> QuantizationConfig:
    """One quantizer for every layer of every block.

    Args:
        head: of the output layer; None leaves it as it is.
        embedding: likewise; where the config ties the head to it, they are one layer, and `head` counts for nothing.
        fused: whether layers of one input run as one kernel, where their rows fill its tiles.
    """
    model = model_without_weights(config)
    planned = []
    tied = embedding is not None and config.tie_word_embeddings
    outside = {EMBED: embedding} | ({} if tied else {HEAD: head})
    flags = {"head": not tied and head is not None, "embedding": embedding is not None}
    for name in linear_layers(model, **flags):
        parent, _, role = name.rpartition(".")
        together = next((roles for roles in _FUSED if role in roles), {role}) if fused else {role}
        pattern = tuple(f"{parent}.{other}" for other in ROLES if other in together) or (name,)
        if any(cast(nn.Linear, model.get_submodule(path)).out_features % TILE for path in pattern[:-1]):
            pattern = (name,)
        chosen = outside.get(name) or spec
        runs = LOOKUP if name == EMBED and not tied else KERNELS
        planned.append(PlannedLayer(layer=name, quantizer=chosen.label, implementation=runs, pattern=pattern))
    specs = {chosen.label: chosen for chosen in (spec, *outside.values()) if chosen is not None}
    fields = {label: PlanQuantizer.model_validate(asdict(chosen)) for label, chosen in specs.items()}
    return _described(model, planned, fields)


def planned_quantization(config: Any, plan: Plan) -> QuantizationConfig:
    """What a checkpoint of a plan would say of its layers.

    Raises:
        CheckpointError: the plan has a layer that the config's model lacks.
    """
    return _described(model_without_weights(config), plan.layers, plan.quantizers)


def _described(model: nn.Module, planned: Any, quantizers: dict[str, PlanQuantizer]) -> QuantizationConfig:
    modules = dict(model.named_modules())
    layers = {}
    for entry in planned:
        module = modules.get(entry.layer)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise CheckpointError(
                f"the plan has a layer {entry.layer}, which a {type(model).__name__} of this config lacks; plan for it."
            )
        rotated = quantizers[entry.quantizer].family is not Family.INT
        layers[entry.layer] = QuantizedLayer(
            quantizer=entry.quantizer,
            out_features=module.weight.shape[0],
            in_features=module.weight.shape[1],
            rotation_seed=ROTATION_SEED if rotated else None,
            pattern=entry.pattern,
            implementation=entry.implementation,
        )
    return QuantizationConfig(quantizers=quantizers, layers=layers)


def random_model(
    config: Any,
    quantization: QuantizationConfig | None,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    implementation: str | None = None,
    fused: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A stock model with random weights, packed ones in the places that `quantization` names; in evaluation mode.

    Args:
        config: of a transformers model; its head is untied where it is quantized.
        quantization: of `uniform_quantization` or `planned_quantization`; None for a model of stock layers alone.
        dtype: of the other weights, and so of activations.
        implementation, fused: as for `install.choose_places`.
    """
    if quantization is not None and HEAD in quantization.layers:
        config.tie_word_embeddings = False
    model = model_without_weights(config)
    generator = torch.Generator(device).manual_seed(seed)
    if quantization is not None:
        weights, biases = {}, dict[str, Tensor | None]()
        for name, layer in quantization.layers.items():
            shape = layer.out_features, layer.in_features
            weights[name] = random_weight(quantization.spec(name), *shape, generator)
            has_bias = getattr(model.get_submodule(name), "bias", None) is not None
            biases[name] = torch.zeros(layer.out_features, dtype=dtype, device=device) if has_bias else None
        options = {"tied": config.tie_word_embeddings, "implementation": implementation, "fused": fused}
        install(model, weights, biases, choose_places(quantization, device, **options), dtype)
    filled: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            filled[name] = torch.ones(parameter.shape, dtype=dtype, device=device)
        elif name.endswith("bias"):
            filled[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
        else:
            values = torch.randn(parameter.shape, dtype=dtype, device=device, generator=generator)
            filled[name] = values if "embed" in name else values.mul_(parameter.shape[-1] ** -0.5)
    untyped: Any = model
    untyped.load_state_dict(filled, strict=False, assign=True)
    untyped.tie_weights()
    fresh_buffers(model)
    config.dtype = dtype
    return model.to(device).requires_grad_(False).eval()
