"""Attention of one new token per sequence over a static cache: the host's side of ``sources/attention.cu``.

    cache = torch.zeros(2, batch, key_heads, capacity, head_size)     # of one block: keys and values
    y = attend(q, k, v, turning, positions, cache[0], cache[1], scale=head_size**-0.5, workspace=workspace)

Turning by position (rotary embedding, halves of a head as pairs), norms of queries and keys, the new key and value on
their way into the cache, grouped heads and a sliding window are one kernel. Turned queries and keys and the weights of
positions are rounded to the dtype of the activations, for tensor cores; sums are float32 and in a fixed order.

What the kernel reads of older positions, and `positions` itself, it reads before the kernels ahead of it have ended
(programmatic dependent launch): they must have been written before the last ordinary launch on the stream. A decoding
step that moves `positions` and looks up its embeddings with torch's own kernels keeps that by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import KernelError
from .jit import Kernel, Source, load
from .limits import Limits, device_index, device_limits
from .tuning import FORMATS

MAX_HEAD_SIZE = 256
_MAX_GROUP = 8
"""Query heads of a block: the columns of a multiplication."""
_TILE_NUMBERS = 256
"""Of a key or value, for all tiles that a warp has under way: as many as a thread has registers for."""
_MAX_SPLITS = 32
_MAX_CLUSTER = 8
_MOST_IN_CLUSTERS = 8192
"""Capacity up to which clusters are faster; beyond, all multiprocessors must read, which clusters don't fill."""
_WARPS = 8
_FEWEST_POSITIONS = 512
"""Positions of a block for which further blocks are worth the joining through memory."""


@dataclass(frozen=True)
class Turning:
    """What turns queries and keys by their position, and norms them before.

    Attributes:
        cosines, sines: ``(capacity, head_size / 2)`` float32.
        q_weight, k_weight: ``(head_size,)`` gains of the norms, in the dtype of the activations; None without norms.
        epsilon: of the norms.
    """

    cosines: Tensor
    sines: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    epsilon: float = 0.0


@dataclass(frozen=True)
class Shape:
    """How the blocks of a launch share its work; the macros of ``attention.cu``.

    Attributes:
        group: query heads of a block.
        groups: clusters for one key head.
        splits: runs of positions that different clusters take, at most; of few positions there are fewer runs.
        cluster: blocks of a cluster, which take parts of a run.
    """

    head_size: int
    group: int
    groups: int
    key_heads: int
    splits: int
    cluster: int

    def source(self, dtype: torch.dtype, norm: bool) -> Source:
        """The kernel."""
        macros = {
            "HEAD_SIZE": self.head_size,
            "GROUP": self.group,
            "GROUPS": self.groups,
            "KEY_HEADS": self.key_heads,
            "SPLITS": self.splits,
            "CHUNK": _FEWEST_POSITIONS * self.cluster,
            "CLUSTER": self.cluster,
            "WARPS": _WARPS,
            "TILES": max(1, min(4, _TILE_NUMBERS // self.head_size)),
            "BFLOAT": FORMATS[dtype],
            "NORM": norm,
        }
        return Source("attention.cu", "attend", macros)

    def blocks(self, batch: int) -> int:
        return batch * self.key_heads * self.groups * self.splits * self.cluster

    def workspace_words(self, batch: int) -> int:
        """32-bit words: counters, padded to 16 bytes, then sums."""
        places = batch * self.key_heads * self.groups
        return (
            0 if self.splits == 1 else places + -places % 4 + places * self.splits * self.group * (self.head_size + 2)
        )


def unsupported_reason(heads: int, key_heads: int, head_size: int) -> str | None:
    """None where `attend` works, else one sentence that says why not."""
    if head_size % 8 or not 8 <= head_size <= MAX_HEAD_SIZE:
        return f"the attention kernel takes heads of 8 to {MAX_HEAD_SIZE} numbers in steps of 8; got {head_size}."
    if key_heads < 1 or heads % key_heads:
        return (
            f"the attention kernel wants as many query heads as key heads, or a multiple; got {heads} and {key_heads}."
        )
    return None


@cache
def shape_for(heads: int, key_heads: int, head_size: int, batch: int, capacity: int, limits: Limits) -> Shape:
    """A division of work that gives all multiprocessors a block, or with clusters half of them, given enough positions.

    Raises:
        KernelError: unsupported heads.
    """
    reason = unsupported_reason(heads, key_heads, head_size)
    if reason is not None:
        raise KernelError(reason)
    sharing = heads // key_heads
    limit = _MAX_GROUP if head_size <= 128 else _MAX_GROUP // 2
    group = next(g for g in range(min(sharing, limit), 0, -1) if sharing % g == 0)
    groups = sharing // group
    places = batch * key_heads * groups
    half, in_clusters = limits.multiprocessors // 2, limits.has_clusters and capacity <= _MOST_IN_CLUSTERS
    cluster = 1
    while in_clusters and cluster < _MAX_CLUSTER and 2 * cluster * places <= half:
        cluster *= 2
    filling = (limits.multiprocessors if cluster == 1 else half) // (cluster * places)
    splits = max(1, min(filling, -(-capacity // (cluster * _FEWEST_POSITIONS)), _MAX_SPLITS))
    return Shape(head_size, group, groups, key_heads, splits, cluster)


def new_workspace(
    heads: int, key_heads: int, head_size: int, batch: int, capacity: int, device: torch.device
) -> Tensor:
    """A workspace for `attend` of these sizes, for launches one after another on one stream: ``(words,)`` int32."""
    if device.type != "cuda":
        return torch.zeros(0, dtype=torch.int32)
    shape = shape_for(heads, key_heads, head_size, batch, capacity, _limits(device))
    return torch.zeros(shape.workspace_words(batch), dtype=torch.int32, device=device)


def _limits(device: torch.device) -> Limits:
    return device_limits(device_index(device))


@cache
def _ready(shape: Shape, dtype: torch.dtype, norm: bool, device: torch.device) -> Kernel:
    return load(shape.source(dtype, norm), device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turning: Turning,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int = 0,
    workspace: Tensor,
) -> Tensor:
    """One step; `keys` and `values` are changed at `positions`.

    Args:
        q: ``(batch, heads * head_size)`` fp16 or bf16; rows may be apart.
        k, v: ``(batch, key_heads * head_size)``, likewise.
        positions: ``(batch,)`` int32, of the new token in each sequence, below the capacity.
        keys, values: ``(batch, key_heads, capacity, head_size)`` contiguous, dtype of `q`.
        scale: of the products of queries and keys.
        window: positions that a token sees, itself included; 0 for all.
        workspace: of `new_workspace`; launches that may run at once must not share it.

    Returns:
        ``(batch, heads * head_size)``, contiguous.
    """
    batch, key_heads, capacity, head_size = keys.shape
    heads = q.shape[1] // head_size
    shape = shape_for(heads, key_heads, head_size, batch, capacity, _limits(q.device))
    if workspace.numel() < shape.workspace_words(batch):
        raise KernelError(
            f"this attention needs a workspace of {shape.workspace_words(batch)} words: see new_workspace()."
        )
    places = batch * key_heads * shape.groups
    out = torch.empty(batch, q.shape[1], dtype=q.dtype, device=q.device)
    arguments = (
        q,
        q.stride(0),
        k,
        k.stride(0),
        v,
        v.stride(0),
        out,
        turning.cosines,
        turning.sines,
        turning.q_weight,
        turning.k_weight,
        turning.epsilon,
        positions,
        keys,
        values,
        capacity,
        scale * math.log2(math.e),
        window,
        workspace[places + -places % 4 :] if shape.splits > 1 else None,
        workspace if shape.splits > 1 else None,
    )
    kernel = _ready(shape, q.dtype, turning.q_weight is not None, q.device)
    kernel.launch(shape.blocks(batch), 32 * _WARPS, arguments, cluster=shape.cluster, programmatic=True)
    return out
