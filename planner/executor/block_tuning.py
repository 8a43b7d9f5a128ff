"""One decoder block by gradient descent: the quantized block shall give what the original one gave."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.quantize import QuantizedWeight, dequantize
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
class Change:
    """A loss before and after tuning.

    Of a block it is the squared error of its output, relative to its power, fed with the quantized model's activations;
    of a model the mean KL divergence to the original, nats a token.
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


def quantized_copy(
    module: nn.Module,
    prefix: str,
    weights: Mapping[str, QuantizedWeight],
    tensors: Mapping[str, Tensor],
    shared: Sequence[Sequence[str]] = (),
) -> nn.Module:
    """A copy of a block or a model that runs on packed layers; an embedding and a head tied to it get decoded weights.

    Args:
        module: the original.
        prefix: what its module paths begin with.
        weights: packed layers by path.
        tensors: by name as in a checkpoint; its scales, codebooks, norms and biases take the place of others.
        shared: paths of layers whose codebook is one parameter; others keep their codebooks.
    """
    changed = {name: with_tensors(weight, name, tensors) for name, weight in weights.items()}
    codebooks: dict[str, nn.Parameter] = {}
    for group in shared:
        book = changed[group[0]].codebook
        if book.numel():
            codebooks |= dict.fromkeys(group, nn.Parameter(book.float()))
    block = copy.deepcopy(module)
    for name, weight in changed.items():
        path = name.removeprefix(prefix)
        place = block.get_submodule(path)
        if isinstance(place, nn.Embedding):
            place.weight.data = dequantize(weight).to(place.weight)
            continue
        bias = getattr(place, "bias", None)
        replace_module(block, path, TunableLinear(weight, bias, codebooks.get(name)))
    for name, parameter in block.named_parameters():
        if prefix + name in tensors:
            parameter.data = tensors[prefix + name].to(parameter, copy=True)  # descent changes it in place
    return block


def tune_block(
    model: StreamedModel,
    module: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    shared: Sequence[Sequence[str]],
    inputs: Sequence[Tensor],
    target: Sequence[Tensor],
) -> tuple[dict[str, Tensor], Change]:
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
    block = quantized_copy(module, model.prefix, weights, {}, shared)
    candidates = [changed_tensors(block, model.prefix, model.stored_dtype)]
    _descend(model, block, inputs, target)
    candidates.append(changed_tensors(block, model.prefix, model.stored_dtype))
    losses = [
        _loss(model, quantized_copy(module, model.prefix, weights, tensors), inputs, target) for tensors in candidates
    ]
    return better(candidates, losses, f"the error of block {model.block}")


def better(
    candidates: Sequence[dict[str, Tensor]], losses: Sequence[float], what: str
) -> tuple[dict[str, Tensor], Change]:
    """What tuning gave, or what it began with where that lost no more.

    Args:
        candidates, losses: before and after tuning.
        what: the losses are, for a message.

    Raises:
        CheckpointError: the loss before is not finite.
    """
    before, after = losses
    if not math.isfinite(before):
        raise CheckpointError(f"{what} is {before}; expected a finite number.")
    improved = after < before
    return candidates[improved], Change(before, after if improved else before)


def changed_tensors(module: nn.Module, prefix: str, stored_dtype: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
    """What a tuned `quantized_copy` changes of a checkpoint, in its dtypes: scales, codebooks, norms and biases.

    Args:
        stored_dtype: of the original's tensors by name.
    """
    layers = {prefix + path: layer for path, layer in module.named_modules() if isinstance(layer, TunableLinear)}
    own = {f"{name}.{part}" for name in layers for part in ("scale_logs", "codebook")}
    learned = {prefix + name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    others = {name: values for name, values in learned.items() if name not in own}
    kept = {name: values.to("cpu", stored_dtype(name), copy=True) for name, values in others.items()}
    return stored_tensors({name: layer.tuned() for name, layer in layers.items()}) | kept


class Descent:
    """Adam with a rate that falls to 0 as a cosine, for all parameters of a module that take gradients.

    Attributes:
        optimizer: holds the moments.
    """

    def __init__(self, module: nn.Module, steps: int, rate: float) -> None:
        """Takes the steps in all and the first rate, relative to the root mean square of a tensor."""
        learned = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        sizes = [1.0 if name.endswith("scale_logs") else _size(parameter) for name, parameter in learned]
        self._rates = [rate * size for size in sizes]
        self.optimizer = torch.optim.Adam([{"params": [parameter]} for _, parameter in learned])
        self._steps = steps

    def step(self, number: int) -> None:
        """One step with the gradients that are there, which are dropped; `number` counts from 0."""
        factor = (1 + math.cos(math.pi * number / self._steps)) / 2
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()


def _descend(model: StreamedModel, block: nn.Module, inputs: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """Lower the squared error of the block's output; attention by plain products, whose gradients repeat exactly."""
    generator = torch.Generator().manual_seed(model.block)
    order = [number for _ in range(EPOCHS) for number in torch.randperm(len(inputs), generator=generator).tolist()]
    descent = Descent(block, len(order), LEARNING_RATE)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for step, number in enumerate(order):
            wanted = target[number].to(model.device)
            found = block(inputs[number].to(model.device), **model.arguments(number))
            ((found - wanted).square().sum() / wanted.square().sum()).backward()
            descent.step(step)


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
