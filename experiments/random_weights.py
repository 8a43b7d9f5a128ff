"""Models of a given shape with random weights, written shard by shard: for measuring what needs no meaning.

Weights are N(0, 0.02^2), vectors ones. Only a piece of a tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..planner.executor.shards import ShardWriter, TensorSlot
from ..profiles.model_config import implied_tensors, read_json

_PIECE_WEIGHTS = 1 << 24
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def write_random_model(config: Path, directory: Path, blocks: int, *, device: str, shard_bytes: int) -> int:
    """Write config.json and weights, no tokenizer; returns the bytes of the weights.

    Args:
        config: a config.json of a supported architecture.
        directory: made.
        blocks: decoder blocks, whatever the config says.
        device: where the numbers are drawn.
        shard_bytes: size of a weights file.
    """
    fields = read_json(config, "model config") | {"num_hidden_layers": blocks}
    slots = [TensorSlot(name, found.dtype, found.shape) for name, found in implied_tensors(fields, config).items()]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator(device).manual_seed(0)
    with ShardWriter(directory, slots, shard_bytes) as writer:
        for slot in slots:
            writer.write(slot.name, _pieces(slot, generator))
        writer.finish()
    return sum(slot.size_bytes for slot in slots)


def _pieces(slot: TensorSlot, generator: torch.Generator) -> Iterator[Tensor]:
    if len(slot.shape) == 1:
        yield torch.ones(slot.shape, dtype=_DTYPES[slot.dtype])
        return
    rows, at_once = slot.shape[0], max(1, _PIECE_WEIGHTS // math.prod(slot.shape[1:]))
    for first in range(0, rows, at_once):
        shape = (min(at_once, rows - first), *slot.shape[1:])
        draw = torch.randn(shape, generator=generator, device=generator.device)
        yield (draw * 0.02).to(_DTYPES[slot.dtype]).cpu()
