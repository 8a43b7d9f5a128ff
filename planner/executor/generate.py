"""Greedy text generation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .errors import CheckpointError


@torch.inference_mode()
def generate_text(model: nn.Module, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """What the model adds to a prompt, taking the likeliest token each time.

    Args:
        tokenizer: of the same model.
        max_tokens: stop after so many, or at the end of the text.

    Raises:
        CheckpointError: the prompt has no tokens, or is too long for the model.
    """
    untyped = cast(Any, model)
    tokens = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    count = tokens["input_ids"].shape[1]
    longest = untyped.config.max_position_embeddings
    if max_tokens >= longest:
        raise CheckpointError(
            f"expected to add fewer tokens than the {longest} that the model reads; got {max_tokens}."
        )
    if not count or count + max_tokens > longest:
        raise CheckpointError(
            f"expected a prompt of 1 to {longest - max_tokens} tokens ({longest} less {max_tokens} to add); "
            f"got {count}."
        )
    output = untyped.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
    )
    return str(tokenizer.decode(output[0, count:], skip_special_tokens=True))
