"""Text that a model writes itself: calibration tokens near real text for which no data is needed.

The idea is that of LLM-QAT (arXiv 2305.17888). Every window starts from the model's beginning-of-text token or, where
it has none, a random one; each next token is drawn from the model's distribution by one seeded uniform number (inverse
of the distribution function), so tokens depend on the seed and the logits alone. Logits are the same on the same kind
of device and version of torch; on another, rounding may turn a draw, and the text from there on.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ProfileError
from .models import random_windows
from .progress import progress

_CACHED_TOKENS = 1 << 16
"""Tokens in the cache of a batch of windows at most: 8 GiB for an 8B model."""


@torch.no_grad()
def self_written(model: nn.Module, windows: int, length: int, seed: int) -> Tensor:
    """Tokens drawn from the model, each given those before it in its window.

    Args:
        model: a stock causal language model.
        windows: how many.
        length: tokens of a window, the first one included.
        seed: of the draws.

    Returns:
        ``(windows, length)`` int64 on the CPU.

    Raises:
        ProfileError: the logits are not finite.
    """
    config = cast(Any, model).config
    if config.bos_token_id is None:
        first = random_windows(config.vocab_size, windows, 1, seed)
    else:
        first = torch.full((windows, 1), int(config.bos_token_id))
    draws = torch.rand(windows, length - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    device = next(model.parameters()).device
    at_once = max(1, _CACHED_TOKENS // length)
    batches = list(zip(*(part.to(device).split(at_once) for part in (first, draws)), strict=True))
    written = []
    with progress("writing calibration text", len(batches) * (length - 1)) as advance:
        for start, drawn in batches:
            tokens, cache = [start], None
            for step in range(length - 1):
                output = cast(Any, model)(tokens[-1], past_key_values=cache, use_cache=True)
                logits, cache = output.logits[:, -1], output.past_key_values
                if not torch.isfinite(logits).all():
                    raise ProfileError("the model's logits are NaN or infinite while it writes; the model is broken.")
                below = logits.double().softmax(dim=1).cumsum(dim=1)
                found = torch.searchsorted(below, drawn[:, step : step + 1] * below[:, -1:], right=True)
                tokens.append(found.clamp_max(config.vocab_size - 1))
                advance()
            written.append(torch.cat(tokens, dim=1).cpu())
    return torch.cat(written)
