"""The embedding as a layer like the others, alone or as one with a tied head: from the inventory to the checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from msq.experiments.plan_map import plan_map
from msq.experiments.promise_check import stored_bytes
from msq.kernels.cuda.embedding import KernelEmbedding
from msq.kernels.embedding import QuantizedEmbedding
from msq.kernels.quantize import dequantize, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.benchmark import shared_bytes, weight_bytes
from msq.planner.executor.decoder import Decoder
from msq.planner.executor.generate import generate_text
from msq.planner.executor.load import load_checkpoint, read_tensors
from msq.planner.plan import load_plan
from msq.planner.solve import find_plan
from msq.profiles.blockwise import token_kl
from msq.profiles.errors import ProfileError
from msq.profiles.fisher import measure_fisher
from msq.profiles.inventory import inventory, inventory_of_config, outside_blocks
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.journal import Journal
from msq.profiles.model_config import EMBEDDING
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import choose_device, load_model, load_tokenizer
from msq.profiles.quantizer_errors import read_weight
from msq.profiles.schema import EMBED, EMBED_ROLE, HEAD, TIED_ROLE, LossMethod
from msq.profiles.sensitivity import measure_sensitivities
from msq.profiles.tables import save_profile
from rich.console import Console
from safetensors.torch import load_file, save_file

TIED = EMBEDDED / "ref-tiny-3m"
CPU = choose_device("cpu")
SPECS = (QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.NUQ, 4), QuantizerSpec(Family.INT, 8))
TOKENS = torch.randint(2048, (2, 20), generator=torch.Generator().manual_seed(1))
EMBEDDING_BYTES = 2 * 2048 * 64  # of the tiny models


def test_an_embedding_of_its_own_is_the_first_layer(tiny_model):
    plain, found = inventory(tiny_model), inventory(tiny_model, embedding=True)
    first = found.layers[0]
    assert (first.name, first.role, first.fusion_group, first.block) == (EMBED, EMBED_ROLE, EMBED, 0)
    assert (first.out_features, first.in_features, first.stored_as) == (2048, 64, EMBEDDING)
    assert first.is_embedding and not first.is_head
    assert found.layers[1:] == plain.layers and found.layers[-1].name == HEAD
    assert found.unplanned_bytes == plain.unplanned_bytes - EMBEDDING_BYTES
    assert outside_blocks(layer.name for layer in found.layers) == {"head": True, "embedding": True}
    implied = inventory_of_config(tiny_model / "config.json", embedding=True)
    assert [replace(layer, file="") for layer in implied.layers] == [replace(layer, file="") for layer in found.layers]


@pytest.mark.parametrize("head", [None, True, False])
def test_a_tied_embedding_and_its_head_are_one_layer(head):
    plain, found = inventory(TIED), inventory(TIED, embedding=True, head=head)
    first = found.layers[0]
    assert (first.name, first.role, first.stored_as) == (EMBED, TIED_ROLE, EMBEDDING)
    assert first.is_embedding and first.is_head and found.layers[1:] == plain.layers
    assert found.unplanned_bytes == plain.unplanned_bytes - 2 * 2048 * 256


def test_a_head_alone_contradicts_a_tied_embedding(tmp_path):
    settings = ProfileSettings(specs=SPECS, tokens=128, window=64, batch_sizes=(), embedding=True, head=False)
    with pytest.raises(ProfileError, match="planned as one layer; expected --embedding without --no-head"):
        run_profile(TIED, tmp_path / "profile", settings, name="model")
    assert not (tmp_path / "profile").exists()


def test_flags_that_contradict_each_other_exit_with_2(msq, tmp_path):
    code, out, err = msq("profile", "ref-tiny-3m", "--out", tmp_path / "p", "--embedding", "--no-head")
    assert (code, out) == (2, "") and "the head of ref-tiny-3m is its embedding" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_its_sensitivity_is_that_of_the_whole_model(tiny_llama, tmp_path, tied):
    directory = TIED if tied else tiny_llama
    model = load_model(directory, CPU)
    layers = inventory(directory, embedding=True).layers[:1]
    tokens = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(0))
    with Journal(tmp_path / "j", {}) as journal:
        found = measure_sensitivities(model, layers, tokens, noise=0.1, seed=3, windows_per_group=2, journal=journal)
    weight = model.get_parameter(EMBEDDING).detach().clone()
    head = model.lm_head.weight.detach().clone()
    values = []
    for index, part in enumerate(tokens.split(2)):
        draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(input_seed(f"{EMBED}:{index}", 3)))
        changed = weight + 0.1 * F.normalize(draw, dim=1) * weight.norm(dim=1, keepdim=True)
        with torch.no_grad():
            hidden = model.model(inputs_embeds=F.embedding(part, changed)).last_hidden_state
            logits = hidden @ (changed if tied else head).T
            values.append(float(token_kl(model(part).logits, logits).mean()))
    assert found[EMBED].value == pytest.approx(sum(values) / len(values) / 0.01, rel=1e-3)
    assert torch.equal(model.get_parameter(EMBEDDING), weight)


@pytest.mark.parametrize("tied", [False, True])
def test_fisher_agrees_with_noise(tiny_llama, tmp_path, tied):
    directory = TIED if tied else tiny_llama
    tokens = torch.randint(2048, (16, 32), generator=torch.Generator().manual_seed(0))
    layers = inventory(directory, embedding=True).layers
    with Journal(tmp_path / "j", {}) as journal:
        fisher = measure_fisher(
            load_model(directory, CPU), layers, tokens, seed=0, windows_per_group=2, journal=journal
        )
    with Journal(tmp_path / "k", {}) as journal:
        noise = measure_sensitivities(
            load_model(directory, CPU), layers[:1], tokens, noise=0.03, seed=0, windows_per_group=2, journal=journal
        )
    assert fisher[EMBED].value == pytest.approx(noise[EMBED].value, rel=0.3)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def applied(request, tiny_llama, tmp_path_factory):
    """A model, and the checkpoint of a plan for it with the embedding, from a profile with latencies."""
    root = tmp_path_factory.mktemp("applied")
    directory = shutil.copytree(TIED if request.param else tiny_llama, root / "model")
    settings = ProfileSettings(specs=SPECS, tokens=128, window=64, batch_sizes=(1, 2), embedding=True, context=4)
    profile = run_profile(directory, root / "profile", settings, name="model")
    plan = find_plan(profile, parse_budgets(["memory=4bpw", "latency=10s"])).plan
    apply_plan(directory, plan, root / "out")
    return directory, profile, root / "out"


def test_tables_and_plan_have_it(applied):
    _, profile, out = applied
    plan, tied = load_plan(out / "plan.yaml"), profile.layers["role"].iloc[0] == TIED_ROLE
    assert profile.layer_names[0] == EMBED == plan.layers[0].layer and profile.sensitivities[0] > 0
    assert (HEAD in profile.layer_names) is not tied
    role = TIED_ROLE if tied else EMBED_ROLE
    rows = profile.latency[profile.latency["pattern"] == role]
    assert len(rows) == len(SPECS) * 2 and set(rows["implementation"]) == {"reference"}
    part = profile.manifest.latency
    assert set(part.embedding_us) == set(part.head_us) == {1, 2}
    assert plan.layers[0].pattern == (EMBED,) and plan.promised.latency_us[2] > part.overhead_us[2]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(plan_map(plan))
    assert "embed_tokens" in console.export_text()


def test_a_table_has_one_embedding_before_the_blocks(applied, tmp_path):
    _, profile, _ = applied
    late = profile.layers.assign(block=[1, *profile.layers["block"][1:]])
    second = profile.layers["role"].where(profile.layers["layer"] != profile.layer_names[1], EMBED_ROLE)
    for layers in (late, profile.layers.assign(role=second)):
        with pytest.raises(ProfileError, match=r"is an embedding in block \d; expected one at most, in block 0"):
            tables = {"errors": profile.errors, "latency": profile.latency}
            save_profile(tmp_path / "p", profile.manifest, layers, profile.quantizers, **tables)


def test_promised_bytes_are_those_on_disk_and_in_memory(applied):
    directory, _, out = applied
    plan, stored = load_plan(out / "plan.yaml"), load_file(out / "model.safetensors")
    assert EMBEDDING not in stored and "lm_head.weight" not in stored and f"{EMBED}.scales" in stored
    assert stored_bytes(out, {entry.layer for entry in plan.layers}) == plan.promised.memory_bytes
    whole = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert whole == plan.promised.memory_bytes + plan.model.unplanned_bytes
    model = load_checkpoint(out)
    assert weight_bytes(model) + shared_bytes(model) == plan.promised.memory_bytes
    tied = json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_checkpoint_runs_as_the_quantized_weights_say(applied):
    directory, _, out = applied
    plan, expected = load_plan(out / "plan.yaml"), load_model(directory, CPU)
    for layer in inventory(directory, embedding=True).layers:
        spec = plan.spec(next(entry.quantizer for entry in plan.layers if entry.layer == layer.name))
        packed = quantize(read_weight(directory, layer), spec, rotation_seed=input_seed(layer.fusion_group, 0))
        expected.get_parameter(f"{layer.name}.weight").data = dequantize(packed)
    model = load_checkpoint(out)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, expected(TOKENS).logits, atol=2e-3)
    decoder = Decoder(model, batch_size=2, capacity=24)
    with torch.inference_mode():
        logits = model(TOKENS).logits
        decoder.start(TOKENS[:, :9].tolist())
        for place in range(9, 20):
            decoder.tokens.copy_(TOKENS[:, place])
            decoder.advance()
            assert torch.allclose(decoder.logits, logits[:, place], atol=1e-3)
    assert generate_text(model, load_tokenizer(out), "The", 4)


def test_it_goes_through_from_pretrained_and_back(applied, tmp_path):
    from transformers import AutoModelForCausalLM

    _, _, out = applied
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt, settings = TOKENS[:1], {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, load_checkpoint(out)(TOKENS).logits)
    assert torch.equal(model.generate(prompt, **settings), load_checkpoint(out).generate(prompt, **settings))
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in set(names) - {"config.json"}:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    stored, saved = (read_tensors([folder / "model.safetensors"]) for folder in (out, tmp_path / "first"))
    packed = [name for name in stored if stored[name].dtype == torch.uint8]
    assert stored.keys() == saved.keys() and all(torch.equal(stored[name], saved[name]) for name in packed)


def test_kernel_modules_give_the_same_logits_on_their_twins(applied, monkeypatch):
    from msq.kernels.linear import LookupKernel, TensorCoreImplementation

    for kind in (LookupKernel, TensorCoreImplementation):
        monkeypatch.setattr(kind, "unsupported_reason", lambda *_: None)
    _, profile, out = applied
    model = load_checkpoint(out, implementation="tensor_core")
    embedding = model.model.embed_tokens
    assert isinstance(embedding, KernelEmbedding)
    assert (model.lm_head is embedding.linear) is (HEAD not in profile.layer_names)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, load_checkpoint(out)(TOKENS).logits, atol=1e-3)


def test_a_tied_weight_that_is_stored_twice_is_replaced_twice(tmp_path):
    directory = shutil.copytree(TIED, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}, directory / "model.safetensors", {"format": "pt"}
    )
    settings = ProfileSettings(specs=SPECS[:1], tokens=128, window=64, batch_sizes=(), embedding=True)
    profile = run_profile(directory, tmp_path / "profile", settings, name="model")
    plan = find_plan(profile, parse_budgets(["memory=4bpw"])).plan
    apply_plan(directory, plan, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.isfinite(load_checkpoint(tmp_path / "out")(TOKENS).logits).all()


def test_hessians_leave_it_alone(tiny_llama, tmp_path):
    settings = ProfileSettings(
        specs=SPECS[:1], tokens=128, window=64, batch_sizes=(), embedding=True, error="proxy", method=LossMethod.FISHER
    )
    proxy = run_profile(tiny_llama, tmp_path / "proxy", settings, name="model")
    plain = run_profile(tiny_llama, tmp_path / "plain", replace(settings, error="weights"), name="model")
    same = proxy.error_matrix[:, 0] == plain.error_matrix[:, 0]
    assert same[0] and not same[1:].all()
