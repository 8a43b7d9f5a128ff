"""The kernels as torch operators: traceable, capturable, on torch's current stream and the device of their arguments.

Each operator has one implementation for CUDA, which launches kernels, one for the CPU, which is its readable twin, and
one on shapes alone for tracing. All state is in the arguments: an operator allocates its result and what it needs while
it runs, nothing that outlives the call, as graph capture wants it. They are for inference: none has a gradient.

    msq::rotate(x, signs, matrices)                              x diag(s) H
    msq::rotate_normed(x, weight, epsilon, signs, matrices)      the same after an RMS norm
    msq::rotate_gated(gate, up, signs, matrices)                 the same after silu(gate) * up
    msq::multiply(x, weight..., bias, workspace)                 x W^T + bias of rotated rows
    msq::dequantize(weight..., in_features, dtype)               W itself, in the rotated domain

`signs` and `matrices` are those of `hadamard.rotation_tables`; a weight is the ``units``, ``scales`` and ``codebook``
of `layout.prepare` and the three fields of its spec. Results have the dtype of `x`, which may have any leading shape;
inside, everything is float32. Up to `DECODE_LIMIT` rows `multiply` decodes while it multiplies, where a block's shared
memory is enough for them; else the weight is written out in the dtype of `x` for cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizerError
from ..hadamard import apply_hadamard, hadamard_plan
from ..quantize import decode as decode_weight
from ..specs import Family, QuantizerSpec
from . import decode, dequantize, hadamard
from .layout import PreparedWeight, restore
from .rotation_plan import RotationTables, fuses_norm

_library = torch.library.Library("msq", "DEF")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DECODE_LIMIT = decode.MAX_BATCH
"""Rows up to which the decode kernels run; above, dequantize and cuBLAS."""


def define(schema: str, *, cuda: object, cpu: object, fake: object) -> None:
    """Register one operator.

    Args:
        schema: its name and arguments in torch's notation.
        cuda, cpu, fake: implementations with these arguments.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", maxsplit=1)[0]
    _library.impl(name, cuda, "CUDA")
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"msq::{name}", fake, lib=_library)  # type: ignore[arg-type]


def _check_rows(x: Tensor, signs: Tensor) -> None:
    """Raises QuantizerError: `x` is no batch of rows of the size that `signs` was made for, or of another dtype."""
    if x.dtype not in _DTYPES or not x.ndim or (x.shape[-1] + 7) // 8 != signs.shape[0]:
        raise QuantizerError(
            f"this rotation is for float16, bfloat16 or float32 rows of about {8 * signs.shape[0]}; "
            f"got {tuple(x.shape)} {x.dtype}."
        )


def _check_like(other: Tensor, x: Tensor, shape: Sequence[int], name: str) -> None:
    """Raises QuantizerError: the second input doesn't fit the first."""
    if other.shape != tuple(shape) or other.dtype != x.dtype or other.device != x.device:
        raise QuantizerError(
            f"expected {name} of shape {tuple(shape)}, {x.dtype} on {x.device}; "
            f"got {tuple(other.shape)}, {other.dtype} on {other.device}."
        )


def _flips(signs: Tensor, size: int) -> Tensor:
    """``(size,)`` float32 of +1 and -1."""
    bits = signs.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    return 1.0 - 2.0 * bits.flatten()[:size].float()


def _turned(values: Tensor, signs: Tensor, dtype: torch.dtype) -> Tensor:
    """``values diag(s) H`` of float32 values, in `dtype`; the twin of the last steps of every rotation kernel."""
    size = values.shape[-1]
    return apply_hadamard(values * _flips(signs, size), hadamard_plan(size)).to(dtype)


def _rotate_cuda(x: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    return hadamard.rotate(x.reshape(-1, x.shape[-1]), RotationTables(signs, tuple(matrices))).view(x.shape)


def _rotate_cpu(x: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    return _turned(x.float(), signs, x.dtype)


def _rotate_fake(x: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    return x.new_empty(x.shape)


def _rotate_normed_cuda(x: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    _check_like(weight, x, x.shape[-1:], "a norm's weight")
    size, tables = x.shape[-1], RotationTables(signs, tuple(matrices))
    rows = x.reshape(-1, size)
    if fuses_norm(size):
        return hadamard.rotate_normed(rows, weight, epsilon, tables).view(x.shape)
    normed = F.rms_norm(rows.float(), (size,), weight.float(), epsilon)
    return hadamard.rotate(normed, tables).to(x.dtype).view(x.shape)


def _rotate_normed_cpu(x: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    _check_like(weight, x, x.shape[-1:], "a norm's weight")
    values = x.float()
    normed = values * (values.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()
    return _turned(normed, signs, x.dtype)


def _rotate_normed_fake(x: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(x, signs)
    _check_like(weight, x, x.shape[-1:], "a norm's weight")
    return x.new_empty(x.shape)


def _rotate_gated_cuda(gate: Tensor, up: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(gate, signs)
    _check_like(up, gate, gate.shape, "up")
    size = gate.shape[-1]
    rows = hadamard.rotate_gated(gate.reshape(-1, size), up.reshape(-1, size), RotationTables(signs, tuple(matrices)))
    return rows.view(gate.shape)


def _rotate_gated_cpu(gate: Tensor, up: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(gate, signs)
    _check_like(up, gate, gate.shape, "up")
    return _turned(F.silu(gate.float()) * up.float(), signs, gate.dtype)


def _rotate_gated_fake(gate: Tensor, up: Tensor, signs: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    _check_rows(gate, signs)
    _check_like(up, gate, gate.shape, "up")
    return gate.new_empty(gate.shape)


define(
    "rotate(Tensor x, Tensor signs, Tensor[] matrices) -> Tensor",
    cuda=_rotate_cuda,
    cpu=_rotate_cpu,
    fake=_rotate_fake,
)
define(
    "rotate_normed(Tensor x, Tensor weight, float epsilon, Tensor signs, Tensor[] matrices) -> Tensor",
    cuda=_rotate_normed_cuda,
    cpu=_rotate_normed_cpu,
    fake=_rotate_normed_fake,
)
define(
    "rotate_gated(Tensor gate, Tensor up, Tensor signs, Tensor[] matrices) -> Tensor",
    cuda=_rotate_gated_cuda,
    cpu=_rotate_gated_cpu,
    fake=_rotate_gated_fake,
)


def _spec(codebook: Tensor, family: str, bits: float, state_bits: int) -> QuantizerSpec:
    """The quantizer; the size of a trellis table is that of the codebook."""
    return _sized_spec(family, bits, state_bits, codebook.shape[0])


@cache
def _sized_spec(family: str, bits: float, state_bits: int, entries: int) -> QuantizerSpec:
    if state_bits:
        return QuantizerSpec(Family(family), bits, state_bits, entries.bit_length() - 1)
    return QuantizerSpec(Family(family), bits)


def _check_product(x: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    """Raises QuantizerError: the input or the bias is of another dtype or shape."""
    if x.dtype not in _DTYPES or not x.ndim:
        raise QuantizerError(f"expected float16 or bfloat16 rows; got {tuple(x.shape)} {x.dtype}.")
    if bias is not None:
        _check_like(bias, x, scales.shape, "a bias")


def _prepared(
    units: Sequence[Tensor], scales: Tensor, codebook: Tensor, in_features: int, *spec: Any
) -> PreparedWeight:
    """The weight that an operator's arguments are."""
    return PreparedWeight(_spec(codebook, *spec), scales.shape[0], in_features, tuple(units), scales, codebook)


def _multiply_cuda(
    x: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    workspace: Tensor,
    *spec: Any,
) -> Tensor:
    _check_product(x, scales, bias)
    rows = x.reshape(-1, x.shape[-1])
    weight = _prepared(units, scales, codebook, x.shape[-1], *spec)
    if not rows.shape[0]:
        y = rows.new_empty(0, scales.shape[0])
    elif decode.fits(weight, rows.shape[0]):
        y = decode.multiply(_whole(rows), weight, bias, workspace=workspace, programmatic=True)
    else:
        y = F.linear(rows, dequantize.dequantize(weight, x.dtype), bias)
    return y.view(*x.shape[:-1], scales.shape[0])


def _whole(rows: Tensor) -> Tensor:
    """Rows as the decode kernels read them: side by side, aligned to 16 bytes."""
    fits = rows.is_contiguous() and rows.data_ptr() % 16 == 0
    return rows if fits else rows.clone(memory_format=torch.contiguous_format)


def _multiply_cpu(
    x: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    workspace: Tensor,
    *spec: Any,
) -> Tensor:
    _check_product(x, scales, bias)
    weight = _dequantize_cpu(units, scales, codebook, x.shape[-1], torch.float32, *spec)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _multiply_fake(
    x: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    workspace: Tensor,
    *spec: Any,
) -> Tensor:
    _check_product(x, scales, bias)
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def _dequantize_cuda(
    units: Sequence[Tensor], scales: Tensor, codebook: Tensor, in_features: int, dtype: torch.dtype, *spec: Any
) -> Tensor:
    return dequantize.dequantize(_prepared(units, scales, codebook, in_features, *spec), dtype)


def _dequantize_cpu(
    units: Sequence[Tensor], scales: Tensor, codebook: Tensor, in_features: int, dtype: torch.dtype, *spec: Any
) -> Tensor:
    return decode_weight(restore(_prepared(units, scales, codebook, in_features, *spec))).to(dtype)


def _dequantize_fake(
    units: Sequence[Tensor], scales: Tensor, codebook: Tensor, in_features: int, dtype: torch.dtype, *spec: Any
) -> Tensor:
    return scales.new_empty(scales.shape[0], in_features, dtype=dtype)


_WEIGHT, _SPEC = "Tensor[] units, Tensor scales, Tensor codebook", "str family, float bits, int state_bits"
define(
    f"multiply(Tensor x, {_WEIGHT}, Tensor? bias, Tensor workspace, {_SPEC}) -> Tensor",
    cuda=_multiply_cuda,
    cpu=_multiply_cpu,
    fake=_multiply_fake,
)
define(
    f"dequantize({_WEIGHT}, int in_features, ScalarType dtype, {_SPEC}) -> Tensor",
    cuda=_dequantize_cuda,
    cpu=_dequantize_cpu,
    fake=_dequantize_fake,
)
