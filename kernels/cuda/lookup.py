"""Rows of a packed weight on the device, one for each token: host's side of ``lookup.cu``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..errors import KernelError
from ..specs import TILE, QuantizerSpec
from .hadamard import ROW_FORMATS
from .jit import Source, load
from .layout import PreparedWeight
from .limits import device_limits
from .tuning import decoder_macros, table_size

_WARPS = 8
_BLOCKS_PER_MULTIPROCESSOR = 4
_UNITS_AT_ONCE = 8
"""Units of a row that a warp decodes together."""


@cache
def source(spec: QuantizerSpec, rate: float, dtype: torch.dtype) -> tuple[Source, int]:
    """The kernel of one segment, and its bytes of shared memory.

    Args:
        dtype: that is written: fp16, bf16 or fp32.
    """
    # One copy of the table, but for codes that are bytes: these bring 32.
    macros = decoder_macros(spec, [rate], 1, signed=False)
    macros |= {"WARPS": _WARPS, "OUT": ROW_FORMATS[dtype]}
    return Source("lookup.cu", "look_up", macros), table_size(spec, 1, signed=False)


def lookup(tokens: Tensor, weight: PreparedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the weight in the rotated domain: code value times row scale in fp32, rounded once to `dtype`.

    An ordinary launch, never a programmatic one: kernels behind it may read early what was written before it.

    Args:
        tokens: ``(count,)`` int64, contiguous; one outside the weight's rows stops the kernel with an error.
        dtype: fp16, bf16 or fp32.

    Returns:
        ``(count, in_features)``.

    Raises:
        KernelError: tokens of another dtype or on another device.
    """
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or not tokens.is_contiguous() or tokens.device != weight.device:
        raise KernelError(
            f"expected contiguous int64 tokens (count,) on {weight.device}; got {tuple(tokens.shape)} {tokens.dtype} "
            f"on {tokens.device}."
        )
    count, width = tokens.shape[0], weight.in_features
    y = torch.empty(count, width, dtype=dtype, device=weight.device)
    if not count:
        return y
    most = device_limits(weight.device.index).multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    codebook = weight.codebook if weight.codebook.numel() else None
    start = 0
    for units, rate, columns in zip(weight.units, weight.spec.rates, weight.segment_columns, strict=True):
        code, shared_bytes = source(weight.spec, rate, dtype)
        blocks = -(-count * -(-units.shape[1] // _UNITS_AT_ONCE) // _WARPS)
        target = y.view(-1)[start:]
        rows = units.shape[0] * TILE
        arguments = (tokens, units, codebook, weight.scales, target, count, rows, units.shape[1], columns, width)
        load(code, weight.device).launch(min(most, blocks), 32 * _WARPS, arguments, shared_bytes=shared_bytes)
        start += columns
    return y
