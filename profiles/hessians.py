"""Hessians of every layer's input: ``H = E[x x^T]`` over calibration tokens, collected block by block.

One matrix for every fusion group, since its layers share the input; none for an embedding, which has no input to weigh
its columns by. Inputs are those of the unchanged model, turned by
the group's rotation; sums are float32. The matrices of a block go to a file of their own as soon as it has run, so an
interrupted job only repeats the forward pass of finished blocks, which is a small part of the work, and a finished job
none of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..kernels.errors import QuantizerError
from ..kernels.hessian import Hessian
from ..kernels.rotation import input_seed, rotate
from .calibration import Calibration
from .errors import ProfileError
from .files import claim_directory, write_atomic
from .inventory import LayerInfo, ModelInventory
from .progress import progress
from .streaming import StreamedModel


class HessianFiles:
    """Hessians on disk, one file for each block.

    Attributes:
        directory: where they are.
        seed: of the rotations of the whole model.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self._last: tuple[str, Hessian] | None = None

    def path(self, block: int) -> Path:
        """The file of a block; its tensors are named by fusion group, ``(in_features, in_features)`` float32."""
        return self.directory / f"hessians-{block:05d}.safetensors"

    def load(self, layer: LayerInfo, device: torch.device) -> Hessian:
        """The Hessian of a layer's input; layers of a group that come one after the other share it.

        Raises:
            ProfileError: the file is missing or damaged, or no input was ever other than zero.
        """
        if self._last is None or self._last[0] != layer.fusion_group:
            try:
                with safe_open(self.path(layer.block), framework="pt") as file:
                    matrix = file.get_tensor(layer.fusion_group)
                found = Hessian(matrix.to(device), input_seed(layer.fusion_group, self.seed))
            except (SafetensorError, OSError) as cause:
                raise ProfileError(
                    f"can't read the Hessian of {layer.name} ({cause}); remove {self.directory} and start again."
                ) from cause
            except QuantizerError as cause:
                raise ProfileError(f"{layer.name}: {cause}") from cause
            self._last = (layer.fusion_group, found)
        return self._last[1]


def collect_hessians(
    model_dir: Path,
    info: ModelInventory,
    tokens: Calibration,
    directory: Path,
    *,
    digest: str,
    seed: int,
    device: torch.device,
) -> HessianFiles:
    """Run the calibration tokens and keep every group's Hessian; blocks whose file is there are not collected again.

    Args:
        directory: for the files; made if missing. What an interrupted job left there is used.
        digest: of the model's weights.
        seed: of the rotations.

    Raises:
        ProfileError: a bad model, a directory that can't be written or that another job's files are in.
    """
    files = HessianFiles(directory, seed)
    claim_directory(directory, {"model": digest, "tokens": tokens.digest, "seed": seed}, "Hessians")
    blocks = sorted({layer.block for layer in info.layers if not layer.is_embedding})
    missing = [block for block in blocks if not files.path(block).exists()]
    if missing:
        with progress("hessians", missing[-1] + 1) as advance:
            model = StreamedModel(model_dir, tokens.windows, device)
            while model.block <= missing[-1]:
                _collect_block(model, info, files, device)
                advance()
    return files


def _collect_block(model: StreamedModel, info: ModelInventory, files: HessianFiles, device: torch.device) -> None:
    """Run one block; write its Hessians unless they are there."""
    block = model.block
    if files.path(block).exists():
        model.advance({})
        return
    first: dict[str, LayerInfo] = {}
    for layer in info.layers:
        if layer.block == block and not layer.is_embedding:
            first.setdefault(layer.fusion_group, layer)
    moments = {
        group: _Moment(layer.in_features, input_seed(group, files.seed), device) for group, layer in first.items()
    }
    model.advance({layer.name: moments[group].add for group, layer in first.items()})
    content = save({group: moment.mean().cpu() for group, moment in moments.items()})
    write_atomic(files.path(block), content)


class _Moment:
    """A running sum of ``x x^T`` over rotated inputs."""

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, device=device)
        self.seed = seed
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """``(..., size)``, any leading shape."""
        rows = rotate(inputs.flatten(0, -2), self.seed)
        self.total.addmm_(rows.T, rows)
        self.count += len(rows)

    def mean(self) -> Tensor:
        return self.total / self.count
