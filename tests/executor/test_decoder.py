"""Fused decoding against the stock model: every architecture, every mixture of implementations, uneven prompts."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.quantize import quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.decode_step import DecodeStep, KeyValueCache, unsupported_reason
from msq.planner.executor.decoder import Decoder, likeliest
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.install import Place, install

from .conftest import make_model

NUQ, INT, TCQ = QuantizerSpec(Family.NUQ, 5), QuantizerSpec(Family.INT, 8), QuantizerSpec(Family.TCQ, 4, 12)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def install_plan(model, assignment) -> None:
    """Quantize layers of every block in place.

    Args:
        assignment: by roles of a pattern, the quantizer and the implementation.
    """
    places, weights, biases = [], {}, {}
    for number in range(model.config.num_hidden_layers):
        for roles, (spec, implementation) in assignment.items():
            parent = "mlp" if roles[0] in (*MLP, "down_proj") else "self_attn"
            names = tuple(f"model.layers.{number}.{parent}.{role}" for role in roles)
            group = names[0] if roles[0] in ("o_proj", "down_proj") else f"{number}.{parent}"
            for name in names:
                linear = model.get_submodule(name)
                weights[name] = quantize(linear.weight.detach(), spec, rotation_seed=input_seed(group))
                biases[name] = None if linear.bias is None else linear.bias.detach()
            places.append(Place(names, implementation))
    install(model, weights, biases, places, torch.float32)


PLANS = {
    "stock": {},
    "fused kernels": {
        ATTENTION: (NUQ, "tensor_core"),
        ("o_proj",): (TCQ, "tensor_core"),
        MLP: (TCQ, "tensor_core"),
        ("down_proj",): (NUQ, "tensor_core"),
    },
    "parts, unrotated and reference": {
        ("q_proj", "v_proj"): (NUQ, "tensor_core"),
        ("k_proj",): (INT, "tensor_core"),
        ("o_proj",): (INT, "tensor_core"),
        ("gate_proj",): (NUQ, "reference"),
        ("up_proj",): (NUQ, "tensor_core"),
        ("down_proj",): (INT, "reference"),
    },
    "fused reference": {ATTENTION: (NUQ, "reference"), MLP: (INT, "reference"), ("down_proj",): (NUQ, "reference")},
}


@pytest.mark.parametrize("plan", PLANS)
def test_steps_give_the_stock_models_logits(model, plan):
    install_plan(model, PLANS[plan])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(96, (2, 20), generator=generator)
    decoder = Decoder(model, batch_size=2, capacity=24)
    with torch.inference_mode():
        expected = model(tokens).logits
        decoder.start(tokens[:, :9].tolist())
        assert torch.allclose(decoder.logits, expected[:, 8], atol=2e-4)
        for place in range(9, 20):
            decoder.tokens.copy_(tokens[:, place])
            decoder.advance()
            assert torch.allclose(decoder.logits, expected[:, place], atol=2e-4)


def test_generation_is_the_stock_models(model):
    install_plan(model, PLANS["fused kernels"])
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    found = Decoder(model, batch_size=3, capacity=40).generate(prompts, 20)
    for prompt, added in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert added == alone[0, len(prompt) :].tolist()


def test_the_logits_of_uneven_prompts_are_there_from_the_start():
    model = make_model("llama")
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3]]
    decoder = Decoder(model, batch_size=3, capacity=10)
    for _ in range(2):  # anew, and over the logits of a step
        decoder.start(prompts)
        with torch.inference_mode():
            expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        assert torch.allclose(decoder.logits, expected, atol=2e-4)
        assert torch.equal(decoder.tokens, expected.argmax(-1))
        decoder.advance()


def test_a_sequence_ends_at_a_stop_token():
    decoder = Decoder(make_model("llama"), batch_size=2, capacity=100)
    free = decoder.generate([[1, 2], [3, 4]], 60)
    stop = free[0][20]
    found = decoder.generate([[1, 2], [3, 4]], 60, stop=[stop])
    for ended, whole in zip(found, free, strict=True):
        assert ended == whole[: whole.index(stop) if stop in whole else 60]


def test_tokens_are_drawn_at_a_temperature():
    model = make_model("llama")
    with torch.inference_mode():
        chances = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.7).softmax(-1)
    decoder = Decoder(model, batch_size=2000, capacity=4, temperature=0.7)
    torch.manual_seed(0)
    decoder.start([[1, 2, 3]] * 2000)
    found = torch.bincount(decoder.tokens, minlength=96) / 2000
    assert 0.5 * float((found - chances).abs().sum()) < 0.15  # total variation; of a uniform draw it is far larger
    assert 0.5 * float((1 / 96 - chances).abs().sum()) > 0.3


def test_what_can_not_be_run_says_so():
    model = make_model("llama")
    with pytest.raises(CheckpointError, match="expected 1 to 128 positions"):
        Decoder(model, batch_size=1, capacity=129)
    decoder = Decoder(model, batch_size=1, capacity=4)
    with pytest.raises(CheckpointError, match=r"1 to 3 tokens; got lengths \[4\]"):
        decoder.start([[1, 2, 3, 4]])
    with pytest.raises(CheckpointError, match="expected 1 prompts"):
        decoder.start([[1], [2]])
    decoder.start([[1, 2, 3]])
    decoder.advance()
    with pytest.raises(CheckpointError, match="cache of 4 positions is full"):
        decoder.advance()
    model.config.hidden_act = "gelu"
    assert "silu; got gelu" in str(unsupported_reason(model))
    with pytest.raises(CheckpointError, match="stock model instead"):
        DecodeStep(torch.nn.Linear(1, 1), KeyValueCache(make_model("llama"), 1, 4, torch.float32, torch.device("cpu")))


_LENGTHS = {"original_max_position_embeddings": 32, "factor": 4.0}
_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": _LENGTHS | _FREQUENCIES,
    "yarn": _LENGTHS,
    "dynamic": {"factor": 2.0},
    "longrope": _LENGTHS | {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_are_the_stock_models_or_refused(rope):
    changes = {"rope_type": rope, "rope_theta": 10000.0} | ROPES[rope]
    model = make_model("llama", rope_parameters=changes)
    if rope in ("dynamic", "longrope"):
        assert f"default, linear, llama3, yarn; got {rope}" in str(unsupported_reason(model))
        with pytest.raises(CheckpointError, match="stock model instead"):
            Decoder(model, batch_size=1, capacity=60)
        return
    tokens = torch.randint(96, (1, 40), generator=torch.Generator().manual_seed(4))
    decoder = Decoder(model, batch_size=1, capacity=60)
    with torch.inference_mode():
        expected = model(tokens).logits
        decoder.start(tokens[:, :30].tolist())
        for place in range(30, 40):
            decoder.tokens.copy_(tokens[:, place])
            decoder.advance()
            assert torch.allclose(decoder.logits, expected[:, place], atol=2e-4)


@pytest.mark.parametrize("size", [1, 96, 97, 1024, 1009, 32000])
def test_the_likeliest_token_is_the_first_of_the_highest(size):
    logits = torch.randint(0, 50, (5, size), generator=torch.Generator().manual_seed(size)).half()
    assert torch.equal(likeliest(logits), logits.argmax(-1))
