"""Which linear layers a model has, from its config and the headers of its safetensors files.

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
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import ProfileError
from .files import read_bytes
from .schema import ARCHITECTURES, ROLES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PARENT = {role: "self_attn" if role in ROLES[:4] else "mlp" for role in ROLES}
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4}
DTYPE_BYTES |= {"U64": 8, "I64": 8, "F64": 8}
"""Bytes of an element, by the names of safetensors."""
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerInfo:
    """One linear layer; its weight is `name` + ".weight", shape (out_features, in_features), in `file`."""

    name: str
    block: int
    role: str
    out_features: int
    in_features: int
    fusion_group: str
    dtype: str
    has_bias: bool
    file: str


@dataclass(frozen=True)
class ModelInventory:
    """A model's shape.

    Attributes:
        layers: by block, then in the order of `schema.ROLES`.
        unplanned_bytes: bytes, as stored, of all that a plan doesn't touch: embeddings, head, norms, biases.
        total_parameters: elements of all stored tensors (a tied head counts once).
    """

    name: str
    architecture: str
    model_type: str
    blocks: int
    hidden_size: int
    tied_embeddings: bool
    layers: tuple[LayerInfo, ...]
    unplanned_bytes: int
    total_parameters: int

    @property
    def planned_parameters(self) -> int:
        """Weights of all planned layers, the base of bits per weight."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str
    file: str


def inventory(model_dir: str | Path, *, name: str | None = None) -> ModelInventory:
    """The linear layers of the Hugging Face model in `model_dir`.

    Args:
        model_dir: directory with config.json and safetensors weights.
        name: how people call the model; the directory's name if not given.

    Raises:
        ProfileError: a file is missing or damaged, the model is of an unsupported architecture, already
            quantized, not in floating point, or its layers don't agree with its config.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ProfileError(f"expected a model directory at {directory}; there is none.")
    config = _read_json(directory / "config.json", "model config")
    architecture = _architecture(config, directory)
    shapes = _expected_shapes(config, architecture, directory / "config.json")
    blocks = int(config["num_hidden_layers"])
    tensors = _read_headers(directory)
    layers = tuple(_layer(tensors, block, role, shapes[role], directory) for block in range(blocks) for role in ROLES)
    numbers = (int(match[1]) for match in map(_BLOCK.match, tensors) if match)
    last = max(numbers, default=-1)
    if last >= blocks:
        raise ProfileError(
            f"{directory} holds weights of block {last}, its config.json counts {blocks} blocks from 0; "
            "the config belongs to another model."
        )
    planned = {f"{layer.name}.weight" for layer in layers}
    return ModelInventory(
        name=name or directory.resolve().name,
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        blocks=blocks,
        hidden_size=int(config["hidden_size"]),
        tied_embeddings="lm_head.weight" not in tensors,
        layers=layers,
        unplanned_bytes=sum(
            math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for key, tensor in tensors.items() if key not in planned
        ),
        total_parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
    )


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that `inventory` reads, of a model that it has accepted."""
    if (model_dir / WEIGHTS_FILE).exists():
        return [model_dir / WEIGHTS_FILE]
    index = json.loads((model_dir / INDEX_FILE).read_text(encoding="utf-8"))
    return [model_dir / name for name in sorted(set(index["weight_map"].values()))]


def _layer(tensors: dict[str, _Tensor], block: int, role: str, shape: tuple[int, int], directory: Path) -> LayerInfo:
    parent = f"model.layers.{block}.{_PARENT[role]}"
    name = f"{parent}.{role}"
    tensor = tensors.get(f"{name}.weight")
    if tensor is None:
        raise ProfileError(f"{directory} has no weight '{name}.weight'; the model is incomplete, download it again.")
    if tensor.dtype not in _FLOATS:
        raise ProfileError(
            f"'{name}.weight' in {tensor.file} is stored as {tensor.dtype}; expected an unquantized model in "
            f"{', '.join(_FLOATS.values())}."
        )
    if tensor.shape != shape:
        raise ProfileError(
            f"'{name}.weight' in {tensor.file} has shape {tensor.shape}; config.json implies {shape}; "
            "the two belong to different models."
        )
    return LayerInfo(
        name=name,
        block=block,
        role=role,
        out_features=shape[0],
        in_features=shape[1],
        fusion_group=f"{parent}.{_FUSED.get(role, role)}",
        dtype=_FLOATS[tensor.dtype],
        has_bias=f"{name}.bias" in tensors,
        file=tensor.file,
    )


def _architecture(config: dict[str, Any], directory: Path) -> str:
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ProfileError(
            f"{directory} is already quantized (quantization_config, method '{method}'); give the original "
            "model in floating point."
        )
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if architecture not in ARCHITECTURES:
        raise ProfileError(
            f"{directory / 'config.json'} names the architecture {named!r}; supported are {', '.join(ARCHITECTURES)}."
        )
    return str(architecture)


def _expected_shapes(config: dict[str, Any], architecture: str, where: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every role, by the rules of transformers' config classes."""

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ProfileError(f"{where}: {key} should be a whole number of at least 1; got {value!r}.")
        return value

    hidden, inner, heads = number("hidden_size"), number("intermediate_size"), number("num_attention_heads")
    number("num_hidden_layers")
    head = number("head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden // heads)
    queries = heads * head
    keys = number("num_key_value_heads", heads) * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _read_headers(directory: Path) -> dict[str, _Tensor]:
    """Every tensor of the model, from one file or from the shards of an index."""
    if (directory / WEIGHTS_FILE).exists():  # transformers prefers it to an index as well
        return _read_header(directory / WEIGHTS_FILE)
    if not (directory / INDEX_FILE).exists():
        raise ProfileError(_no_weights(directory))
    index = _read_json(directory / INDEX_FILE, "index of the weights")
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise ProfileError(f"{directory / INDEX_FILE}: expected a 'weight_map' from tensors to files.")
    tensors: dict[str, _Tensor] = {}
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


def _read_header(path: Path) -> dict[str, _Tensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            tensors = {
                key: _Tensor(tuple(view.get_shape()), str(view.get_dtype()), path.name) for key, view in slices.items()
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


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object; a key given twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key '{next(k for k in keys if keys.count(k) > 1)}' is given twice")
        return value

    try:
        value = json.loads(read_bytes(path, kind), object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, ProfileError):
            raise
        raise ProfileError(f"the {kind} {path} is not valid JSON: {cause}; download it again.") from cause
    if not isinstance(value, dict):
        raise ProfileError(f"the {kind} {path} should hold a JSON object.")
    return value
