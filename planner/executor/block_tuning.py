"""One decoder block by gradient descent: the quantized block shall give what the original one gave."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.quantize import QuantizedWeight
from ...kernels.tunable import TunableLinear
from ...profiles.streaming import StreamedModel
from .errors import CheckpointError
from .install import replace_module

EPOCHS = 8
"""Passes over the tokens."""
LEARNING_RATE = 3e-3
"""Of Adam, relative to the root mean square of a tensor; falls to 0 as a cosine."""
TUNED = ("scales", "codebook")
"""Tensors of a packed layer that tuning replaces."""


@dataclass(frozen=True)
class BlockLoss:
    """Squared error of a block's output, relative to its power, fed with the quantized model's activations.

    Attributes:
        before: with the weights that tuning began with.
        after: as it was tuned.
    """

    before: float
    after: float


def stored_tensors(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Scales and codebooks of layers by their names in a checkpoint, copied to the CPU."""
    return {
        f"{layer}.{name}": tensor.to("cpu", copy=True)
        for layer, weight in weights.items()
        for name, tensor in weight.tensors()
        if name in TUNED
    }


def with_tensors(weight: QuantizedWeight, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """A layer with the scales and codebook of `stored_tensors`, as far as they are there."""
    device = weight.scales.device
    scales = tensors.get(f"{layer}.scales", weight.scales).to(device)
    return replace(weight, scales=scales, codebook=tensors.get(f"{layer}.codebook", weight.codebook).to(device))


def quantized_block(
    module: nn.Module, prefix: str, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a block that runs on packed layers.

    Args:
        module: the original block.
        prefix: what its module paths begin with.
        weights: packed layers by path.
        tensors: by name as in a checkpoint; its scales, codebooks, norms and biases take the place of others.
    """
    changed = {name: with_tensors(weight, name, tensors) for name, weight in weights.items()}
    block = _with_layers(module, prefix, changed, {})
    for name, parameter in block.named_parameters():
        if prefix + name in tensors:
            parameter.data = tensors[prefix + name].to(parameter)
    return block


def tune_block(
    model: StreamedModel,
    module: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    shared: Sequence[Sequence[str]],
    inputs: Sequence[Tensor],
    target: Sequence[Tensor],
) -> tuple[dict[str, Tensor], BlockLoss]:
    """Tune row scales, codebooks, norms and biases of a block.

    Args:
        model: whose next block it is, for its arguments.
        module: the original block, float32.
        weights: its packed layers by module path.
        shared: paths of layers that share a codebook; every layer once.
        inputs, target: batches of what enters the block in the quantized model and leaves it in the original one.

    Returns:
        Tensors by name and in the dtype of a checkpoint, and the loss. They are those it began with where tuning did
        not lower the loss.

    Raises:
        CheckpointError: the loss is not finite.
    """
    codebooks: dict[str, nn.Parameter] = {}
    for group in shared:
        book = weights[group[0]].codebook
        if book.numel():
            codebooks |= dict.fromkeys(group, nn.Parameter(book.float()))
    block = _with_layers(module, model.prefix, weights, codebooks)
    candidates = [_checkpoint_tensors(model, block)]
    _descend(model, block, inputs, target)
    candidates.append(_checkpoint_tensors(model, block))
    before, after = (
        _loss(model, quantized_block(module, model.prefix, weights, tensors), inputs, target) for tensors in candidates
    )
    if not math.isfinite(before):
        raise CheckpointError(f"the error of block {model.block} is {before}; expected a finite number.")
    improved = after < before
    return candidates[improved], BlockLoss(before, after if improved else before)


def _with_layers(
    module: nn.Module, prefix: str, weights: Mapping[str, QuantizedWeight], codebooks: Mapping[str, nn.Parameter]
) -> nn.Module:
    block = copy.deepcopy(module)
    for name, weight in weights.items():
        path = name.removeprefix(prefix)
        bias = getattr(module.get_submodule(path), "bias", None)
        replace_module(block, path, TunableLinear(weight, bias, codebooks.get(name)))
    return block


def _checkpoint_tensors(model: StreamedModel, block: nn.Module) -> dict[str, Tensor]:
    """What a tuned block changes of a checkpoint: scales, codebooks, norms and biases."""
    layers = {model.prefix + path: layer for path, layer in block.named_modules() if isinstance(layer, TunableLinear)}
    own = {f"{name}.{part}" for name in layers for part in ("scale_logs", "codebook")}
    rest = {model.prefix + name: parameter.detach() for name, parameter in block.named_parameters()}
    kept = {name: tensor.to("cpu", model.stored_dtype(name)) for name, tensor in rest.items() if name not in own}
    return stored_tensors({name: layer.tuned() for name, layer in layers.items()}) | kept


def _descend(model: StreamedModel, block: nn.Module, inputs: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Adam on the squared error of the block's output; attention by plain products, whose gradients repeat exactly."""
    groups = [
        {"params": [parameter], "lr": LEARNING_RATE * (1.0 if name.endswith("scale_logs") else _size(parameter))}
        for name, parameter in block.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    steps = EPOCHS * len(inputs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(model.block)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(EPOCHS):
            for number in torch.randperm(len(inputs), generator=generator).tolist():
                wanted = target[number].to(model.device)
                found = block(inputs[number].to(model.device), **model.arguments(number))
                optimizer.zero_grad()
                ((found - wanted).square().sum() / wanted.square().sum()).backward()
                optimizer.step()
                schedule.step()


def _size(parameter: Tensor) -> float:
    """Root mean square; 1 for zeros, such as fresh biases."""
    return float(parameter.detach().square().mean().sqrt()) or 1.0


@torch.no_grad()
def _loss(model: StreamedModel, block: nn.Module, inputs: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Squared error over all batches, relative to the power of the target; not finite where descent went astray."""
    error = power = 0.0
    for number, batch in enumerate(target):
        wanted = batch.to(model.device)
        found = block(inputs[number].to(model.device), **model.arguments(number))
        error += float((found - wanted).square().sum(dtype=torch.float64))
        power += float(wanted.square().sum(dtype=torch.float64))
    return error / power
