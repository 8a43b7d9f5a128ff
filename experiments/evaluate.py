"""Perplexity on a text and KL divergence to a reference model, for a stock model or an msq checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planner.executor.load import load_checkpoint
from ..planner.executor.manifest import is_checkpoint
from ..profiles.blockwise import token_kl
from ..profiles.errors import ProfileError
from ..profiles.models import choose_device, load_model
from ..profiles.progress import progress

_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits of a batch; on a GPU many, since the reference implementation decodes the weights for each."""
_LARGEST_LOSS = 700.0
"""Nats per token above which a perplexity is beyond float64."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of each window's tokens after its first.
        kl: mean KL(reference || model) over all tokens, nats; None without a reference.
        tokens: tokens read.
    """

    perplexity: float
    kl: float | None
    tokens: int


def load_any(directory: Path, device: str = "cpu", *, implementation: str | None = None) -> nn.Module:
    """An msq checkpoint or a stock model, ready to run.

    Args:
        implementation: of a checkpoint's layers, as for `load_checkpoint`.
    """
    if is_checkpoint(directory):
        return load_checkpoint(directory, device=device, implementation=implementation)
    model = load_model(directory, choose_device(device))
    if getattr(model, "hf_quantizer", None) is None:
        return model
    from ..planner.executor.transformers_plugin import to_device  # transformers saved this one: no msq.yaml beside it

    return to_device(model, device, implementation=implementation)


@torch.inference_mode()
def evaluate(model: nn.Module, windows: Tensor, *, reference: nn.Module | None = None) -> Evaluation:
    """Run a model over windows of tokens.

    Args:
        windows: ``(windows, length)`` int64, length at least 2.
        reference: model to measure the KL divergence to; same vocabulary.

    Raises:
        ProfileError: windows too short, or vocabularies differ.
    """
    count, length = windows.shape
    vocabulary = cast(Any, model).config.vocab_size
    if length < 2:
        raise ProfileError(f"expected windows of at least 2 tokens; got {length}.")
    if reference is not None and cast(Any, reference).config.vocab_size != vocabulary:
        raise ProfileError(
            f"the reference has {cast(Any, reference).config.vocab_size} tokens, the model {vocabulary}; "
            "give the model that was quantized."
        )
    device = next(iter(model.parameters())).device
    batches = windows.split(max(1, _LOGITS_AT_ONCE[device.type] // (length * vocabulary)))
    loss = divergence = 0.0
    with progress("evaluating", len(batches)) as advance:
        for batch in batches:
            tokens = batch.to(device)
            logits = model(tokens).logits.float()
            targets = tokens[:, 1:].flatten()
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").double())
            if reference is not None:
                divergence += float(token_kl(reference(tokens).logits, logits).sum())
            advance()
    kl = None if reference is None else divergence / windows.numel()
    mean = loss / (count * (length - 1))
    if not mean < _LARGEST_LOSS or not math.isfinite(divergence):
        raise ProfileError(f"the model's mean loss is {mean:g} and its KL {kl}; expected finite numbers: it is broken.")
    return Evaluation(math.exp(mean), kl, windows.numel())
