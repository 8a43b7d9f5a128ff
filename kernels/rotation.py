"""The input rotation that makes weights look Gaussian: random signs, then a Hadamard matrix.

Weights ``W (out, in)`` become ``W diag(s) H``; an input ``x`` becomes ``x diag(s) H``, so products stay the same.
Layers that share an input share its signs, and so one rotation of it. Signs come from a seed by a fixed integer hash
(splitmix64), the same on every platform and library version, so a checkpoint stores the seed alone.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .hadamard import apply_hadamard, hadamard_plan


def input_seed(input_name: str, seed: int = 0) -> int:
    """The sign seed of one input of a model, 0 <= seed < 2**63.

    Args:
        input_name: what names the input; msq uses the fusion group of the layers that read it.
        seed: the seed of the whole model.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{input_name}".encode()).digest()[:8], "little") >> 1


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # whoever asks first, gradients may need it later
def rotation_signs(size: int, seed: int) -> Tensor:
    """``(size,)`` float32 of +1 and -1.

    Args:
        seed: 0 <= seed < 2**63.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, size + 1, dtype=np.uint64)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy(1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float32))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _signs_on(device: torch.device, size: int, seed: int) -> Tensor:
    """`rotation_signs` on a device, kept: nothing can be copied there while a CUDA graph is captured."""
    return rotation_signs(size, seed).to(device)


def rotate(x: Tensor, seed: int) -> Tensor:
    """``x diag(s) H`` along the last dimension, in float32; any leading shape."""
    size = x.shape[-1]
    return apply_hadamard(x.float() * _signs_on(x.device, size, seed), hadamard_plan(size))


def unrotate(x: Tensor, seed: int) -> Tensor:
    """Inverse of `rotate`."""
    size = x.shape[-1]
    turned = apply_hadamard(x.float(), hadamard_plan(size), inverse=True)
    return turned * _signs_on(x.device, size, seed)


def rotation_note(size: int) -> str | None:
    """What to tell people when a size has no Hadamard matrix here; None where the rotation mixes all of it."""
    plan = hadamard_plan(size)
    if plan.is_complete:
        return None
    return f"no Hadamard matrix of size {size} is built here; inputs of that size are rotated in blocks of {plan.block}"
