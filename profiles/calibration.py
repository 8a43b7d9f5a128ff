"""The tokens that a model is calibrated on: random ones, those of a text, or what the model writes itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import ProfileError
from .models import load_config, load_model, random_windows, token_windows
from .sampling import self_written
from .schema import TokenSource


@dataclass(frozen=True)
class Calibration:
    """Tokens to calibrate on.

    Attributes:
        windows: ``(windows, length)`` int64.
        source: where they come from.
        text: name of the text; None for other sources.
    """

    windows: Tensor
    source: TokenSource
    text: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()

    @property
    def described(self) -> str:
        """For people: the name of the text, or what the tokens are instead."""
        return self.text or ("random tokens" if self.source is TokenSource.RANDOM else "the model's own text")


def parse_source(name: str, text: Path | None) -> TokenSource:
    """The source that users mean by ``random`` or ``self`` and perhaps a text.

    Raises:
        ProfileError: another word, or a text besides ``self``.
    """
    if name not in (TokenSource.RANDOM, TokenSource.SELF):
        raise ProfileError(f"--calibration is random or self, or leave it out and give --text FILE; got '{name}'.")
    if text is not None and name == TokenSource.SELF:
        raise ProfileError(f"--calibration self and --text {text} exclude each other; leave one out.")
    return TokenSource.TEXT if text is not None else TokenSource(name)


def calibration(
    model_dir: Path,
    text: Path | None,
    *,
    tokens: int,
    window: int,
    seed: int,
    source: TokenSource = TokenSource.RANDOM,
    device: torch.device | None = None,
) -> Calibration:
    """The first windows of a text, or as many of random tokens or of what the model writes.

    Args:
        text: UTF-8; None for a data-free source.
        tokens: about how many; rounded down to whole windows.
        window: tokens of a window.
        seed: of random tokens and of draws from the model.
        source: of tokens that are not a text's.
        device: where the model writes; None for the CPU. Only this source needs the whole model in memory.

    Raises:
        ProfileError: fewer tokens than a window, a longer window than the model reads, a bad text, tokenizer or model.
    """
    count = tokens // window
    if not count:
        raise ProfileError(f"expected tokens for at least one window of {window}; got {tokens}.")
    config = load_config(model_dir)
    longest = getattr(config, "max_position_embeddings", window)
    if window > longest:
        raise ProfileError(f"expected windows of at most the {longest} tokens that {model_dir} reads; got {window}.")
    if text is not None:
        return Calibration(token_windows(model_dir, text, window, count), TokenSource.TEXT, text.name)
    if source is TokenSource.SELF:
        model = load_model(model_dir, device or torch.device("cpu"))
        return Calibration(self_written(model, count, window, seed), source)
    return Calibration(random_windows(config.vocab_size, count, window, seed), TokenSource.RANDOM)
