"""Tail-biting Viterbi search over the bitshift trellis, many tiles at once.

The trellis of QTIP (arXiv 2406.11235, section 3): state ``s_t`` is the ``state_bits`` stream bits that start at bit
``t * width``, so ``s_{t+1}`` shares all but ``width`` of them with ``s_t``:

    s_t >> width == s_{t+1} & (2**(state_bits - width) - 1) =: u_{t+1}

Going from the last step to the first, the best cost of finishing in state s is

    V_t[s] = |x_t - p_s|^2 + M_{t+1}[s >> width],      M_t[u] = min_j V_t[j * 2**(state_bits - width) + u]

which touches each state twice a step, whatever the width. Only M is kept (``2**(state_bits - width)`` floats a step);
the trace-back forms the few V it needs again.

The stream of a tile is a circle (tail-biting): the ``state_bits - width`` bits shared by the last and the first state
must agree. As in QTIP, a first search with free ends over a turned sequence fixes those bits, and a second search is
exact given them (Algorithm 4 there). QTIP turns by half and searches the whole; the best paths from either side merge
within a few state lengths, so the `WINDOW` steps on both sides of the seam decide as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES_IN_FLIGHT = {"cpu": 1 << 22, "cuda": 1 << 29}
"""Size of one cost array: small enough for a CPU's caches, large enough to fill a GPU."""
_WINDOWS = {3: 96, 4: 96, 5: 80, 6: 72, 7: 64, 8: 48, 9: 40, 10: 32}
_LEAST_TILES = 16
"""Tiles are the innermost dimension, so a batch must fill a vector register or two."""


def viterbi_encode(pairs: Tensor, points: Tensor, width: int) -> Tensor:
    """The tail-biting code of least squared error.

    Args:
        pairs: ``(tiles, steps, 2)`` float32, what to approximate; or single weights, ``(tiles, steps, 1)``.
        points: ``(2**state_bits, 2)`` float32, the pair that each state stands for; or ``(2**state_bits, 1)``.
        width: stream bits a step.

    Returns:
        ``(tiles, steps)`` int32: the new bits of each step.
    """
    bytes_in_flight = _BYTES_IN_FLIGHT.get(pairs.device.type, _BYTES_IN_FLIGHT["cpu"])
    batch = max(_LEAST_TILES, bytes_in_flight // (4 * len(points)))
    search = _Search(points, width)
    codes = [search.encode(chunk) for chunk in pairs.split(batch)]
    return torch.cat(codes) if codes else torch.empty(pairs.shape[:2], dtype=torch.int32, device=pairs.device)


def window(width: int) -> int:
    """Steps on each side of the seam that the first search looks at.

    Against 128 steps, once around a tile and back, these add 1e-4 to 2e-4 of the error of N(0,1) at L = 16, and 4e-4 at
    3 bits a step (``experiments/results/encoder_h200.csv``).
    """
    return _WINDOWS.get(width, 128)


class _Search:
    """A trellis with what every step needs of it."""

    def __init__(self, points: Tensor, width: int) -> None:
        self.width = width
        self.states = len(points)
        self.fan = 1 << width
        self.window = window(width)
        self.overlaps = self.states >> width
        # |x - p|^2 is the product of these rows with (x, 1, |x|^2).
        norms = points.square().sum(-1, keepdim=True)
        self.rows = torch.cat([-2 * points, norms, torch.ones_like(norms)], dim=1)

    def encode(self, pairs: Tensor) -> Tensor:
        """``(tiles, steps, dimension)`` -> codes ``(tiles, steps)`` int32."""
        steps = pairs.shape[1]
        norms = pairs.square().sum(-1, keepdim=True)
        inputs = torch.cat([pairs, torch.ones_like(norms), norms], dim=-1).permute(1, 2, 0).contiguous()
        turned = torch.arange(-self.window, self.window, device=pairs.device) % steps
        seam = inputs[turned]
        kept = self._forward(seam, overlap=None)
        overlap = self._trace_back(seam, kept, kept[0].argmin(dim=0), self.window)[-1] >> self.width
        path = self._trace_back(inputs, self._forward(inputs, overlap), overlap, steps)
        return (path & self.fan - 1).T.to(torch.int32)

    def _forward(self, inputs: Tensor, overlap: Tensor | None) -> Tensor:
        """M of every step, ``(steps + 1, overlaps, tiles)``; `overlap` ``(tiles,)`` fixes the bits both ends share.

        Args:
            inputs: ``(steps, dimension + 2, tiles)``, rows x, 1 and |x|^2.
        """
        steps, _, tiles = inputs.shape
        kept = inputs.new_empty(steps + 1, self.overlaps, tiles)
        if overlap is None:
            kept[steps] = 0.0
        else:
            kept[steps].fill_(torch.inf).scatter_(0, overlap.unsqueeze(0), 0.0)
        cost = inputs.new_empty(self.states, tiles)
        by_entry, by_exit = cost.view(self.overlaps, self.fan, tiles), cost.view(self.fan, self.overlaps, tiles)
        for t in range(steps - 1, -1, -1):
            torch.mm(self.rows, inputs[t], out=cost)
            by_entry.add_(kept[t + 1].unsqueeze(1))
            torch.amin(by_exit, dim=0, out=kept[t])
        return kept

    def _trace_back(self, inputs: Tensor, kept: Tensor, low: Tensor, steps: int) -> Tensor:
        """The first `steps` states of the best path whose first state ends in the bits `low` ``(tiles,)``.

        Returns:
            ``(steps, tiles)`` int64.
        """
        path = low.new_empty(steps, len(low))
        heads = torch.arange(self.fan, device=inputs.device).unsqueeze(1) * self.overlaps
        by_exit = self.rows[:, :-1].T.reshape(-1, self.fan, self.overlaps)
        for t in range(steps):
            *scaled, total = by_exit.index_select(2, low)
            for coordinate, values in enumerate(scaled):
                total.addcmul_(values, inputs[t, coordinate])
            total += kept[t + 1].gather(0, heads + low >> self.width)
            path[t] = total.argmin(dim=0) * self.overlaps + low
            low = path[t] >> self.width
        return path
