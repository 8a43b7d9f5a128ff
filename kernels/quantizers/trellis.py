"""`tcq`: trellis-coded quantization. `viterbi` says what a trellis is, `codes` what its states stand for."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from ..mad import mad_code
from ..packing import sliding_states
from ..specs import TILE, QuantizerSpec, TrellisCode
from .base import PairCoder
from .codes import state_points
from .viterbi import viterbi_encode

_log = logging.getLogger(__name__)


class TrellisCoder(PairCoder):
    """A pair's code is the new bits of its trellis step, or of its two steps, the first in the low bits."""

    block = TILE

    def __init__(self, spec: QuantizerSpec, rate: float) -> None:
        """One of the rates of a quantizer, in bits per weight."""
        self.width = int(2 * rate)
        self.state_bits = spec.state_bits
        self.code = spec.code
        self.gain = mad_code(self.width).gain if spec.code is TrellisCode.MAD else 1.0
        """Without this factor the points are exact in fp16, but for the outermost of MAD with two hashes."""
        self.mirrored = spec.code is TrellisCode.HYB and spec.state_bits == 16
        """Whether states s and 65535 - s stand for the same point."""
        self.step_width = self.width // spec.pair_steps
        self._weights_per_step = 2 // spec.pair_steps

    def points(self, codebook: Tensor, device: torch.device) -> Tensor:
        """What every state stands for: ``(2**state_bits, 2)``, or ``(2**state_bits, 1)`` where a step is one weight."""
        return state_points(codebook, self.state_bits, self.code, self.width, device)

    def encode(self, pairs: Tensor, codebook: Tensor) -> Tensor:
        points = self.points(codebook, pairs.device)
        inputs = self.inputs(pairs)
        if pairs.is_cuda and kernel_problem(pairs.device) is None:
            from ..cuda.viterbi import encode

            if self.gain != 1:  # the kernel rounds points to fp16
                inputs, points = inputs / self.gain, points / self.gain
            steps = encode(inputs, points, self.step_width, mirrored=self.mirrored)
        else:
            steps = viterbi_encode(inputs, points, self.step_width)
        return steps if self._weights_per_step == 2 else steps[:, ::2] | steps[:, 1::2] << self.step_width

    def decode(self, codes: Tensor, codebook: Tensor) -> Tensor:
        points = self.points(codebook, codes.device)
        pairs: Tensor = points[self.states(codes)].unflatten(-2, (-1, self.width // self.step_width)).flatten(-2)
        return pairs

    def inputs(self, pairs: Tensor) -> Tensor:
        """What each step takes: ``(tiles, 128, 2)`` -> the same, or ``(tiles, 256, 1)``."""
        return pairs.reshape(len(pairs), pairs.shape[1] * 2 // self._weights_per_step, self._weights_per_step)

    def states(self, codes: Tensor) -> Tensor:
        """The trellis states of every step: codes ``(..., 128)`` -> ``(..., 128)`` or ``(..., 256)``."""
        if self._weights_per_step == 1:
            codes = torch.stack([codes & (1 << self.step_width) - 1, codes >> self.step_width], dim=-1).flatten(-2)
        return sliding_states(codes, self.step_width, self.state_bits)


@cache
def kernel_problem(device: torch.device) -> str | None:
    """Why the search on a CUDA device has to do without its kernel; logged once as a warning. None where it has one."""
    from ..cuda.compiler import compiler_version
    from ..cuda.jit import KernelError, device_arch

    try:
        device_arch(device)
        compiler_version()
    except KernelError as cause:
        _log.warning("trellis codes are searched by PyTorch, several times slower than by the kernel: %s", cause)
        return str(cause)
    return None
