"""Torch operators of a decoding step beside those of `ops`: one new token for each sequence.

    msq::rotate_added(x, residual, weight, epsilon, signs, matrices)     rotation of a normed sum, and the sum
    msq::attend(q, k, v, cosines, ..., positions, keys, values, ...)     attention over a cache, which it extends

They follow the rules of `ops`; `attend` alone changes what it is given: `keys` and `values` at `positions`, and the
workspace, whose counters are zero before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizerError
from . import attention, hadamard
from .attention import Turning
from .ops import _check_like, _check_rows, _rotate_normed_cpu, _rotate_normed_cuda, define
from .rotation_plan import RotationTables, fuses_norm


def _check_added(x: Tensor, residual: Tensor, weight: Tensor, signs: Tensor) -> None:
    _check_rows(x, signs)
    _check_like(residual, x, x.shape, "a residual")
    _check_like(weight, x, x.shape[-1:], "a norm's weight")


def _rotate_added_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    _check_added(x, residual, weight, signs)
    size = x.shape[-1]
    if not fuses_norm(size):
        total = x + residual
        return _rotate_normed_cuda(total, weight, epsilon, signs, matrices), total
    rows = x.reshape(-1, size), residual.reshape(-1, size)
    rotated, total = hadamard.rotate_added(*rows, weight, epsilon, RotationTables(signs, tuple(matrices)))
    return rotated.view(x.shape), total.view(x.shape)


def _rotate_added_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    _check_added(x, residual, weight, signs)
    total = x + residual
    return _rotate_normed_cpu(total, weight, epsilon, signs, matrices), total


def _rotate_added_fake(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, signs: Tensor, matrices: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    _check_added(x, residual, weight, signs)
    return x.new_empty(x.shape), x.new_empty(x.shape)


define(
    "rotate_added(Tensor x, Tensor residual, Tensor weight, float epsilon, Tensor signs, Tensor[] matrices)"
    " -> (Tensor, Tensor)",
    cuda=_rotate_added_cuda,
    cpu=_rotate_added_cpu,
    fake=_rotate_added_fake,
)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raises QuantizerError: shapes or dtypes don't belong together."""
    batch, key_heads, _, head_size = keys.shape
    _check_like(values, keys, keys.shape, "a cache of values")
    _check_like(k, keys, (batch, key_heads * head_size), "new keys")
    _check_like(v, keys, (batch, key_heads * head_size), "new values")
    _check_like(q, keys, (batch, q.shape[-1]), "queries")
    if not keys.is_contiguous() or not values.is_contiguous() or any(rows.stride(-1) != 1 for rows in (q, k, v)):
        raise QuantizerError("expected contiguous caches, and rows whose numbers lie side by side.")
    if q.shape[-1] % (key_heads * head_size):
        raise QuantizerError(f"expected queries of a multiple of {key_heads} heads of {head_size}; got {q.shape[-1]}.")
    if positions.shape != (batch,) or positions.dtype != torch.int32:
        raise QuantizerError(f"expected ({batch},) int32 positions; got {tuple(positions.shape)} {positions.dtype}.")


def _attend_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    workspace: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    _check_attention(q, k, v, positions, keys, values)
    turning = Turning(cosines, sines, q_weight, k_weight, epsilon)
    return attention.attend(q, k, v, turning, positions, keys, values, scale=scale, window=window, workspace=workspace)


def _turned(heads: Tensor, weight: Tensor | None, epsilon: float, cosine: Tensor, sine: Tensor) -> Tensor:
    """``(batch, heads, head_size)`` float32, normed and turned by ``(batch, 1, head_size / 2)`` angles."""
    if weight is not None:
        heads = heads * (heads.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()
    low, high = heads.chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1)


def _attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    workspace: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    _check_attention(q, k, v, positions, keys, values)
    batch, key_heads, capacity, head_size = keys.shape
    angles = [table[positions.long()].unsqueeze(1) for table in (cosines, sines)]
    queries = _turned(q.float().view(batch, -1, head_size), q_weight, epsilon, *angles)
    turned = _turned(k.float().view(batch, key_heads, head_size), k_weight, epsilon, *angles)
    rows = torch.arange(batch)
    keys[rows, :, positions.long()] = turned.to(keys.dtype)
    values[rows, :, positions.long()] = v.reshape(batch, key_heads, head_size)
    places, last = torch.arange(capacity), positions.long().unsqueeze(1)
    seen = (places <= last) & ((places > last - window) if window else torch.tensor(True))
    sharing = queries.shape[1] // key_heads
    mixed = F.scaled_dot_product_attention(
        queries.unsqueeze(2),
        keys.float().repeat_interleave(sharing, dim=1),
        values.float().repeat_interleave(sharing, dim=1),
        attn_mask=seen.view(batch, 1, 1, capacity),
        scale=scale,
    )
    return mixed.reshape(batch, -1).to(q.dtype)


def _attend_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor cosines, Tensor sines, Tensor? q_weight, Tensor? k_weight,"
    " float epsilon, Tensor positions, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) workspace, float scale,"
    " int window) -> Tensor",
    cuda=_attend_cuda,
    cpu=_attend_cpu,
    fake=_attend_fake,
)
