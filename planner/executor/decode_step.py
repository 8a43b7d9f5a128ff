"""One decoding step of a stock model on few, fused kernels: 9 a block where q, k, v and gate, up run fused.

The model's own modules are used as they stand (embedding, norms, linears, whatever `install` put in their places); this
file only says in which order they meet, for the architectures that msq plans: norm, q k v, attention, o, sum, norm,
gate up, down, sum. What lies between two products is one kernel: sum + norm + rotation, attention with its turning by
position and its cache, gate + rotation. Everything is as in the stock forward up to rounding, which tests hold it to; a
prompt goes through the stock forward.

A step changes nothing but the cache at `positions`, allocates only its results, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.cuda import attention, step_ops  # noqa: F401 (registers its operators)
from ...kernels.cuda.tuning import FORMATS
from ...profiles.schema import ARCHITECTURES
from .errors import CheckpointError
from .projections import Projections

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on nothing but the position; others look at the length of the input too."""


class KeyValueCache:
    """Keys and values of all blocks, for a fixed number of positions.

    Args:
        model: a stock model; its config says how many heads of which size.
        batch_size: sequences.
        capacity: positions of each.
        dtype: of the activations.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        config = cast(Any, model).config
        shape = (batch_size, config.num_key_value_heads, capacity, head_size(config))
        self.batch_size, self.capacity = batch_size, capacity
        self.blocks = torch.zeros(config.num_hidden_layers, 2, *shape, dtype=dtype, device=device)
        """``(blocks, 2, batch, key heads, capacity, head size)``: keys, then values."""

    def keep(self, row: int, block: int, keys: Tensor, values: Tensor) -> None:
        """Store the first positions of sequences from `row` on, ``(sequences, key heads, positions, head size)``."""
        rows, length = slice(row, row + keys.shape[0]), keys.shape[2]
        self.blocks[block, 0, rows, :, :length] = keys
        self.blocks[block, 1, rows, :, :length] = values


def head_size(config: Any) -> int:
    """Numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def activation_format(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a stock model's activations, whatever its linear layers and embedding are."""
    weight: Tensor = cast(Any, model).model.norm.weight
    return weight.device, weight.dtype


def unsupported_reason(model: nn.Module) -> str | None:
    """None where `DecodeStep` knows the model, else one sentence that says why not."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        return f"fused decoding knows {', '.join(ARCHITECTURES)}; got {name}."
    config = cast(Any, model).config
    if config.hidden_act != "silu":
        return f"fused decoding knows the activation silu; got {config.hidden_act}."
    rope_type = cast(Any, model).model.rotary_emb.rope_type
    if rope_type not in _ROPE_TYPES:
        return f"fused decoding knows rotary embeddings of type {', '.join(_ROPE_TYPES)}; got {rope_type}."
    device, dtype = activation_format(model)
    if device.type == "cuda" and dtype not in FORMATS:
        return f"fused decoding runs in float16 or bfloat16 on CUDA; got {dtype}."
    return attention.unsupported_reason(config.num_attention_heads, config.num_key_value_heads, head_size(config))


class _Block:
    """One decoder block of the stock model, with its part of the cache."""

    def __init__(
        self, block: Any, keys: Tensor, values: Tensor, angles: tuple[Tensor, Tensor], workspace: Tensor
    ) -> None:
        attn, mlp = block.self_attn, block.mlp
        self.qkv = Projections([attn.q_proj, attn.k_proj, attn.v_proj])
        self.o = Projections([attn.o_proj])
        self.gate_up = Projections([mlp.gate_proj, mlp.up_proj])
        self.down = Projections([mlp.down_proj])
        self.norm, self.second_norm = block.input_layernorm, block.post_attention_layernorm
        norms = (None, None, 0.0)
        if getattr(attn, "q_norm", None) is not None:
            norms = (attn.q_norm.weight, attn.k_norm.weight, attn.q_norm.variance_epsilon)
        self.turning = (*angles, *norms)
        self.cache = (keys, values, workspace, float(attn.scaling), window_of(attn))

    def __call__(self, x: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        (q, k, v), residual = self.qkv.normed(x, residual, self.norm)
        mixed = torch.ops.msq.attend(q, k, v, *self.turning, positions, *self.cache)
        (x,) = self.o.plain(mixed)
        (gate, up), residual = self.gate_up.normed(x, residual, self.second_norm)
        (x,) = self.down.gated(gate, up)
        return x, residual


def window_of(attn: Any) -> int:
    """Positions that a token of an attention module sees, itself included; 0 for all."""
    config = attn.config
    if hasattr(attn, "sliding_window"):  # Qwen2, Qwen3: by block
        return int(attn.sliding_window or 0)
    return int(getattr(config, "sliding_window", None) or 0)  # Mistral: all blocks


class DecodeStep:
    """From one token of each sequence to the logits of the next.

    Args:
        model: a stock model, quantized or not, on one device; modules are looked up now, so install them before.
        cache: filled up to the positions of the first step by a run of the stock model.

    Raises:
        CheckpointError: the model is of no known kind.
    """

    def __init__(self, model: nn.Module, cache: KeyValueCache) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise CheckpointError(f"{reason} Generate with the stock model instead.")
        untyped: Any = model
        config, inner = untyped.config, untyped.model
        self.embedding = inner.embed_tokens
        device, _ = activation_format(model)
        angles = turning_angles(inner.rotary_emb, cache.capacity, device)
        sizes = (config.num_attention_heads, config.num_key_value_heads, head_size(config))
        workspace = attention.new_workspace(*sizes, cache.batch_size, cache.capacity, device)
        self.blocks = [
            _Block(block, keys, values, angles, workspace)
            for block, (keys, values) in zip(inner.layers, cache.blocks, strict=True)
        ]
        self.norm, self.head = inner.norm, Projections([untyped.lm_head])

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """``(batch, vocabulary)`` logits.

        Args:
            tokens: ``(batch,)`` int64.
            positions: ``(batch,)`` int32, of these tokens; on CUDA last changed before the call (see `attention`).
        """
        x, residual = self.embedding(tokens), None
        for block in self.blocks:
            x, residual = block(x, residual, positions)
        (logits,), _ = self.head.normed(x, residual, self.norm)
        return logits


def turning_angles(rotary: Any, capacity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the stock model's rotary embedding, ``(capacity, head_size / 2)`` float32 each.

    One call for all positions: only right for embeddings of `_ROPE_TYPES`.
    """
    places = torch.arange(capacity, device=device).unsqueeze(0)
    cosines, sines = rotary(torch.zeros(1, device=device), places)
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
