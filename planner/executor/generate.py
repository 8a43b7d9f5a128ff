"""Text generation: from a prompt's text to that of what follows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .decode_step import unsupported_reason
from .decoder import Decoder
from .errors import CheckpointError


def generate_text(model: nn.Module, tokenizer: Any, prompt: str, max_tokens: int, *, temperature: float = 0.0) -> str:
    """What the model adds to a prompt, by fused steps where they know the model, else by its stock forward.

    Args:
        tokenizer: of the same model.
        max_tokens: stop after so many, or at the end of the text.
        temperature: 0 takes the likeliest token each time, else tokens are drawn.

    Raises:
        CheckpointError: the prompt has no tokens, or is too long for the model.
    """
    untyped = cast(Any, model)
    tokens = tokenizer(prompt)["input_ids"]
    longest = untyped.config.max_position_embeddings
    if max_tokens >= longest:
        raise CheckpointError(
            f"expected to add fewer tokens than the {longest} that the model reads; got {max_tokens}."
        )
    if not tokens or len(tokens) + max_tokens > longest:
        raise CheckpointError(
            f"expected a prompt of 1 to {longest - max_tokens} tokens ({longest} less {max_tokens} to add); "
            f"got {len(tokens)}."
        )
    if unsupported_reason(model) is None:
        decoder = Decoder(model, batch_size=1, capacity=len(tokens) + max_tokens, temperature=temperature)
        (added,) = decoder.generate([tokens], max_tokens, stop=stop_tokens(model))
    else:
        added = _stock_generate(untyped, tokens, max_tokens, temperature)
    return str(tokenizer.decode(added, skip_special_tokens=True))


@torch.inference_mode()
def _stock_generate(model: Any, tokens: list[int], max_tokens: int, temperature: float) -> list[int]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    given = torch.tensor([tokens], device=model.device)
    output = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, num_beams=1, **sampling
    )
    return cast(list[int], output[0, len(tokens) :].tolist())


def stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """Tokens that end a text, as the model's generation config or else its config names them."""
    untyped = cast(Any, model)
    for config in (getattr(untyped, "generation_config", None), untyped.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
