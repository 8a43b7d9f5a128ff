"""Which linear layers a model has, from its config and the headers of its safetensors files, or the config alone.

No weight is loaded: a 70-billion-parameter model takes milliseconds. The shapes found are compared with
those the config implies, so a damaged or mislabelled model is refused here and not after an hour of
measuring.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open

from .errors import ProfileError
from .model_config import (
    EMBEDDING,
    HEAD_WEIGHT,
    StoredTensor,
    architecture_of,
    implied_shapes,
    implied_tensors,
    is_derived,
    module_path,
    read_json,
    ties_embeddings,
    whole_number,
)
from .schema import EMBED, EMBED_ROLE, EMBEDDING_ROLES, HEAD, HEAD_ROLES, ROLES, TIED_ROLE

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
DTYPE_BYTES |= {"U64": 8, "I64": 8, "F64": 8}
"""Bytes of an element, by the names of safetensors."""
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerInfo:
    """One linear layer, or the embedding.

    Attributes:
        name: module path.
        block: of the decoder; the head's is the number of blocks, the embedding's 0.
        stored_as: the tensor with its weight ``(out_features, in_features)``: `name` + ".weight", or the embedding
            where the head is tied to it.
        file: that the tensor is in.
    """

    name: str
    block: int
    role: str
    out_features: int
    in_features: int
    fusion_group: str
    dtype: str
    has_bias: bool
    file: str
    stored_as: str

    @property
    def is_embedding(self) -> bool:
        """Whether its rows are looked up by token; there is no input then whose Hessian could be taken."""
        return self.role in EMBEDDING_ROLES

    @property
    def is_head(self) -> bool:
        """Whether the logits are its outputs; one weight may be embedding and head."""
        return self.role in HEAD_ROLES


@dataclass(frozen=True)
class ModelInventory:
    """A model's shape.

    Attributes:
        tied_embeddings: the head's weight is the embedding.
        layers: the embedding, where it is planned; then by block and in the order of `schema.ROLES`; the head, where it
            is a planned layer of its own, last.
        replaced_tensors: stored tensors that packed codes replace. A tied head that is planned without the embedding
            gets codes of its own; the embedding stays as it is.
        unplanned_bytes: bytes, as stored, of all other tensors: norms, biases, an embedding and a head that are not
            planned.
        total_parameters: elements of all stored tensors (a tied head counts once).
    """

    name: str
    architecture: str
    model_type: str
    blocks: int
    hidden_size: int
    tied_embeddings: bool
    layers: tuple[LayerInfo, ...]
    replaced_tensors: frozenset[str]
    unplanned_bytes: int
    total_parameters: int

    @property
    def planned_parameters(self) -> int:
        """Weights of all planned layers, the base of bits per weight."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)


def inventory(
    model_dir: str | Path, *, name: str | None = None, head: bool | None = None, embedding: bool = False
) -> ModelInventory:
    """The linear layers of the Hugging Face model in `model_dir`.

    Args:
        model_dir: directory with config.json and safetensors weights.
        name: how people call the model; the directory's name if not given.
        head: whether lm_head is one of the layers; None for only where its weight is its own, not the embedding.
        embedding: whether the embedding is one of the layers. Where the head is tied to it, the two are one layer,
            whatever `head` says.

    Raises:
        ProfileError: a file is missing or damaged, the model is of an unsupported architecture, already
            quantized, not in floating point, or its layers don't agree with its config.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ProfileError(f"expected a model directory at {directory}; there is none.")
    config = read_json(directory / "config.json", "model config")
    architecture_of(config, directory / "config.json")
    tensors = {key: tensor for key, tensor in _read_headers(directory).items() if not is_derived(key)}
    where, named = directory / "config.json", name or directory.resolve().name
    return _inventory(config, tensors, directory, where, named, head, embedding)


class OutsideBlocks(TypedDict):
    """Which layers outside the blocks an inventory has."""

    head: bool
    embedding: bool


def outside_blocks(names: Iterable[str]) -> OutsideBlocks:
    """What `inventory` takes to find the layers of these names again, as a plan or profile lists them."""
    found = set(names)
    return {"head": HEAD in found, "embedding": EMBED in found}


def inventory_of_config(
    path: str | Path, *, name: str | None = None, head: bool | None = None, embedding: bool = False
) -> ModelInventory:
    """The linear layers of the model that a config.json describes; there need be no weights.

    Args:
        path: the file.
        name, head, embedding: as for `inventory`; the default name is that of the file, or of its directory for a
            config.json.

    Raises:
        ProfileError: no such file, or as for `inventory`.
    """
    where = Path(path)
    config = read_json(where, "model config")
    named = name or (where.resolve().parent.name if where.name == "config.json" else where.stem)
    return _inventory(config, implied_tensors(config, where), where.parent, where, named, head, embedding)


def _inventory(
    config: dict[str, Any],
    tensors: dict[str, StoredTensor],
    directory: Path,
    where: Path,
    name: str,
    head: bool | None,
    embedding: bool,
) -> ModelInventory:
    architecture = architecture_of(config, where)
    blocks = whole_number(config, "num_hidden_layers", where)
    _check_tensors(tensors, implied_shapes(config, where), blocks, directory)
    layers = [_layer(tensors, module_path(block, role), block, role) for block in range(blocks) for role in ROLES]
    tied = ties_embeddings(config)
    if embedding:
        layers.insert(0, _layer(tensors, EMBED, 0, TIED_ROLE if tied else EMBED_ROLE))
    if not (tied and embedding) and (head or (head is None and not tied)):
        layers.append(_layer(tensors, HEAD, blocks, HEAD, EMBEDDING if tied else HEAD_WEIGHT))
    replaced = {f"{layer.name}.weight" for layer in layers}
    if tied and embedding:
        replaced.add(HEAD_WEIGHT)  # some files hold the tied weight twice
    return ModelInventory(
        name=name,
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        blocks=blocks,
        hidden_size=int(config["hidden_size"]),
        tied_embeddings=tied,
        layers=tuple(layers),
        replaced_tensors=frozenset(replaced),
        unplanned_bytes=sum(
            math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            for key, tensor in tensors.items()
            if key not in replaced
        ),
        total_parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
    )


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that `inventory` reads, of a model that it has accepted."""
    if (model_dir / WEIGHTS_FILE).exists():
        return [model_dir / WEIGHTS_FILE]
    index = json.loads((model_dir / INDEX_FILE).read_text(encoding="utf-8"))
    return [model_dir / name for name in sorted(set(index["weight_map"].values()))]


def _check_tensors(
    tensors: dict[str, StoredTensor], implied: dict[str, tuple[int, ...]], blocks: int, directory: Path
) -> None:
    """Compare what is stored with what the config implies; a tied head may be stored all the same.

    Raises:
        ProfileError: a tensor is missing, unknown, of another shape, or not in floating point.
    """
    for name, shape in implied.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ProfileError(f"{directory} has no weight '{name}'; the model is incomplete, download it again.")
        if tensor.dtype not in _FLOATS:
            raise ProfileError(
                f"'{name}' in {tensor.file} is stored as {tensor.dtype}; expected an unquantized model in "
                f"{', '.join(_FLOATS.values())}."
            )
        if tensor.shape != shape:
            raise ProfileError(
                f"'{name}' in {tensor.file} has shape {tensor.shape}; config.json implies {shape}; "
                "the two belong to different models."
            )
    last = max((int(match[1]) for match in map(_BLOCK.match, tensors) if match), default=-1)
    if last >= blocks:
        raise ProfileError(
            f"{directory} holds weights of block {last}, its config.json counts {blocks} blocks from 0; "
            "the config belongs to another model."
        )
    unknown = sorted(tensors.keys() - implied.keys() - {HEAD_WEIGHT})
    if unknown:
        raise ProfileError(
            f"{directory} holds '{unknown[0]}' in {tensors[unknown[0]].file}, which its config.json does not imply; "
            "the two belong to different models."
        )


def _layer(
    tensors: dict[str, StoredTensor], name: str, block: int, role: str, stored_as: str | None = None
) -> LayerInfo:
    weight = stored_as or f"{name}.weight"
    tensor = tensors[weight]
    rows, width = tensor.shape
    return LayerInfo(
        name=name,
        block=block,
        role=role,
        out_features=rows,
        in_features=width,
        fusion_group=f"{name.removesuffix(role)}{_FUSED[role]}" if role in _FUSED else name,
        dtype=_FLOATS[tensor.dtype],
        has_bias=f"{name}.bias" in tensors,
        file=tensor.file,
        stored_as=weight,
    )


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model, from one file or from the shards of an index."""
    if (directory / WEIGHTS_FILE).exists():  # transformers prefers it to an index as well
        return _read_header(directory / WEIGHTS_FILE)
    if not (directory / INDEX_FILE).exists():
        raise ProfileError(_no_weights(directory))
    index = read_json(directory / INDEX_FILE, "index of the weights")
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise ProfileError(f"{directory / INDEX_FILE}: expected a 'weight_map' from tensors to files.")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(listed.values())):
        if Path(file).name != file:
            raise ProfileError(f"{directory / INDEX_FILE}: '{file}' should be the name of a file beside it.")
        if not (directory / file).is_file():
            raise ProfileError(f"{directory} lacks the shard {file} that its index lists; download it again.")
        for key, tensor in _read_header(directory / file).items():
            if key in tensors:
                raise ProfileError(f"'{key}' is in {tensors[key].file} and again in {file}; keep one of them.")
            tensors[key] = tensor
    for key in sorted(listed.keys() | tensors.keys()):
        found = tensors[key].file if key in tensors else "nowhere"
        if listed.get(key) != found:
            raise ProfileError(
                f"{INDEX_FILE} of {directory} puts '{key}' in {listed.get(key, 'no file')}, the shards have it "
                f"in {found}; index and shards don't belong together."
            )
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            tensors = {
                key: StoredTensor(tuple(view.get_shape()), str(view.get_dtype()), path.name)
                for key, view in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as cause:
        raise ProfileError(
            f"{path} is not a whole safetensors file ({cause}); it may be cut short, download it again."
        ) from cause
    unknown = next((key for key, tensor in tensors.items() if tensor.dtype not in DTYPE_BYTES), None)
    if unknown is not None:
        raise ProfileError(
            f"'{unknown}' in {path.name} is stored as {tensors[unknown].dtype}; expected an unquantized model in "
            f"{', '.join(_FLOATS.values())}."
        )
    return tensors


def _no_weights(directory: Path) -> str:
    def names(patterns: Iterable[str]) -> list[str]:
        return sorted(path.name for pattern in patterns for path in directory.glob(pattern))

    if found := names(["*.safetensors"]):
        return (
            f"{directory} holds {', '.join(found[:3])} but neither {WEIGHTS_FILE} nor {INDEX_FILE}; rename a "
            "single file, or restore the index of the shards."
        )
    if found := names(["*.bin", "*.pt", "*.pth"]):
        return (
            f"{directory} has its weights only as pickles ({found[0]}), which msq doesn't open; convert them to "
            "safetensors (transformers: model.save_pretrained)."
        )
    return f"{directory} has no weights; expected {WEIGHTS_FILE}, or shards with {INDEX_FILE}."
