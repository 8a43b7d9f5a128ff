"""A packed weight to fp16 or bf16 on the device, for products of many tokens: host's side of ``dequantize.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from ..specs import TILE, QuantizerSpec
from .jit import Source, load
from .layout import PreparedWeight
from .limits import device_limits
from .tuning import FORMATS, decoder_macros, table_size

_WARPS = 8
_BLOCKS_PER_MULTIPROCESSOR = 4


def source(spec: QuantizerSpec, rate: float, dtype: torch.dtype) -> tuple[Source, int]:
    """The kernel of one segment, and its bytes of shared memory."""
    replicas = 32
    while replicas > 1 and table_size(spec, replicas, signed=False) > 32 << 10:
        replicas //= 2
    macros = decoder_macros(spec, [rate], replicas, signed=False)
    macros |= {"WARPS": _WARPS, "BFLOAT": FORMATS[dtype]}
    return Source("dequantize.cu", "dequantize", macros), table_size(spec, replicas, signed=False)


def dequantize(weight: PreparedWeight, dtype: torch.dtype = torch.float16, out: Tensor | None = None) -> Tensor:
    """The weight in the rotated domain: code value times row scale in fp32, rounded once.

    Args:
        dtype: fp16 or bf16.
        out: ``(out_features, in_features)`` contiguous; made anew where None.

    Raises:
        KernelError: another dtype or device.
    """
    if dtype not in FORMATS:
        raise KernelError(f"expected float16 or bfloat16; got {dtype}.")
    device, shape = weight.device, (weight.out_features, weight.in_features)
    y = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    blocks = device_limits(device.index).multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    codebook = weight.codebook if weight.codebook.numel() else None
    start = 0
    for units, rate, columns in zip(weight.units, weight.spec.rates, weight.segment_columns, strict=True):
        code, shared_bytes = source(weight.spec, rate, dtype)
        row_tiles, count = weight.out_features // TILE, units.shape[1]
        target = y.view(-1)[start:]
        arguments = (units, codebook, weight.scales, target, row_tiles, count, columns, weight.in_features)
        load(code, device).launch(
            min(blocks, -(-row_tiles * count // _WARPS)), 32 * _WARPS, arguments, shared_bytes=shared_bytes
        )
        start += columns
    return y
