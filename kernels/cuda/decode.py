"""``y = x W^T`` for up to 16 tokens on the packed weight: the host's side of ``sources/decode.cu``.

    weight = prepare(quantized)                 # once
    y = multiply(x, weight)                     # x: (batch, in_features) fp16 or bf16, already rotated

Weights are decoded in registers into the A operand of tensor-core multiplications; the time goes into reading them. One
kernel is compiled for each quantizer, format, batch (rounded up to a power of two) and `Tuning`; shapes are arguments.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..errors import KernelError
from ..specs import TILE, QuantizerSpec, TrellisCode
from .jit import Kernel, load
from .layout import PreparedWeight
from .limits import device_index, device_limits
from .tuning import FORMATS, Launch, Tuning, launch_for
from .tuning_choice import tune

MAX_BATCH = 16
KERNEL_CODES = (TrellisCode.MAD, TrellisCode.HYB)
_EMPTY_WORD = -1


def unsupported_reason(
    spec: QuantizerSpec, out_features: int, in_features: int, batch_size: int, device: torch.device
) -> str | None:
    """None where `multiply` works, else one sentence that says why not."""
    reason = unsupported_weight_reason(spec, out_features, in_features, device)
    if reason is not None:
        return reason
    if not 1 <= batch_size <= MAX_BATCH:
        return f"the decode kernels take 1 to {MAX_BATCH} tokens; got {batch_size}: dequantize and multiply instead."
    limits = device_limits(device_index(device))
    if tune(spec, out_features, in_features, batch_size, limits) is None:
        return (
            f"{spec.label} of {in_features} inputs and {batch_size} tokens needs more shared memory than the "
            f"{limits.shared_bytes} bytes of {device}."
        )
    return None


def unsupported_weight_reason(
    spec: QuantizerSpec, out_features: int, in_features: int, device: torch.device
) -> str | None:
    """None where kernels on a device can decode a weight, else one sentence that says why not."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the decode kernels need a CUDA device; got '{device}'."
    if torch.cuda.get_device_capability(device)[0] < 8:
        return (
            f"the decode kernels need compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} is older."
        )
    if spec.code not in KERNEL_CODES:
        return (
            f"the decode kernels know the trellis codes {' and '.join(KERNEL_CODES)}; {spec.label} runs as reference."
        )
    if out_features % TILE or in_features % (2 * TILE):
        return (
            f"the decode kernels take multiples of {TILE} outputs and {2 * TILE} inputs; "
            f"got {out_features} x {in_features}."
        )
    return None


def fits(weight: PreparedWeight, batch: int) -> bool:
    """Whether `multiply` takes a layer for so many tokens, on the layer's device."""
    limits = device_limits(weight.device.index)
    shape = (weight.out_features, weight.in_features)
    return batch <= MAX_BATCH and tune(weight.spec, *shape, batch, limits) is not None


@cache
def ready(
    spec: QuantizerSpec,
    out_features: int,
    in_features: int,
    batch: int,
    dtype: torch.dtype,
    index: int,
    tuning: Tuning | None,
) -> tuple[Launch, Kernel]:
    """The loaded kernel of a shape on CUDA device `index`, and how to launch it.

    Raises:
        KernelError: it is not supported there, or `tuning` does not fit.
    """
    device = torch.device("cuda", index)
    reason = unsupported_reason(spec, out_features, in_features, batch, device)
    if reason is not None:
        raise KernelError(reason)
    limits = device_limits(index)
    chosen = tuning or tune(spec, out_features, in_features, batch, limits)
    launch = None
    if chosen is not None:
        launch = launch_for(spec, out_features, in_features, batch, dtype, limits, chosen)
    if launch is None:
        raise KernelError(f"{chosen} does not fit {spec.label} of {out_features}x{in_features} on {device}.")
    return launch, load(launch.source, device)


def new_workspace(words: int, device: torch.device) -> Tensor:
    """A workspace for launches of up to `words` words, one after another on one stream: ``(words,)`` int32."""
    return torch.full((words,), _EMPTY_WORD, dtype=torch.int32, device=device)


def workspace_words(weight: PreparedWeight, batch: int, dtype: torch.dtype, tuning: Tuning | None = None) -> int:
    """Words of workspace that `multiply` needs for a batch; 0 for most."""
    index = weight.device.index
    return ready(weight.spec, weight.out_features, weight.in_features, batch, dtype, index, tuning)[0].workspace_words


def kernel_arguments(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    y: Tensor,
    workspace: Tensor | None,
    launch: Launch,
    *,
    row_tiles: int | None = None,
) -> tuple[Tensor | int | None, ...]:
    """What the kernel is called with, in the order of its parameters.

    `row_tiles`: how many rows of tiles to multiply; None for all. With 0 a launch only starts and ends.
    """
    high = weight.units[1] if len(weight.units) > 1 else None
    columns = weight.segment_columns
    row_tiles = weight.out_features // TILE if row_tiles is None else row_tiles
    return (
        weight.units[0],
        high,
        weight.codebook if weight.codebook.numel() else None,
        weight.scales,
        bias,
        x,
        y,
        workspace if launch.workspace_words else None,
        row_tiles,
        weight.units[0].shape[1],
        0 if high is None else high.shape[1],
        columns[0],
        0 if high is None else columns[1],
        x.shape[0],
        launch.chunk_blocks,
        row_tiles // launch.chunk_blocks,
        row_tiles % launch.chunk_blocks,
        launch.block_tiles,
    )


def multiply(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    tuning: Tuning | None = None,
    programmatic: bool = False,
) -> Tensor:
    """``x W^T + bias`` in the rotated domain, results rounded once; on torch's current stream.

    Sums are fp32, or int32 where weights are multiplied as bytes (``decode.cu``): then activations keep 14 bits below
    the largest of a warp's columns.

    Args:
        x: ``(batch, in_features)`` fp16 or bf16, contiguous, at most `MAX_BATCH` rows, aligned to 16 bytes.
        bias: ``(out_features,)`` in the dtype of `x`.
        out: ``(batch, out_features)`` contiguous, in the dtype of `x`; made anew where None.
        workspace: of `new_workspace`, at least `workspace_words`; kernels that may run at once must not share it.
        tuning: None for the best known.
        programmatic: see `jit.Kernel.launch`. Units and codebook are read before the kernels ahead have ended: they
            must have been written before a synchronisation.

    Raises:
        KernelError: shape, dtype, device or workspace does not fit.
    """
    batch = x.shape[0]
    if x.dtype not in FORMATS or x.dim() != 2 or x.shape[1] != weight.in_features or not x.is_contiguous():
        raise KernelError(
            f"expected contiguous fp16 or bf16 activations (batch, {weight.in_features}); "
            f"got {tuple(x.shape)} {x.dtype}."
        )
    index = weight.device.index
    launch, kernel = ready(weight.spec, weight.out_features, weight.in_features, batch, x.dtype, index, tuning)
    if launch.workspace_words and (workspace is None or workspace.numel() < launch.workspace_words):
        raise KernelError(f"this product needs a workspace of {launch.workspace_words} words: see new_workspace().")
    if x.data_ptr() % 16:
        raise KernelError("activations must be aligned to 16 bytes; copy them first.")
    y = torch.empty(batch, weight.out_features, dtype=x.dtype, device=x.device) if out is None else out
    arguments = kernel_arguments(x, weight, bias, y, workspace, launch)
    kernel.launch(launch.grid, launch.block, arguments, shared_bytes=launch.shared_bytes, programmatic=programmatic)
    return y
