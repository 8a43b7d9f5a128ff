"""lm_head as a layer like the others: in the inventory, its sensitivity, in plan and checkpoint, tied or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from msq.kernels.quantize import dequantize, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.load import load_checkpoint
from msq.planner.solve import find_plan
from msq.profiles.blockwise import BlockwiseModel, token_kl
from msq.profiles.errors import ProfileError
from msq.profiles.fisher import measure_fisher
from msq.profiles.inventory import inventory, inventory_of_config
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.journal import Journal
from msq.profiles.model_config import EMBEDDING
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import choose_device, load_model
from msq.profiles.quantizer_errors import read_weight
from msq.profiles.schema import HEAD, LossMethod
from msq.profiles.sensitivity import measure_sensitivities
from msq.profiles.shipped import resolve_config, shape_names
from safetensors.torch import load_file

TIED = EMBEDDED / "ref-tiny-3m"
CPU = choose_device("cpu")
SPECS = (QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.NUQ, 4), QuantizerSpec(Family.INT, 8))


def test_the_head_is_a_layer_where_its_weight_is_its_own(tiny_model):
    found = inventory(tiny_model)
    head = found.layers[-1]
    assert not found.tied_embeddings and len(found.layers) == 15
    assert (head.name, head.role, head.fusion_group, head.block) == (HEAD, HEAD, HEAD, found.blocks)
    assert (head.out_features, head.in_features, head.stored_as) == (2048, 64, "lm_head.weight")
    without = inventory(tiny_model, head=False)
    assert without.layers == found.layers[:-1]
    assert without.unplanned_bytes == found.unplanned_bytes + 2 * 2048 * 64


def test_a_tied_head_is_planned_on_request_and_the_embedding_still_counts():
    plain, planned = inventory(TIED), inventory(TIED, head=True)
    assert plain.tied_embeddings and HEAD not in [layer.name for layer in plain.layers]
    head = planned.layers[-1]
    assert (head.name, head.stored_as) == (HEAD, EMBEDDING)
    assert planned.unplanned_bytes == plain.unplanned_bytes
    assert planned.planned_parameters == plain.planned_parameters + head.out_features * head.in_features
    assert torch.equal(read_weight(TIED, head), load_file(TIED / "model.safetensors")[EMBEDDING])


def test_a_config_alone_tells_the_same_layers_and_bytes(tiny_model):
    stored, implied = inventory(tiny_model, name="tiny"), inventory_of_config(tiny_model / "config.json", name="tiny")
    assert [replace(layer, file="") for layer in implied.layers] == [replace(layer, file="") for layer in stored.layers]
    assert replace(implied, layers=()) == replace(stored, layers=())


@pytest.mark.parametrize(
    ("name", "parameters", "tied"),
    [
        ("llama-3.1-8b", 8_030_261_248, False),
        ("llama-3.1-70b", 70_553_706_496, False),
        ("llama-3.2-1b", 1_235_814_400, True),
        ("qwen2.5-7b", 7_615_616_512, False),
    ],
)
def test_shipped_shapes_have_the_published_number_of_parameters(name, parameters, tied):
    found = inventory_of_config(resolve_config(name))
    assert (found.name, found.total_parameters, found.tied_embeddings) == (name, parameters, tied)
    assert (found.layers[-1].name == HEAD) is not tied
    assert name in shape_names()


def test_unknown_shapes_are_one_sentence(tmp_path):
    with pytest.raises(ProfileError, match=r'no config or model directory "llama-3.1-8"; did you mean llama-3.1-8b'):
        resolve_config("llama-3.1-8")
    config = json.loads((TIED / "config.json").read_text())
    (tmp_path / "odd.json").write_text(json.dumps(config | {"dtype": "int8"}))
    with pytest.raises(ProfileError, match=r"dtype should be one of float16, .*; got 'int8'"):
        inventory_of_config(tmp_path / "odd.json")


@pytest.mark.parametrize("tied", [False, True])
def test_sensitivity_of_the_head_is_that_of_the_whole_model(tiny_llama, tmp_path, tied):
    directory = TIED if tied else tiny_llama
    model = load_model(directory, CPU)
    layers = inventory(directory, head=True).layers[-1:]
    tokens = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(0))
    with Journal(tmp_path / "j", {}) as journal:
        found = measure_sensitivities(model, layers, tokens, noise=0.1, seed=3, windows_per_group=2, journal=journal)
    weight = model.lm_head.weight.detach().clone()
    values = []
    for index, part in enumerate(tokens.split(2)):
        draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(input_seed(f"{HEAD}:{index}", 3)))
        changed = weight + 0.1 * weight.norm() / draw.norm() * draw
        with torch.no_grad():
            hidden = model.model(part).last_hidden_state
            values.append(float(token_kl(model(part).logits, hidden @ changed.T).mean()))
    assert found[HEAD].value == pytest.approx(sum(values) / len(values) / 0.01, rel=1e-3)


def test_a_large_vocabulary_is_compared_in_pieces(tiny_llama, monkeypatch):
    model, tokens = load_model(tiny_llama, CPU), torch.randint(2048, (2, 12))
    head = inventory(tiny_llama).layers[-1]
    blockwise = BlockwiseModel(model)
    changed = model.lm_head.weight.detach() * 1.1
    whole = blockwise.kl_of_change(blockwise.record(tokens), head, changed)
    monkeypatch.setattr("msq.profiles.blockwise._LOGITS_AT_ONCE", 5 * 2048)
    assert torch.allclose(blockwise.kl_of_change(blockwise.record(tokens), head, changed), whole, rtol=1e-5)
    assert float(whole.min()) > 0


def test_fisher_separates_a_tied_head_from_the_embedding(tmp_path):
    tokens = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(0))
    model = load_model(TIED, CPU)
    layers = inventory(TIED, head=True).layers
    with Journal(tmp_path / "j", {}) as journal:
        fisher = measure_fisher(model, layers, tokens, seed=0, windows_per_group=2, journal=journal)
    with Journal(tmp_path / "k", {}) as journal:
        noise = measure_sensitivities(
            load_model(TIED, CPU), layers[-1:], tokens, noise=0.1, seed=0, windows_per_group=2, journal=journal
        )
    assert fisher[HEAD].value == pytest.approx(noise[HEAD].value, rel=0.3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_planned_head_is_in_the_checkpoint_and_the_embedding_stays(tiny_llama, tmp_path, tied):
    directory = shutil.copytree(TIED if tied else tiny_llama, tmp_path / "model")
    settings = ProfileSettings(
        specs=SPECS, tokens=128, window=64, batch_sizes=(), head=True, method=LossMethod.DATA_FREE_KL, error="proxy"
    )
    profile = run_profile(directory, tmp_path / "profile", settings, name="model")
    assert profile.layer_names[-1] == HEAD and profile.sensitivities[-1] > 0
    profile = run_profile(directory, tmp_path / "plain", replace(settings, error="weights"), name="model")
    plan = find_plan(profile, parse_budgets(["memory=4bpw"])).plan
    applied = apply_plan(directory, plan, tmp_path / "out")
    assert applied.memory_bytes == plan.promised.memory_bytes
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored and any(name.startswith("lm_head.packed") for name in stored)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert whole == plan.promised.memory_bytes + plan.model.unplanned_bytes
    original = load_file(directory / "model.safetensors")
    assert torch.equal(stored[EMBEDDING], original[EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    expected = load_model(directory, CPU)
    if tied:
        expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())
    for layer in inventory(directory, head=True).layers:
        spec = plan.spec(next(entry.quantizer for entry in plan.layers if entry.layer == layer.name))
        packed = quantize(read_weight(directory, layer), spec, rotation_seed=input_seed(layer.fusion_group, 0))
        expected.get_parameter(f"{layer.name}.weight").data = dequantize(packed)
    tokens = torch.randint(2048, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(load_checkpoint(tmp_path / "out")(tokens).logits, expected(tokens).logits, atol=2e-3)
