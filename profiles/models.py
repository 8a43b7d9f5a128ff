"""Loading a model, its tokenizer and token windows, with every failure as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CorruptModelError, ProfileError
from .inventory import inventory
from .model_config import read_json

MAX_TEXT_BYTES = 64 << 20
"""A text file for calibration or evaluation may not be larger; it would be read whole."""


def choose_device(name: str) -> torch.device:
    """A torch device by name, checked to be there.

    Raises:
        ProfileError: unknown name, or no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise ProfileError(f"expected a device such as cpu or cuda; got '{name}'.") from cause
    if device.type not in ("cpu", "cuda"):
        raise ProfileError(f"msq runs on cpu and cuda; got '{name}'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ProfileError("this machine has no usable CUDA device; use --device cpu, or see `msq doctor`.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ProfileError(f"this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0; got '{name}'.")
    return device


def load_config(directory: Path) -> Any:
    """The transformers configuration of a model directory, or of a JSON file.

    Raises:
        ProfileError: transformers can't read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as cause:  # as in load_model
        detail = " ".join(str(cause).split())[:200]
        raise ProfileError(
            f"transformers can't read the config of {directory} ({type(cause).__name__}: {detail})."
        ) from cause


def load_model(directory: Path, device: torch.device) -> nn.Module:
    """The stock Hugging Face model, in evaluation mode; float32 on a CPU, its own dtype on a GPU.

    Raises:
        ProfileError: a tensor is missing, unknown or of another shape (`inventory`), or transformers can't load it.
        CorruptModelError: a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if read_json(directory / "config.json", "model config").get("quantization_config") is None:
        inventory(directory)  # transformers would draw missing weights at random
    logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except Exception as cause:  # transformers raises any type for a damaged model; type and text are told
        detail = " ".join(str(cause).split())[:200]
        raise ProfileError(
            f"transformers can't load {directory} ({type(cause).__name__}: {detail}); check its config.json, or "
            "download it again."
        ) from cause
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CorruptModelError(
                f"'{name}' of {directory} has NaN or infinite weights; the model is corrupt, download it again."
            )
    return model.to(device).eval()


def token_windows(directory: Path, text_file: Path, length: int, limit: int | None = None) -> Tensor:
    """A text file as windows of tokens, in order, without overlap.

    Args:
        directory: the model's directory, for its tokenizer.
        length: tokens of a window.
        limit: at most so many windows.

    Returns:
        ``(windows, length)`` int64.

    Raises:
        ProfileError: no such text, not UTF-8, too large, shorter than one window; or a missing or broken tokenizer.
    """
    try:
        size = text_file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise ProfileError(
                f"{text_file} has {size} bytes; expected at most {MAX_TEXT_BYTES}: cut a sample from it."
            )
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise ProfileError(f"{text_file} is not UTF-8 text ({cause.reason} at byte {cause.start}).") from cause
    except OSError as cause:
        raise ProfileError(f"can't read the text {text_file}: {cause.strerror or cause}.") from cause
    return windows_of(load_tokenizer(directory), text, length, limit, str(text_file))


def windows_of(tokenizer: Any, text: str, length: int, limit: int | None, what: str) -> Tensor:
    """Cut a text into windows of tokens, as `token_windows` does; `what` names it in messages."""
    if length < 2:
        raise ProfileError(f"expected windows of at least 2 tokens; got {length}.")
    tokens = tokenizer(text, verbose=False)["input_ids"]  # not verbose: the text is longer than the context on purpose
    if len(tokens) < length:
        raise ProfileError(f"{what} has {len(tokens)} tokens; expected at least one window of {length}.")
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).view(count, length)[:limit]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ProfileError: it is missing or broken.
    """
    from transformers import AutoTokenizer

    read_json(directory / "config.json", "model config")  # transformers would blame the tokenizer
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ProfileError(
            f"{directory} has no tokenizer; expected tokenizer.json beside config.json: put it there, or download the "
            "model again."
        )
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as cause:  # as in load_model
        detail = " ".join(str(cause).split())[:200]
        raise ProfileError(
            f"can't load the tokenizer of {directory} ({type(cause).__name__}: {detail}); download it again."
        ) from cause


def random_windows(vocabulary: int, windows: int, length: int, seed: int) -> Tensor:
    """Uniform random tokens, ``(windows, length)`` int64: the data-free input of Q-Palette (arXiv 2509.20214)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (windows, length), generator=generator)
