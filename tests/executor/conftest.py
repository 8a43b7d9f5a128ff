"""Small models of every architecture, with weights, biases and norms that matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def make_config(architecture: str, **changes):
    """A transformers config of a small model."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = SIZES | changes
    if architecture == "llama":
        scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        return LlamaConfig(**{"attention_bias": True, "mlp_bias": True, "rope_parameters": scaled} | sizes)
    if architecture == "mistral":
        return MistralConfig(**{"sliding_window": 7} | sizes)
    if architecture == "qwen2":
        return Qwen2Config(**{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1} | sizes)
    return Qwen3Config(**sizes)


def make_model(architecture: str, **changes) -> nn.Module:
    """A float32 model whose every parameter was drawn at random, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(architecture, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def model(request) -> nn.Module:
    """A model of every architecture."""
    return make_model(request.param)


def hand_made_plan(model_dir, assignment, *, head=None):
    """A plan for every layer of a model, without a profile.

    Args:
        assignment: by roles of a pattern, the quantizer; implementations are those for a GPU.
        head: as for `inventory`.
    """
    from dataclasses import asdict

    from msq.planner.plan import (
        Plan,
        PlanBudget,
        PlanModel,
        PlannedLayer,
        PlanProfile,
        PlanQuantizer,
        Promise,
        SolverReport,
    )
    from msq.profiles.inventory import inventory

    embedding = any("embed_tokens" in roles for roles in assignment)
    info = inventory(model_dir, head=head, embedding=embedding)
    layers, size = [], 0
    for layer in info.layers:
        parent, _, role = layer.name.rpartition(".")
        roles, spec = next((roles, spec) for roles, spec in assignment.items() if role in roles)
        pattern = tuple(f"{parent}.{name}" if parent else name for name in roles)
        layers.append(
            PlannedLayer(layer=layer.name, quantizer=spec.label, implementation="tensor_core", pattern=pattern)
        )
        size += spec.size_bytes(layer.out_features, layer.in_features)
    specs = {spec.label: spec for spec in assignment.values()}
    report = {"lower_bound": None, "gap": None, "shadow_prices": None, "seconds": 0, "columns": 1}
    return Plan(
        msq_version="0",
        model=PlanModel(name="hand", architecture=info.architecture, blocks=info.blocks),
        profile=PlanProfile(digest="0" * 64, device="none"),
        budgets=(PlanBudget(text="memory=1GiB", resource="memory", cap=2**30),),
        promised=Promise(loss=0, memory_bytes=size, bits_per_weight=8 * size / info.planned_parameters),
        solver=SolverReport(name="hand", status="feasible", objective=0, **report),
        quantizers={label: PlanQuantizer.model_validate(asdict(spec)) for label, spec in specs.items()},
        layers=tuple(layers),
    )
