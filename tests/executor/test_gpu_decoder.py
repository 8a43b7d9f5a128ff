"""Models on a device: kernels, fused steps and graphs against the stock model; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.cuda.embedding import KernelEmbedding
from msq.kernels.cuda.linear import KernelLinear
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.benchmark import measure_kernels, measure_step
from msq.planner.executor.decoder import Decoder
from msq.planner.executor.random_model import random_model, uniform_quantization

from .conftest import make_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TCQ, NUQ = QuantizerSpec(Family.TCQ, 3, 12), QuantizerSpec(Family.NUQ, 4)
LARGER = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 512}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_graph_steps_give_the_stock_models_logits(architecture, dtype):
    config = make_config(architecture, **LARGER)
    model = random_model(config, uniform_quantization(config, TCQ, head=NUQ), CUDA, dtype=dtype)
    assert isinstance(model.lm_head, KernelLinear)
    assert_steps_are_those_of_the_stock_forward(model, dtype)


@pytest.mark.parametrize("tied", [False, True])
def test_steps_look_a_packed_embedding_up(tied):
    config = make_config("llama", **LARGER, tie_word_embeddings=tied)
    model = random_model(config, uniform_quantization(config, TCQ, head=NUQ, embedding=TCQ), CUDA)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, KernelEmbedding) and (model.lm_head is embedding.linear) is tied
    assert_steps_are_those_of_the_stock_forward(model, torch.float16)
    assert "look_up" in {row.kernel for row in measure_kernels(model, 2, 16)}
    reference = random_model(
        config, uniform_quantization(config, TCQ, head=NUQ, embedding=TCQ), CUDA, implementation="reference"
    )
    tokens = torch.arange(40, device=CUDA).view(2, 20)
    with torch.inference_mode():
        found, expected = model(tokens).logits.float(), reference(tokens).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def assert_steps_are_those_of_the_stock_forward(model, dtype):
    tokens = torch.randint(512, (3, 20), generator=torch.Generator().manual_seed(3)).to(CUDA)
    decoder = Decoder(model, batch_size=3, capacity=24)
    with torch.inference_mode():
        expected = model(tokens).logits.float()
        decoder.start(tokens[:, :9].tolist())
        for place in range(9, 20):
            decoder.tokens.copy_(tokens[:, place])
            decoder.advance()
            error = (decoder.logits.float() - expected[:, place]).norm() / expected[:, place].norm()
            assert float(error) < (1e-2 if dtype is torch.float16 else 6e-2)


def test_a_graph_repeats_itself_and_equals_eager_steps():
    config = make_config("llama", **LARGER)
    model = random_model(config, uniform_quantization(config, NUQ), CUDA)
    prompts = [[5, 6, 7], [9]]
    runs = [
        Decoder(model, batch_size=2, capacity=100, graph=graph).generate(prompts, 90) for graph in (True, True, False)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_steps_are_timed_and_their_kernels_named():
    config = make_config("llama", **LARGER)
    model = random_model(config, uniform_quantization(config, NUQ), CUDA)
    assert 10 < measure_step(model, 2, 16).step_us < 1e5
    names = {row.kernel for row in measure_kernels(model, 2, 16)}
    assert {"attend", "multiply", "rotate"} <= names
