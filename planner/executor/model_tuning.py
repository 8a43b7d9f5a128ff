"""The whole model by gradient descent: the quantized model's distribution of the next token shall be the original's.

Both models are in memory, in float32: this is for models of which there is room for that. What has been reached is kept
after every epoch, with the optimizer's moments, so that an interrupted job repeats one epoch at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.quantize import QuantizedWeight
from ...kernels.tunable import TunableLinear
from ...profiles.blockwise import token_kl
from ...profiles.files import write_atomic
from ...profiles.models import load_model
from ...profiles.progress import progress
from ...profiles.schema import HEAD
from ...profiles.streaming import stored_dtype, tensor_files
from .block_tuning import Change, Descent, better, changed_tensors, quantized_copy
from .errors import CheckpointError

EPOCHS = 4
"""Passes over the tokens."""
LEARNING_RATE = 3e-3
"""As of `block_tuning`."""
_TOKENS_A_STEP = 4096
_LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}


def tune_model(
    model_dir: Path,
    weights: Mapping[str, QuantizedWeight],
    tensors: Mapping[str, Tensor],
    shared: Sequence[Sequence[str]],
    windows: Tensor,
    *,
    state: Path,
    device: torch.device,
) -> tuple[dict[str, Tensor], Change]:
    """Tune row scales, codebooks, norms and biases of all planned layers together.

    Args:
        model_dir: the original.
        weights: its packed layers by module path.
        tensors: by name as in a checkpoint, what blocks were tuned to; where to begin.
        shared: paths of layers that share a codebook; every layer once.
        windows: ``(windows, length)`` int64.
        state: the file that keeps the last epoch's state; what an interrupted job left is used, the caller removes it.
        device: where to compute.

    Returns:
        Tensors by name and in the dtype of a checkpoint, and the loss. They are those it began with where tuning did
        not lower the loss.

    Raises:
        ProfileError: the model can't be loaded.
        CheckpointError: the loss is not finite, or a file can't be written.
    """
    original = load_model(model_dir, device).float().requires_grad_(False)
    tuned = quantized_copy(original, "", weights, tensors, shared)
    for name, parameter in tuned.named_parameters():
        dense_head = name.startswith(f"{HEAD}.") and not isinstance(tuned.get_submodule(HEAD), TunableLinear)
        parameter.requires_grad_(not (dense_head or "embed_tokens" in name))
    files = tensor_files(model_dir)

    def stored(name: str) -> torch.dtype:
        return stored_dtype(files, name)

    candidates = [changed_tensors(tuned, "", stored)]
    _descend(original, tuned, windows, state, device)
    candidates.append(changed_tensors(tuned, "", stored))
    del tuned
    losses = [_mean_kl(original, quantized_copy(original, "", weights, each), windows, device) for each in candidates]
    return better(candidates, losses, "the KL divergence of the quantized model")


def _descend(original: nn.Module, tuned: nn.Module, windows: Tensor, state: Path, device: torch.device) -> None:
    steps = windows.split(max(1, _TOKENS_A_STEP // windows.shape[1]))
    descent = Descent(tuned, EPOCHS * len(steps), LEARNING_RATE)
    begin = _restore(tuned, descent, state)
    with progress("tuning the model", EPOCHS * len(steps), done=begin * len(steps)) as advance:
        for epoch in range(begin, EPOCHS):
            order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(epoch)).tolist()
            for number, which in enumerate(order):
                batch = steps[which]
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                    for part in _parts(original, batch, device):
                        (_token_kls(original, tuned, part, device).sum() / batch.numel()).backward()
                descent.step(epoch * len(steps) + number)
                advance()
            _keep(tuned, descent, epoch + 1, state)


@torch.no_grad()
def _mean_kl(original: nn.Module, tuned: nn.Module, windows: Tensor, device: torch.device) -> float:
    parts = _parts(original, windows, device)
    return math.fsum(float(_token_kls(original, tuned, part, device).sum()) for part in parts) / windows.numel()


def _parts(original: nn.Module, windows: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Windows whose logits are formed together."""
    logits = windows.shape[1] * int(cast(Any, original).config.vocab_size)
    parts: tuple[Tensor, ...] = windows.split(max(1, _LOGITS_AT_ONCE[device.type] // logits))
    return parts


def _token_kls(original: nn.Module, tuned: nn.Module, windows: Tensor, device: torch.device) -> Tensor:
    """``(windows, length)`` float64."""
    tokens, untyped = windows.to(device), (cast(Any, original), cast(Any, tuned))
    with torch.no_grad():
        wanted = untyped[0](tokens, use_cache=False).logits
    return token_kl(wanted, untyped[1](tokens, use_cache=False).logits)


def _learned(tuned: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}


def _keep(tuned: nn.Module, descent: Descent, epochs: int, state: Path) -> None:
    """Write parameters and moments after some epochs."""
    kept = {"epochs": torch.tensor(epochs)}
    for name, parameter in _learned(tuned).items():
        moments = descent.optimizer.state[parameter]
        kept |= {f"{name}:{key}": value.cpu().contiguous() for key, value in moments.items()}
        kept[f"{name}:value"] = parameter.detach().cpu()
    write_atomic(state, save(kept), CheckpointError)


def _restore(tuned: nn.Module, descent: Descent, state: Path) -> int:
    """Read what `_keep` wrote, if it did; the epochs that are done."""
    if not state.exists():
        return 0
    kept = load_file(state)
    for name, parameter in _learned(tuned).items():
        parameter.data = kept[f"{name}:value"].to(parameter.device)
        moments = {key: kept[f"{name}:{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        moments |= {key: moments[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        descent.optimizer.state[parameter] = moments
    return int(kept["epochs"])
