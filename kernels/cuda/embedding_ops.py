"""Torch operators of an embedding: rows of a packed weight, and their way back to the model's own domain.

    msq::lookup(tokens, weight..., in_features, dtype)       rows of W in the rotated domain
    msq::unrotate(x, signs, matrices, dtype)                 x H^T diag(s), the inverse of msq::rotate

They follow the rules of `ops`; `matrices` are those of the inverse rotation (`rotation_plan.rotation_tables`). `dtype`
is that of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantizerError
from ..hadamard import apply_hadamard, hadamard_plan
from ..quantize import decode_rows
from . import hadamard, lookup
from .layout import restore
from .ops import _SPEC, _WEIGHT, _check_rows, _flips, _prepared, define
from .rotation_plan import RotationTables


def _unrotate_cuda(x: Tensor, signs: Tensor, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    _check_rows(x, signs)
    tables = RotationTables(signs, tuple(matrices))
    return hadamard.unrotate(x.reshape(-1, x.shape[-1]), tables, dtype).view(x.shape)


def _unrotate_cpu(x: Tensor, signs: Tensor, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    _check_rows(x, signs)
    size = x.shape[-1]
    return (apply_hadamard(x.float(), hadamard_plan(size), inverse=True) * _flips(signs, size)).to(dtype)


def _unrotate_fake(x: Tensor, signs: Tensor, matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    _check_rows(x, signs)
    return x.new_empty(x.shape, dtype=dtype)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dtype != torch.int64:
        raise QuantizerError(f"expected tokens as int64; got {tuple(tokens.shape)} {tokens.dtype}.")


def _lookup_cuda(
    tokens: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    in_features: int,
    dtype: torch.dtype,
    *spec: Any,
) -> Tensor:
    _check_tokens(tokens)
    weight = _prepared(units, scales, codebook, in_features, *spec)
    return lookup.lookup(tokens.flatten().contiguous(), weight, dtype).view(*tokens.shape, in_features)


def _lookup_cpu(
    tokens: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    in_features: int,
    dtype: torch.dtype,
    *spec: Any,
) -> Tensor:
    _check_tokens(tokens)
    return decode_rows(restore(_prepared(units, scales, codebook, in_features, *spec)), tokens).to(dtype)


def _lookup_fake(
    tokens: Tensor,
    units: Sequence[Tensor],
    scales: Tensor,
    codebook: Tensor,
    in_features: int,
    dtype: torch.dtype,
    *spec: Any,
) -> Tensor:
    _check_tokens(tokens)
    return scales.new_empty(*tokens.shape, in_features, dtype=dtype)


define(
    "unrotate(Tensor x, Tensor signs, Tensor[] matrices, ScalarType dtype) -> Tensor",
    cuda=_unrotate_cuda,
    cpu=_unrotate_cpu,
    fake=_unrotate_fake,
)
define(
    f"lookup(Tensor tokens, {_WEIGHT}, int in_features, ScalarType dtype, {_SPEC}) -> Tensor",
    cuda=_lookup_cuda,
    cpu=_lookup_cpu,
    fake=_lookup_fake,
)
