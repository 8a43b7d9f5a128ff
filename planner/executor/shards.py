"""The weights of a checkpoint, written piece by piece: no tensor has to be in memory, let alone a whole file.

Every tensor's dtype and shape are known beforehand, so the headers are written first and each tensor goes to its own
place in its file, in whatever order they come. The bytes are those of the safetensors format: eight bytes with the
length of a JSON header, the header, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...profiles.errors import CorruptModelError
from ...profiles.inventory import DTYPE_BYTES, INDEX_FILE, WEIGHTS_FILE
from .errors import CheckpointError

SHARD_BYTES = 4 << 30
"""A weights file is closed when it holds this much."""
_PIECE_BYTES = 1 << 25
"""Bytes that `stored_pieces` reads at a time."""


@dataclass(frozen=True)
class TensorSlot:
    """A tensor as a file holds it; `dtype` as safetensors writes it ("F16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class ShardWriter:
    """``model.safetensors``, or numbered shards with an index where the tensors exceed `shard_bytes`.

    Args:
        directory: for the files, empty.
        tensors: all that will be written, in order; a shard holds neighbours.
    """

    def __init__(self, directory: Path, tensors: Sequence[TensorSlot], shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._tensors = {tensor.name: tensor for tensor in tensors}
        shards = list(_shards(tensors, shard_bytes))
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        names = names if len(names) > 1 else [WEIGHTS_FILE]
        self._index = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        self._files: dict[str, IO[bytes]] = {}
        self._places: dict[str, int] = {}
        for file, shard in zip(names, shards, strict=True):
            self._files[file] = (directory / file).open("wb")
            header, offsets = _header(shard)
            self._files[file].write(header)
            self._places |= {name: len(header) + offset for name, offset in offsets.items()}

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write one tensor.

        Args:
            pieces: its data in order, cut along the first dimension, on the CPU.

        Raises:
            CheckpointError: the pieces don't add up to the tensor.
        """
        tensor = self._tensors[name]
        file, place = self._files[self._index[name]], self._places.pop(name)
        file.seek(place)
        written = 0
        for piece in pieces:
            written += file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if written != tensor.size_bytes:
            raise CheckpointError(
                f"expected '{name}' as {tensor.dtype} of shape {tensor.shape}, {tensor.size_bytes} bytes; "
                f"got {written} bytes: profile and plan again with this version of msq."
            )

    def finish(self) -> None:
        """Flush everything to disk; write the index where there are several files.

        Raises:
            CheckpointError: a tensor was not written.
        """
        if self._places:
            raise CheckpointError(f"expected all tensors to be written; '{next(iter(self._places))}' was not.")
        if len(self._files) > 1:
            total = sum(tensor.size_bytes for tensor in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _shards(tensors: Sequence[TensorSlot], shard_bytes: int) -> Iterator[list[TensorSlot]]:
    """Neighbours that fit a file, or single tensors that don't."""
    shard: list[TensorSlot] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.size_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.size_bytes
    yield shard


def _header(shard: Sequence[TensorSlot]) -> tuple[bytes, dict[str, int]]:
    """The header of a file and where each tensor's data begins after it; large elements first, so all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    place = 0
    for tensor in sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]):
        offsets[tensor.name] = place
        end = place + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def stored_tensors(path: Path) -> list[TensorSlot]:
    """What a safetensors file holds.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return [TensorSlot(name, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()]
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{path} is not a whole safetensors file ({cause}); download it again.") from cause


def stored_pieces(path: Path, tensor: TensorSlot) -> Iterator[Tensor]:
    """A stored tensor in pieces of `_PIECE_BYTES` at most (or a row), cut along its first dimension.

    Raises:
        CorruptModelError: it holds NaN or infinite numbers.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    at_once = max(1, _PIECE_BYTES * rows // max(1, tensor.size_bytes))
    for first in range(0, rows, at_once):
        with safe_open(path, framework="pt") as file:  # opened anew: what was read before is not kept mapped
            piece: Tensor = (
                file.get_slice(tensor.name)[first : first + at_once] if tensor.shape else file.get_tensor(tensor.name)
            )
        if piece.is_floating_point() and not torch.isfinite(piece).all():
            raise CorruptModelError(
                f"'{tensor.name}' in {path} holds NaN or infinite numbers; the model is corrupt, download it again."
            )
        yield piece
