"""The tail-biting Viterbi search on a GPU: the host's side of ``sources/viterbi.cu``.

    codes = encode(pairs, points, width, mirrored=True)     # as quantizers.viterbi.viterbi_encode

The result costs what the reference's does: sums are taken in fp32 in another order, so that of two paths within a few
units of the last place of each other the other one may be found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ..quantizers.viterbi import window
from .jit import Source, load
from .limits import RESERVED_BYTES, Limits, device_index, device_limits

_RESIDENT = 2
"""Blocks of a multiprocessor: one searches while the other traces its paths or waits at a barrier."""
_MINIMA = 32
"""Tiles times overlaps of a thread at most: it keeps two minima for each in registers."""
_SCRATCH_BYTES = 3 << 30
"""Bound for the memory of all blocks together."""


@dataclass(frozen=True)
class Division:
    """How the kernel divides its work; any choice gives the same result where it fits.

    Attributes:
        tiles: tiles that a block searches at once, a power of two up to 8.
        threads: of a block.
        run: neighbouring overlaps of a thread, read at once.
        runs: how many such runs a thread has; it has the mirror images too.
        resident: blocks for which a multiprocessor has registers.
    """

    tiles: int
    threads: int
    run: int
    runs: int
    resident: int = _RESIDENT

    def splits(self, overlaps: int) -> int:
        """Threads that share the alternatives of an overlap."""
        return self.threads * self.run * self.runs * 2 // overlaps


def shared_bytes(state_bits: int, width: int, steps: int, chosen: Division) -> int:
    """Dynamic shared memory of a block."""
    overlaps = 1 << state_bits - width
    splits = chosen.splits(overlaps)
    costs = 4 * overlaps * chosen.tiles * (1 + splits if splits > 1 else 1)
    return costs + (8 * steps + 4) * chosen.tiles


@cache
def divide(state_bits: int, width: int, steps: int, tiles: int, limits: Limits) -> Division | None:
    """A division of work that fits the device and keeps all of it busy; None where none fits."""
    half = 1 << state_bits - width - 1
    threads = max(32, 1 << state_bits - 8)
    fallback = None
    for together, minima in itertools.product((8, 4, 2, 1), (_MINIMA, _MINIMA // 2)):
        own = min(max(half // threads, minima // together), half, max(1, (1 << state_bits - 1) // threads))
        if own * together > _MINIMA and together > 1:
            continue
        run = min(own, 4)
        chosen = Division(together, threads, run, own // run)
        needed = shared_bytes(state_bits, width, steps, chosen)
        if needed > limits.shared_bytes:
            continue
        fits_twice = _RESIDENT * (needed + RESERVED_BYTES) <= limits.shared_bytes + RESERVED_BYTES
        if fits_twice and -(-tiles // together) >= limits.multiprocessors:
            return chosen
        if fits_twice or fallback is None:
            fallback = chosen
    return fallback


def source(
    state_bits: int, width: int, steps: int, chosen: Division, *, mirrored: bool, seam_steps: int | None = None
) -> Source:
    """The kernel of one trellis; `seam_steps` replaces `window`."""
    macros = {"STATE_BITS": state_bits, "WIDTH": width, "STEPS": steps, "WINDOW": seam_steps or window(width)}
    macros |= {"TILES": chosen.tiles, "BLOCK_THREADS": chosen.threads, "RESIDENT": chosen.resident}
    return Source("viterbi.cu", "encode", macros | {"RUN": chosen.run, "RUNS": chosen.runs, "MIRRORED": mirrored})


def encode(
    pairs: Tensor,
    points: Tensor,
    width: int,
    *,
    mirrored: bool = False,
    division: Division | None = None,
    seam_steps: int | None = None,
) -> Tensor:
    """The tail-biting code of least squared error, on torch's current stream.

    Args:
        pairs: ``(tiles, steps, 2)`` float32 on a CUDA device; or single weights, ``(tiles, steps, 1)``.
        points: ``(2**state_bits, 2)``, the pair that each state stands for, or ``(2**state_bits, 1)``; rounded to fp16.
        width: stream bits a step.
        mirrored: whether states s and ``2**state_bits - 1 - s`` stand for the same point; halves the distances.
        division: None for the best known.
        seam_steps: window of the first search, at most `steps`; None for `window`.

    Returns:
        ``(tiles, steps)`` int32: the new bits of each step.

    Raises:
        KernelError: the device is too old or too small, or the division does not fit.
    """
    state_bits = len(points).bit_length() - 1
    tiles, steps = pairs.shape[:2]
    codes = torch.empty(tiles, steps, dtype=torch.int32, device=pairs.device)
    if not codes.numel():
        return codes
    limits = device_limits(device_index(pairs.device))
    chosen = division or divide(state_bits, width, steps, tiles, limits)
    needed = 0 if chosen is None else shared_bytes(state_bits, width, steps, chosen)
    if chosen is None or needed > limits.shared_bytes:
        raise KernelError(
            f"a search over 2^{state_bits} states at {width} bits a step needs more shared memory than the "
            f"{limits.shared_bytes} bytes of {pairs.device}: use a shorter trellis, or encode on the CPU."
        )
    code = source(state_bits, width, steps, chosen, mirrored=mirrored, seam_steps=seam_steps)
    kernel = load(code, pairs.device)
    step_words = chosen.tiles << state_bits - width
    resident = max(1, kernel.blocks_per_multiprocessor(chosen.threads, needed))
    most = max(1, _SCRATCH_BYTES // (4 * steps * step_words))
    blocks = min(-(-tiles // chosen.tiles), limits.multiprocessors * resident, most)
    scratch = torch.empty(blocks, steps, step_words, device=pairs.device)
    missing = (0, 2 - points.shape[1])  # single weights are pairs with a zero
    words, inputs = F.pad(points.half(), missing).contiguous(), F.pad(pairs.float(), missing).contiguous()
    arguments = (inputs, words, codes, scratch, tiles)
    kernel.launch(blocks, chosen.threads, arguments, shared_bytes=needed)
    return codes
