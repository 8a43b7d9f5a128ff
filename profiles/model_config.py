"""What a model's config.json says of its tensors, by the rules of transformers' classes; no weight is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ProfileError
from .files import read_bytes
from .schema import ARCHITECTURES, EMBED, HEAD, ROLES

EMBEDDING = f"{EMBED}.weight"
HEAD_WEIGHT = f"{HEAD}.weight"
_STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_NO_FILE = "config.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header tells it.

    Attributes:
        dtype: in the words of safetensors, such as F16.
        file: its file's name.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str


def module_path(block: int, role: str) -> str:
    """Where a layer of a block is."""
    return f"model.layers.{block}.{'self_attn' if role in ROLES[:4] else 'mlp'}.{role}"


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Whether the head's weight is the embedding; by default it is not."""
    return bool(config.get("tie_word_embeddings", False))


def architecture_of(config: dict[str, Any], where: Path) -> str:
    """The supported architecture that a config names.

    Raises:
        ProfileError: another one, or the model is quantized already.
    """
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ProfileError(
            f"{where} is of a model already quantized (quantization_config, method '{method}'); give the original "
            "model in floating point."
        )
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if architecture not in ARCHITECTURES:
        raise ProfileError(f"{where} names the architecture {named!r}; supported are {', '.join(ARCHITECTURES)}.")
    return str(architecture)


def layer_shapes(config: dict[str, Any], architecture: str, where: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every role, the head's too, by the rules of transformers' config classes.

    Raises:
        ProfileError: a size is missing or no whole number.
    """

    def number(key: str, default: int | None = None) -> int:
        return whole_number(config, key, where, default)

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
        HEAD: (number("vocab_size"), hidden),
    }


def whole_number(config: dict[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """A size of a config.

    Raises:
        ProfileError: missing without a default, or not a whole number of at least 1.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProfileError(f"{where}: {key} should be a whole number of at least 1; got {value!r}.")
    return value


def implied_shapes(config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a model of this config stores, by name, block by block; what is outside comes last.

    Raises:
        ProfileError: an unsupported architecture, or a missing size.
    """
    architecture = architecture_of(config, where)
    shapes = layer_shapes(config, architecture, where)
    vocabulary, hidden = shapes[HEAD]
    biased = _biased_roles(config, architecture)
    found: dict[str, tuple[int, ...]] = {}
    for block in range(whole_number(config, "num_hidden_layers", where)):
        for role in ROLES:
            found[f"{module_path(block, role)}.weight"] = shapes[role]
            if role in biased:
                found[f"{module_path(block, role)}.bias"] = shapes[role][:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{block}.{norm}.weight"] = (hidden,)
        if architecture == "Qwen3ForCausalLM":
            head_size = shapes["q_proj"][0] // whole_number(config, "num_attention_heads", where)
            for norm in ("q_norm", "k_norm"):
                found[f"model.layers.{block}.self_attn.{norm}.weight"] = (head_size,)
    found |= {EMBEDDING: (vocabulary, hidden), "model.norm.weight": (hidden,)}
    return found if ties_embeddings(config) else found | {HEAD_WEIGHT: (vocabulary, hidden)}


def check_context(config: dict[str, Any], context: int, where: Path) -> None:
    """Whether a decoding step can be timed after so many tokens.

    Raises:
        ProfileError: the model doesn't read so many.
    """
    longest = whole_number(config, "max_position_embeddings", where, default=context + 1)  # not said: any will do
    if context >= longest:
        raise ProfileError(
            f"expected a context below the {longest} tokens that the model reads ({where}); got {context}."
        )


def implied_tensors(config: dict[str, Any], where: Path) -> dict[str, StoredTensor]:
    """Every tensor that a model of this config stores, by name.

    Raises:
        ProfileError: as for `implied_shapes`, or weights that are not in floating point.
    """
    shapes = implied_shapes(config, where)
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    if named not in _STORED:
        raise ProfileError(f"{where}: dtype should be one of {', '.join(_STORED)}; got {named!r}.")
    return {name: StoredTensor(shape, _STORED[named], _NO_FILE) for name, shape in shapes.items()}


def is_derived(name: str) -> bool:
    """Whether a stored tensor follows from the config, as old checkpoints hold them; nothing reads it."""
    return name.endswith(".rotary_emb.inv_freq")


def _biased_roles(config: dict[str, Any], architecture: str) -> tuple[str, ...]:
    attention, mlp = ROLES[:4], ROLES[4:]
    if architecture == "Qwen2ForCausalLM":
        return ROLES[:3]
    if architecture == "MistralForCausalLM":
        return ()
    roles = attention if config.get("attention_bias") else ()
    return (*roles, *mlp) if architecture == "LlamaForCausalLM" and config.get("mlp_bias") else roles


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """A JSON object; a key given twice is refused.

    Raises:
        ProfileError: no such file, not JSON, or no object.
    """

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
