"""Random models of plans, and what the benchmark says of them."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.benchmark import (
    measure_prompt,
    measure_step,
    measure_without_products,
    weight_bytes,
    without_products,
)
from msq.planner.executor.decoder import Decoder
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.random_model import random_model, uniform_quantization

from .conftest import make_config

CPU = torch.device("cpu")
NUQ, TCQ, INT = QuantizerSpec(Family.NUQ, 3), QuantizerSpec(Family.TCQ, 2.5, 12), QuantizerSpec(Family.INT, 4)


@pytest.mark.parametrize("spec", [NUQ, TCQ, INT], ids=lambda spec: spec.label)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_random_models_have_the_bytes_of_their_scheme_and_finite_logits(architecture, spec):
    config = make_config(architecture, tie_word_embeddings=True)
    quantization = uniform_quantization(config, spec, head=NUQ, fused=False)
    model = random_model(config, quantization, CPU, dtype=torch.float32)
    promised = sum(
        quantization.spec(name).size_bytes(layer.out_features, layer.in_features)
        for name, layer in quantization.layers.items()
    )
    assert weight_bytes(model) == promised
    with torch.inference_mode():
        logits = model(torch.arange(9)[None]).logits
    assert logits.isfinite().all() and 0.05 < float(logits.std()) < 20


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_embedding_is_counted_once_and_costs_nothing_without_products(tied):
    config = make_config("llama", tie_word_embeddings=tied)
    quantization = uniform_quantization(config, NUQ, head=INT, embedding=TCQ, fused=False)
    assert quantization.spec("model.embed_tokens") == TCQ and ("lm_head" in quantization.layers) is not tied
    model = random_model(config, quantization, CPU, dtype=torch.float32)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in quantization.layers.items()}
    assert weight_bytes(model) == sum(quantization.spec(name).size_bytes(*shape) for name, shape in shapes.items())
    assert (model.lm_head is model.model.embed_tokens.linear) is tied
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        assert before.isfinite().all()
        with without_products(model):
            assert not model.model.embed_tokens(tokens).any() and not model(tokens).logits.any()
        assert torch.equal(model(tokens).logits, before)


def test_fused_and_single_layers_are_the_same_model():
    def logits(fused):
        config = make_config("qwen2")
        quantization = uniform_quantization(config, TCQ, head=NUQ)
        model = random_model(config, quantization, CPU, dtype=torch.float32, fused=fused)
        decoder = Decoder(model, batch_size=1, capacity=8)
        decoder.start([[1, 2, 3]])
        decoder.advance()
        return decoder.logits

    assert torch.allclose(logits(True), logits(False), atol=1e-4)


def test_steps_are_timed_with_and_without_products():
    config = make_config("llama")
    model = random_model(config, uniform_quantization(config, NUQ), CPU, dtype=torch.float32)
    timed = measure_step(model, 2, 5)
    assert timed.tokens_per_second == pytest.approx(2e6 / timed.step_us) and timed.step_us > 0
    assert measure_prompt(model, 2, 5) > 0
    assert set(measure_without_products(model, [1, 2], 5)) == {1, 2}
    decoder = Decoder(model, batch_size=1, capacity=8)
    decoder.start([[1, 2]])
    before = decoder.advance().clone(), decoder.logits.clone()
    with without_products(model):
        silent = Decoder(model, batch_size=1, capacity=8)
        silent.pretend(3)
        silent.advance()
        assert not torch.equal(silent.logits, before[1])
    decoder.start([[1, 2]])
    decoder.advance()
    assert torch.equal(decoder.logits, before[1])


def test_a_plan_for_another_model_is_refused():
    from msq.planner.executor.random_model import _described
    from msq.planner.plan import PlannedLayer, PlanQuantizer

    model = torch.nn.Sequential()
    entry = PlannedLayer(layer="lm_head", quantizer="a", implementation="reference", pattern=("lm_head",))
    with pytest.raises(CheckpointError, match=r"has a layer lm_head, which a Sequential of this config lacks"):
        _described(model, [entry], {"a": PlanQuantizer(family=Family.NUQ, bits=3)})


def test_layers_whose_rows_leave_tiles_unfilled_run_alone():
    config = make_config("llama", intermediate_size=88)  # gate: 5 tiles and a half
    patterns = {len(layer.pattern) for layer in uniform_quantization(config, NUQ).layers.values()}
    assert patterns == {1, 3}  # q, k and v still run together
    with torch.inference_mode():
        assert (
            random_model(config, uniform_quantization(config, NUQ), CPU)(torch.arange(9)[None]).logits.isfinite().all()
        )
