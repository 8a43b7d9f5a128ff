"""Linear modules that run on quantized weights, and the implementations that a plan may name.

An `Implementation` says for which (spec, shape, batch, device) it works, and why not otherwise; the profiler measures
only what is supported, so a plan holds nothing else. `reference` decodes the packed weight in plain torch at every
call: right on any device, slow, and the twin that every kernel is held against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import PackedEmbedding, QuantizedEmbedding
from .errors import KernelError, QuantizerError
from .quantize import QuantizedWeight, decode, from_tensors
from .rotation import rotate
from .specs import TILE, QuantizerSpec


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with W packed; buffers are named as in a checkpoint (`quantize.tensor_shapes`).

    Args:
        weight: the packed layer, or several stacked by `stack`.
        bias: ``(out_features,)`` or None.
    """

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.spec = weight.spec
        self.out_features = weight.out_features
        self.in_features = weight.in_features
        self.rotation_seed = weight.rotation_seed
        for name, tensor in weight.tensors():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.decoded: Tensor | None = None
        """What `keep_decoded` keeps, ``(out_features, in_features)`` float32 in the rotated domain."""

    @property
    def weight(self) -> QuantizedWeight:
        """The packed layer (a view of the buffers)."""
        tensors = dict(self.named_buffers(recurse=False))
        return from_tensors(self.spec, self.out_features, self.in_features, self.rotation_seed, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, computed in float32, returned in the dtype of `x`."""
        turned = x.float() if self.rotation_seed is None else rotate(x, self.rotation_seed)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(turned, decode(self.weight) if self.decoded is None else self.decoded, bias).to(x.dtype)

    def keep_decoded(self) -> None:
        """Decode now, once for all calls: many times as fast, at 4 bytes a weight; for the device it is on now."""
        self.decoded = decode(self.weight)

    def extra_repr(self) -> str:
        return f"{self.spec.label}, in_features={self.in_features}, out_features={self.out_features}"


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight with the rows of several: what a fused kernel runs.

    Raises:
        QuantizerError: they differ in quantizer, codebook, input or rotation, or a part has unfilled tiles.
    """
    first = weights[0]
    for other in weights[1:]:
        if (other.spec, other.in_features, other.rotation_seed) != (first.spec, first.in_features, first.rotation_seed):
            raise QuantizerError(
                f"fused layers must share quantizer, input and rotation; got {first.spec.label} of {first.in_features} "
                f"inputs (seed {first.rotation_seed}) and {other.spec.label} of {other.in_features} "
                f"(seed {other.rotation_seed})."
            )
        if not torch.equal(other.codebook, first.codebook):
            raise QuantizerError(f"fused {first.spec.label} layers must share one codebook; theirs differ.")
    for part in weights[:-1]:
        if part.out_features % TILE:
            raise QuantizerError(f"a fused layer needs rows in multiples of {TILE}; got {part.out_features}.")
    packed = tuple(torch.cat(parts) for parts in zip(*(w.packed for w in weights), strict=True))
    rows = sum(w.out_features for w in weights)
    scales = torch.cat([w.scales for w in weights])
    return QuantizedWeight(first.spec, rows, first.in_features, first.rotation_seed, packed, scales, first.codebook)


def unstack(weight: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """Inverse of `stack`: the weights that it was made of, `rows` of each."""
    found, start = [], 0
    for count in rows:
        tiles = slice(start // TILE, -(-(start + count) // TILE))
        packed = tuple(part[tiles] for part in weight.packed)
        scales = weight.scales[start : start + count]
        found.append(replace(weight, out_features=count, packed=packed, scales=scales))
        start += count
    return found


class FusedLinear(nn.Module):
    """Several layers of one input as one product; `slices` are the modules to put where the layers were.

    The slice that is called first with an input runs the product for all; the others hand out their rows of it. A slice
    called with any other input runs the product anew, so the order of calls does not matter for the result. An input
    changed in place between two slices counts as another one, except in inference mode, where torch hides the change.

    Args:
        weights: packed layers that `stack` takes.
        biases: ``(out_features,)`` or None for each.
        implementation: what runs the product; None for the reference.

    Attributes:
        linear: the module that runs the product.
        rows: of each layer.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor | None],
        implementation: Implementation | None = None,
    ) -> None:
        super().__init__()
        rows = [w.out_features for w in weights]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [w.scales.new_zeros(w.out_features) if b is None else b for w, b in zip(weights, biases, strict=True)]
            )
        self.linear = (implementation or ReferenceImplementation()).linear(stack(weights), bias)
        self.rows = rows
        self._input: tuple[Tensor, int | None] | None = None
        self._waiting: dict[int, Tensor] = {}

    def slices(self) -> list[FusedSlice]:
        """One module per layer, in order; the first one owns the weights."""
        return [FusedSlice(self, index) for index in range(len(self.rows))]

    def rows_of(self, index: int, x: Tensor) -> Tensor:
        """The output of layer `index` for `x`, ``(..., rows[index])``."""
        version = None if x.is_inference() else x._version  # inference tensors don't count their changes
        known = self._input is not None and self._input[0] is x and self._input[1] == version
        if not known or index not in self._waiting:
            self._input = (x, version)
            self._waiting = dict(enumerate(self.linear(x).split(self.rows, dim=-1)))
        result = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return result


class FusedSlice(nn.Module):
    """The place of one layer in a `FusedLinear`."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self.index = index
        self._shared = [fused]  # in a list, so that only the first slice registers it as a submodule
        if index == 0:
            self.fused = fused

    @property
    def fused_linear(self) -> FusedLinear:
        """What runs the product of all slices."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_linear.rows_of(self.index, x)

    def extra_repr(self) -> str:
        fused = self.fused_linear
        return f"rows {self.index} of {len(fused.rows)}, {fused.linear.extra_repr()}"


class Lookup(ABC):
    """A way to look rows of a quantized layer up.

    Attributes:
        name: as in latency tables and plans.
    """

    name: str

    @abstractmethod
    def unsupported_reason(
        self, spec: QuantizerSpec, out_features: int, in_features: int, batch_size: int, device: torch.device
    ) -> str | None:
        """None where it works, else one sentence that says why not."""

    @abstractmethod
    def embedding(self, weight: QuantizedWeight, dtype: torch.dtype) -> PackedEmbedding:
        """The module that looks rows up and gives them in `dtype`."""


class Implementation(Lookup):
    """A way to run a quantized layer; what runs products looks rows up as well."""

    @abstractmethod
    def linear(self, weight: QuantizedWeight, bias: Tensor | None = None) -> nn.Module:
        """The module that runs a layer."""


class ReferenceImplementation(Implementation):
    """Decode in torch, then multiply; any shape, batch and device."""

    name = "reference"

    def unsupported_reason(
        self, spec: QuantizerSpec, out_features: int, in_features: int, batch_size: int, device: torch.device
    ) -> str | None:
        return None

    def linear(self, weight: QuantizedWeight, bias: Tensor | None = None) -> nn.Module:
        return QuantizedLinear(weight, bias)

    def embedding(self, weight: QuantizedWeight, dtype: torch.dtype) -> PackedEmbedding:
        return QuantizedEmbedding(QuantizedLinear(weight), dtype)


def _no_compiler_reason() -> str | None:
    """None where kernels can be compiled, else one sentence that says why not."""
    from .cuda.compiler import compiler_version

    try:
        compiler_version()
    except KernelError as cause:
        return str(cause)
    return None


class TensorCoreImplementation(Implementation):
    """Kernels that decode into the operands of tensor cores, for CUDA devices from sm_80 on."""

    name = "tensor_core"

    def unsupported_reason(
        self, spec: QuantizerSpec, out_features: int, in_features: int, batch_size: int, device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return f"{self.name} kernels need a CUDA device; got '{device}'."
        from .cuda.decode import MAX_BATCH, unsupported_reason

        # Above the decode kernels' batches the module dequantizes and multiplies, which any batch may.
        batch_size = min(batch_size, MAX_BATCH)
        return _no_compiler_reason() or unsupported_reason(spec, out_features, in_features, batch_size, device)

    def linear(self, weight: QuantizedWeight, bias: Tensor | None = None) -> nn.Module:
        from .cuda.linear import KernelLinear

        return KernelLinear(weight, bias)

    def embedding(self, weight: QuantizedWeight, dtype: torch.dtype) -> PackedEmbedding:
        from .cuda.embedding import KernelEmbedding
        from .cuda.linear import KernelLinear

        return KernelEmbedding(KernelLinear(weight), dtype)


class LookupKernel(Lookup):
    """A kernel that decodes the asked rows alone, for CUDA devices from sm_80 on."""

    name = "lookup"

    def unsupported_reason(
        self, spec: QuantizerSpec, out_features: int, in_features: int, batch_size: int, device: torch.device
    ) -> str | None:
        from .cuda.decode import unsupported_weight_reason

        return _no_compiler_reason() or unsupported_weight_reason(spec, out_features, in_features, device)

    def embedding(self, weight: QuantizedWeight, dtype: torch.dtype) -> PackedEmbedding:
        return TensorCoreImplementation().embedding(weight, dtype)


IMPLEMENTATIONS: dict[str, Implementation] = {
    i.name: i for i in (ReferenceImplementation(), TensorCoreImplementation())
}
"""Every implementation, by name; `unsupported_reason` says which work here."""
LOOKUPS: dict[str, Lookup] = {i.name: i for i in (ReferenceImplementation(), LookupKernel())}
"""What an embedding of its own may run on; one that is the head's weight too runs on the head's implementation."""
