from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msq.profiles.errors import ProfileError
from msq.profiles.inventory import INDEX_FILE, WEIGHTS_FILE, inventory
from msq.profiles.model_source import EMBEDDED, embedded_models, resolve_model
from safetensors.numpy import load_file, save_file

TINY = EMBEDDED / "ref-tiny-3m"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A writable copy of the embedded model."""
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def edit_weights(model: Path, **changes: Any) -> None:
    tensors = load_file(model / WEIGHTS_FILE)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, model / WEIGHTS_FILE)


def shard(model: Path) -> None:
    """Splits the weights in two files with an index."""
    tensors = load_file(model / WEIGHTS_FILE)
    (model / WEIGHTS_FILE).unlink()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, model / file)
    (model / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def edit_index(model: Path, **changes: str) -> None:
    index = json.loads((model / INDEX_FILE).read_text())
    index["weight_map"] |= changes
    (model / INDEX_FILE).write_text(json.dumps(index))


def test_embedded_model() -> None:
    found = inventory(TINY)
    assert (found.name, found.architecture, found.blocks, found.hidden_size) == (
        "ref-tiny-3m",
        "LlamaForCausalLM",
        4,
        256,
    )
    assert found.total_parameters == 2885888  # metrics.json
    assert found.planned_parameters == 4 * (256 * 256 * 2 + 128 * 256 * 2 + 512 * 256 * 3)
    assert found.unplanned_bytes == 2 * (found.total_parameters - found.planned_parameters)
    assert found.tied_embeddings
    assert [layer.role for layer in found.layers[:7]] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    groups = [layer.fusion_group.removeprefix("model.layers.1.") for layer in found.layers[7:14]]
    assert groups == ["self_attn.qkv"] * 3 + ["self_attn.o_proj"] + ["mlp.gate_up"] * 2 + ["mlp.down_proj"]
    down = found.layers[6]
    assert (down.name, down.out_features, down.in_features) == ("model.layers.0.mlp.down_proj", 256, 512)
    assert (down.dtype, down.has_bias, down.file) == ("float16", False, WEIGHTS_FILE)


def test_shards_give_the_same_layers(model: Path) -> None:
    whole = inventory(model)
    shard(model)
    parts = inventory(model)
    assert {layer.file for layer in parts.layers} == {"part-0.safetensors", "part-1.safetensors"}
    assert [(x.name, x.out_features) for x in parts.layers] == [(x.name, x.out_features) for x in whole.layers]
    assert parts.unplanned_bytes == whole.unplanned_bytes


def test_biases_count_as_unplanned(model: Path) -> None:
    before = inventory(model).unplanned_bytes
    rows = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}
    names = [f"model.layers.{block}.self_attn.{role}.bias" for block in range(4) for role in rows]
    edit_weights(model, **{name: np.zeros(rows[name.split(".")[-2]], np.float32) for name in names})
    edit_config(model, attention_bias=True)
    found = inventory(model)
    assert [f"{layer.name}.bias" for layer in found.layers if layer.has_bias] == names
    assert found.unplanned_bytes == before + 4 * 4 * sum(rows.values())


@pytest.mark.parametrize(("name", "values", "message"), [
    ("model.norm.weight", None, "has no weight 'model.norm.weight'; the model is incomplete"),
    ("model.embed_tokens.weight", None, "has no weight 'model.embed_tokens.weight'; the model is incomplete"),
    ("model.norm.weight", np.zeros(255, np.float16), r"has shape \(255,\); config.json implies \(256,\)"),
    ("model.layers.0.self_attn.q_proj.bias", np.zeros(256, np.float16), "which its config.json does not imply"),
    ("model.extra", np.zeros(2, np.float16), "holds 'model.extra' in model.safetensors, which its config.json does"),
])  # fmt: skip
def test_tensors_that_the_config_does_not_imply(model: Path, name: str, values: Any, message: str) -> None:
    edit_weights(model, **{name: values})
    with pytest.raises(ProfileError, match=message):
        inventory(model)


def test_missing_head_of_an_untied_model(model: Path) -> None:
    edit_config(model, tie_word_embeddings=False)
    with pytest.raises(ProfileError, match=r"has no weight 'lm_head\.weight'"):
        inventory(model)


def test_tensors_that_follow_from_the_config_are_left_out(model: Path) -> None:
    before = inventory(model)
    edit_weights(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)})
    assert inventory(model) == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2"),
    ({"architectures": None}, "names the architecture None; supported are"),
    ({"quantization_config": {"quant_method": "awq"}}, "already quantized .*method 'awq'"),
    ({"intermediate_size": 1024}, r"gate_proj.weight' .* has shape \(512, 256\); config.json implies \(1024, 256\)"),
    ({"num_key_value_heads": None}, r"k_proj.weight' .* has shape \(128, 256\); config.json implies \(256, 256\)"),
    ({"num_hidden_layers": 5}, "has no weight 'model.layers.4.self_attn.q_proj.weight'"),
    ({"num_hidden_layers": 3}, "holds weights of block 3, its config.json counts 3 blocks"),
    ({"hidden_size": "256"}, "hidden_size should be a whole number of at least 1; got '256'"),
])  # fmt: skip
def test_wrong_config(model: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(model, **changes)
    with pytest.raises(ProfileError, match=message):
        inventory(model)


@pytest.mark.parametrize(("content", "message"), [
    ("{", "config .* is not valid JSON"),
    ("[]", "should hold a JSON object"),
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
])  # fmt: skip
def test_corrupt_config(model: Path, content: str, message: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ProfileError, match=message):
        inventory(model)


def test_missing_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ProfileError, match=r"can't read the model config .* no such file"):
        inventory(model)


def test_missing_layer(model: Path) -> None:
    edit_weights(model, **{Q_PROJ: None})
    with pytest.raises(ProfileError, match=f"has no weight '{Q_PROJ}'"):
        inventory(model)


def test_integer_weights(model: Path) -> None:
    edit_weights(model, **{Q_PROJ: np.zeros((256, 256), np.int8)})
    with pytest.raises(ProfileError, match="stored as I8; expected an unquantized model"):
        inventory(model)


@pytest.mark.parametrize("keep", [0, 6, 1000, 5_000_000])
def test_truncated_weights(model: Path, keep: int) -> None:
    path = model / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ProfileError, match="not a whole safetensors file"):
        inventory(model)


def test_missing_shard(model: Path) -> None:
    shard(model)
    (model / "part-1.safetensors").unlink()
    with pytest.raises(ProfileError, match=r"lacks the shard part-1.safetensors"):
        inventory(model)


def test_index_of_another_model(model: Path) -> None:
    shard(model)
    edit_index(model, **{"model.layers.9.x": "part-0.safetensors"})
    with pytest.raises(ProfileError, match=r"puts 'model.layers.9.x' in part-0.safetensors, .* in nowhere"):
        inventory(model)


def test_index_leaves_its_directory(model: Path) -> None:
    shard(model)
    edit_index(model, **{Q_PROJ: "../part-0.safetensors"})
    with pytest.raises(ProfileError, match="should be the name of a file beside it"):
        inventory(model)


def test_tensor_in_two_shards(model: Path) -> None:
    shard(model)
    other = next(f for f in ("part-0.safetensors", "part-1.safetensors") if Q_PROJ not in load_file(model / f))
    save_file(load_file(model / other) | {Q_PROJ: np.zeros((256, 256), np.float16)}, model / other)
    with pytest.raises(ProfileError, match=f"'{Q_PROJ}' is in part-0.safetensors and again in part-1"):
        inventory(model)


@pytest.mark.parametrize(("name", "message"), [
    ("pytorch_model.bin", "only as pickles .* convert them to safetensors"),
    ("weights.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
    ("notes.txt", "has no weights"),
])  # fmt: skip
def test_other_weights(model: Path, name: str, message: str) -> None:
    (model / WEIGHTS_FILE).rename(model / name)
    with pytest.raises(ProfileError, match=message):
        inventory(model)


def test_resolve_local_and_embedded(model: Path) -> None:
    assert resolve_model(str(model)) == model
    assert embedded_models() == ("ref-tiny-3m",)
    assert resolve_model("ref-tiny-3m") == TINY


@pytest.mark.parametrize(("name", "message"), [
    ("ref-tiny-4m", "near matches: ref-tiny-3m"),
    ("/nowhere/at/all", "models that ship with msq: ref-tiny-3m"),
    (" ", "got an empty one"),
])  # fmt: skip
def test_resolve_unknown(name: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        resolve_model(name)


def test_resolve_names_near_directories(model: Path) -> None:
    with pytest.raises(ProfileError, match="near matches: model"):
        resolve_model(str(model.with_name("modell")))


def test_resolve_file(model: Path) -> None:
    with pytest.raises(ProfileError, match="is a file; give the directory"):
        resolve_model(str(model / "config.json"))


def test_hub_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ProfileError, match=r"can't fetch the model org/name .*service not known.*local directory"):
        resolve_model("org/name")


def test_hub_downloads_no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name") == tmp_path
    assert asked["repository"] == "org/name"
    assert not any(pattern.endswith((".bin", "*")) and pattern != "tokenizer*" for pattern in asked["allow_patterns"])


def test_no_torch() -> None:
    code = (
        "import sys, msq.planner.solve, msq.profiles.inventory as i, msq.profiles.model_source as m; "
        "i.inventory(m.resolve_model('ref-tiny-3m')); "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EMBEDDED)
