"""Run a decoder from any block on, so that a change in block b costs only blocks b and later.

One pass of the unchanged model records what enters each decoder block (hidden states and keyword arguments) and what
leaves the last one. `BlockwiseModel.resume` starts again from a recorded block. Works on the stock Llama, Mistral,
Qwen2 and Qwen3 models of transformers, whose decoder is a list of blocks, a norm and a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inventory import LayerInfo

_LOGITS_AT_ONCE = 1 << 24
"""Logits that `BlockwiseModel.kl_per_window` forms at a time."""


@dataclass
class Recording:
    """One pass of the unchanged model over a batch.

    Attributes:
        tokens: ``(windows, length)`` int64.
        hidden: what enters each block, then what leaves the last, each ``(windows, length, hidden_size)``.
        arguments: keyword arguments of each block (positions, mask).
        logits: ``(windows * length, vocabulary)``, kept from their first use on if they are few.
    """

    tokens: Tensor
    hidden: list[Tensor]
    arguments: list[dict[str, Any]]
    logits: Tensor | None = None


class BlockwiseModel:
    """A causal language model cut at its decoder blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, model)
        self.decoder = self.model.model
        self.blocks = self.decoder.layers

    @torch.inference_mode()
    def record(self, tokens: Tensor) -> Recording:
        """Run ``tokens (windows, length)`` once and keep every block's input."""
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            hidden.append(inputs[0])
            arguments.append(keywords)

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks]
        last: list[Tensor] = []
        handles.append(self.blocks[-1].register_forward_hook(lambda _m, _i, output: last.append(output)))
        try:
            self.decoder(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return Recording(tokens, [*hidden, last[0]], arguments)

    def kl_of_change(self, recording: Recording, layer: LayerInfo, weight: Tensor) -> Tensor:
        """Mean KL(original || changed) over the tokens of each window when one layer has another weight.

        Args:
            weight: of `layer`, ``(out_features, in_features)``; the model has its own again when this returns.

        Returns:
            ``(windows,)`` float64, nats.
        """
        if layer.is_embedding or layer.is_head:  # not replaced: another module may have the same weight
            hidden, head = recording.hidden[-1], weight if layer.is_head else None
            if layer.is_embedding:
                hidden = self.resume(recording, 0, F.embedding(recording.tokens, weight.to(hidden.dtype)))
            return self.kl_per_window(recording, hidden, head=head)
        with replaced(self.model.get_parameter(f"{layer.name}.weight"), weight):
            changed = self.resume(recording, layer.block)
        return self.kl_per_window(recording, changed)

    @torch.inference_mode()
    def resume(self, recording: Recording, block: int, changed: Tensor | None = None) -> Tensor:
        """What leaves the last block when blocks from `block` on run again, ``(windows, length, hidden_size)``.

        Args:
            changed: what enters `block` instead of what was recorded.
        """
        hidden = recording.hidden[block] if changed is None else changed
        for module, keywords in zip(self.blocks[block:], recording.arguments[block:], strict=True):
            hidden = module(hidden, **keywords)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Norm and head: ``(..., hidden_size)`` -> ``(..., vocabulary)``; `head` is a weight in place of its own."""
        normed = self.decoder.norm(hidden)
        if head is not None:
            return F.linear(normed, head.to(normed.dtype), self.model.lm_head.bias)
        logits: Tensor = self.model.lm_head(normed)
        return logits

    @torch.inference_mode()
    def kl_per_window(self, recording: Recording, changed: Tensor, *, head: Tensor | None = None) -> Tensor:
        """Mean KL(original || changed) over the tokens of each window, nats, ``(windows,)`` float64.

        Args:
            recording: the unchanged pass.
            changed: what leaves the last block now, ``(windows, length, hidden_size)``.
            head: weight of the changed model's head, ``(vocabulary, hidden_size)``; None where it is the original's.
        """
        windows, length, _ = changed.shape
        rows = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
        original = recording.hidden[-1].flatten(0, 1).split(rows)
        if len(original) == 1 and recording.logits is None:  # small enough to keep
            recording.logits = self.logits(original[0])
        parts = [
            token_kl(self.logits(before) if recording.logits is None else recording.logits, self.logits(after, head))
            for before, after in zip(original, changed.flatten(0, 1).split(rows), strict=True)
        ]
        return torch.cat(parts).view(windows, length).mean(dim=1)


def token_kl(original: Tensor, changed: Tensor) -> Tensor:
    """KL(original || changed) of logits, nats: ``(..., vocabulary)`` -> ``(...)`` float64."""
    log_p = F.log_softmax(original.float(), dim=-1)
    log_q = F.log_softmax(changed.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)


@contextmanager
def replaced(weight: Tensor, values: Tensor) -> Iterator[None]:
    """Other values for a parameter inside a `with` block."""
    original = weight.data
    weight.data = values.to(original.dtype)
    try:
        yield
    finally:
        weight.data = original
