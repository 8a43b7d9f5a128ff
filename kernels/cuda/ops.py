"""The kernels as torch operators: traceable, capturable, on torch's current stream and the device of their arguments.

Each operator has one implementation for CUDA, which launches kernels, one for the CPU, which is its readable twin, and
one on shapes alone for tracing. All state is in the arguments: an operator allocates its result and what it needs while
it runs, nothing that outlives the call, as graph capture wants it. They are for inference: none has a gradient.

    msq::rotate(x, signs, matrices)                              x diag(s) H
    msq::rotate_normed(x, weight, epsilon, signs, matrices)      the same after an RMS norm
    msq::rotate_gated(gate, up, signs, matrices)                 the same after silu(gate) * up

`signs` and `matrices` are those of `hadamard.rotation_tables`. Results have the dtype of `x`, which may have any
leading shape; inside, everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizerError
from ..hadamard import apply_hadamard, hadamard_plan
from . import hadamard
from .hadamard import RotationTables

_library = torch.library.Library("msq", "DEF")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def _turned(values: Tensor, signs: Tensor, dtype: torch.dtype) -> Tensor:
    """``values diag(s) H`` of float32 values, in `dtype`; the twin of the last steps of every rotation kernel."""
    size = values.shape[-1]
    bits = signs.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    flips = 1.0 - 2.0 * bits.flatten()[:size].float()
    return apply_hadamard(values * flips, hadamard_plan(size)).to(dtype)


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
    if hadamard.fuses_norm(size):
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
