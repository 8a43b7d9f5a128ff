"""The second moment of a layer's input, and the block LDL factors that error feedback needs.

For an input x the proxy loss of QuIP (arXiv 2307.13304, equation 1) is ``tr((W - Q) H (W - Q)^T)``, ``H = E[x x^T]``.
It does not depend on the basis: with ``x R`` for x it is that of ``W R`` and ``R^T H R``. msq keeps H in the rotated
basis of the layer, where most families encode.

H is used scaled to a mean diagonal of 1. Divided by ``|W|^2`` the proxy loss is then a normalised error in the units of
the sensitivities: for errors that know nothing of H it equals ``|W - Q|^2 / |W|^2`` on average.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import QuantizerError
from .rotation import unrotate
from .specs import TILE

DAMPING = 0.01
"""What is added to the diagonal before factoring, relative to its mean; the value of QuIP# (arXiv 2402.04396)."""


class Hessian:
    """H of one input, for all layers that read it.

    Attributes:
        matrix: ``(size, size)`` float32, mean diagonal 1, in the basis of ``rotate(x, rotation_seed)``.
        rotation_seed: of that basis; None for the model's own.
    """

    def __init__(self, matrix: Tensor, rotation_seed: int | None, *, damping: float = DAMPING) -> None:
        """Takes a second moment of any scale.

        Args:
            matrix: ``(size, size)``, symmetric, any float dtype.
            damping: at least 0, relative to the mean diagonal.

        Raises:
            QuantizerError: not a square matrix of finite numbers with a positive trace, or a negative damping.
        """
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            raise QuantizerError(
                f"expected a floating-point Hessian (in_features, in_features); got {tuple(matrix.shape)} "
                f"{matrix.dtype}."
            )
        mean = matrix.diagonal().double().mean()
        if not torch.isfinite(matrix).all() or not float(mean) > 0:
            raise QuantizerError(
                f"expected a finite Hessian with a positive trace; its mean diagonal is {float(mean):g}: the layer's "
                "inputs are all zero or not finite."
            )
        if damping < 0:
            raise QuantizerError(f"expected a damping of at least 0; got {damping:g}.")
        self.matrix = (matrix.double() / mean).float()
        self.rotation_seed = rotation_seed
        self.damping = damping
        self._factor: tuple[tuple[int, bool], Tensor] | None = None

    @property
    def size(self) -> int:
        """In-features of the layers it is for."""
        return len(self.matrix)

    def unrotated(self) -> Hessian:
        """The same in the model's own basis."""
        if self.rotation_seed is None:
            return self
        half = unrotate(self.matrix, self.rotation_seed)
        return Hessian(unrotate(half.T, self.rotation_seed), None, damping=self.damping)

    def factor(self, block: int, *, ascending: bool = False) -> Tensor:
        """L of the damped ``H = L D L^T``, unit lower triangular in blocks (QuIP#, section 4.1).

        Args:
            block: columns of a block, a divisor of 16.
            ascending: unit upper triangular instead: errors are fed back to later columns.

        Returns:
            ``(padded, padded)`` float32; `size` padded to whole tiles, with columns that nothing depends on.

        Raises:
            QuantizerError: the damped matrix is not positive definite.
        """
        key = (block, ascending)
        if self._factor is None or self._factor[0] != key:  # families come one after the other: one is enough
            self._factor = (key, self._factored(block, ascending))
        return self._factor[1]

    def _factored(self, block: int, ascending: bool) -> Tensor:
        damped = self.matrix.double()
        damped.diagonal().add_(self.damping)
        padding = -self.size % TILE
        damped = F.pad(damped / (1 + self.damping), (0, padding, 0, padding))
        damped.diagonal()[self.size :] = 1.0
        if ascending:
            damped = _blocks_reversed(damped, block)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise QuantizerError(
                f"a Hessian of {self.size} inputs is not positive definite with a damping of {self.damping:g}; use "
                "more calibration tokens or more damping."
            )
        columns = lower.unflatten(1, (-1, block)).transpose(0, 1)  # (blocks, padded, block)
        corners = torch.stack([columns[i, i * block : (i + 1) * block] for i in range(len(columns))])
        unit = torch.linalg.solve_triangular(corners, columns, upper=False, left=False)
        factor: Tensor = unit.transpose(0, 1).flatten(1).float()
        return _blocks_reversed(factor, block) if ascending else factor

    def feedback_power(self, block: int, *, ascending: bool = False) -> float:
        """What feedback adds to the mean square of a row's targets, per mean square of its errors; 0 for an identity.

        Args:
            block, ascending: as of `factor`.
        """
        factor = self.factor(block, ascending=ascending)
        return (float(factor.double().square().sum()) - len(factor)) / self.size

    def weigh(self, errors: Tensor) -> float:
        """``tr(E H E^T)`` of errors in the same basis, ``(rows, size)``, undamped; float64 sums."""
        return float(((errors.float() @ self.matrix.to(errors.device)) * errors).sum(dtype=torch.float64))


def _blocks_reversed(matrix: Tensor, block: int) -> Tensor:
    """A square matrix with its blocks in the opposite order, rows and columns; inside, blocks stay as they are."""
    order = torch.arange(len(matrix), device=matrix.device).view(-1, block).flip(0).flatten()
    return matrix[order][:, order]
