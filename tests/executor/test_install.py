"""Which implementation a layer gets, and that what was installed can be taken out again."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.linear import IMPLEMENTATIONS, FusedSlice, QuantizedLinear
from msq.kernels.random_weight import random_weight
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.errors import CheckpointError
from msq.planner.executor.install import Place, choose_places, install, installed_layers
from msq.planner.executor.load import quantized_weights
from msq.planner.executor.random_model import model_without_weights, random_model, uniform_quantization

from .conftest import make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUQ = QuantizerSpec(Family.NUQ, 3)


@pytest.fixture
def quantization():
    """Every layer planned for `tensor_core`."""
    return uniform_quantization(make_config("llama"), NUQ, head=NUQ)


def planned_for(quantization, implementation):
    layers = {
        name: layer.model_copy(update={"implementation": implementation}) for name, layer in quantization.layers.items()
    }
    return quantization.model_copy(update={"layers": layers})


def test_a_cpu_runs_the_reference_fused_or_not(quantization):
    places = choose_places(quantization, CPU)
    assert {place.implementation for place in places} == {"reference"}
    assert sorted(len(place.layers) for place in places) == [1, 1, 1, 1, 1, 2, 2, 3, 3]
    assert all(len(place.layers) == 1 for place in choose_places(quantization, CPU, fused=False))


def test_a_gpu_runs_what_is_planned_and_kernels_where_the_plan_names_none(quantization, monkeypatch):
    monkeypatch.setattr(IMPLEMENTATIONS["tensor_core"], "unsupported_reason", lambda *_: None)
    assert {place.implementation for place in choose_places(quantization, CUDA)} == {"tensor_core"}
    elsewhere = planned_for(quantization, "reference")
    assert {place.implementation for place in choose_places(elsewhere, CUDA)} == {"tensor_core"}
    asked = choose_places(quantization, CUDA, implementation="reference")
    assert {place.implementation for place in asked} == {"reference"}


def test_layers_that_no_kernel_takes_run_the_reference_only_if_the_plan_does_not_forbid_it(quantization, monkeypatch):
    def reason(spec, rows, columns, batch, device):
        return "the head is too large." if rows == 96 else None

    monkeypatch.setattr(IMPLEMENTATIONS["tensor_core"], "unsupported_reason", reason)
    elsewhere = planned_for(quantization, "reference")
    chosen = {place.layers: place.implementation for place in choose_places(elsewhere, CUDA)}
    assert chosen.pop(("lm_head",)) == "reference" and set(chosen.values()) == {"tensor_core"}
    with pytest.raises(CheckpointError, match=r"lm_head can't run on tensor_core: the head is too large. Load it with"):
        choose_places(quantization, CUDA)


def test_what_can_not_run_says_so(quantization):
    with pytest.raises(CheckpointError, match=r"q_proj\+.*can't run on tensor_core: tensor_core kernels need a CUDA"):
        choose_places(quantization, CPU, implementation="tensor_core")
    with pytest.raises(CheckpointError, match="expected an implementation of reference, tensor_core; got 'gpu'"):
        choose_places(quantization, CPU, implementation="gpu")
    with pytest.raises(CheckpointError, match="can't run on cuda_core: this version of msq has reference, tensor_core"):
        choose_places(planned_for(quantization, "cuda_core"), CUDA)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_was_installed_can_be_taken_out_again(implementation):
    config = make_config("llama")
    model, generator = model_without_weights(config), torch.Generator().manual_seed(0)
    names = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")]
    weights = {name: random_weight(NUQ, rows, 64, generator) for name, rows in zip(names, (64, 32, 64), strict=True)}
    biases = {names[0]: torch.randn(64), names[1]: torch.randn(32), names[2]: None}
    install(
        model,
        weights,
        biases,
        [Place(tuple(names[:2]), implementation), Place((names[2],), implementation)],
        torch.float32,
    )
    assert isinstance(model.get_submodule(names[1]), FusedSlice)
    found = installed_layers(model)
    assert set(found) == set(names)
    for name, (weight, bias) in found.items():
        assert (weight.spec, weight.out_features, weight.rotation_seed) == (NUQ, weights[name].out_features, 0)
        for (key, mine), (_, theirs) in zip(weight.tensors(), weights[name].tensors(), strict=True):
            assert torch.equal(mine, theirs), key
        assert bias is biases[name] is None or torch.equal(bias, biases[name])


def test_layers_are_missing_with_a_sentence(quantization):
    with pytest.raises(CheckpointError, match=r"needs 'packed' of shape .*got nothing. Apply the plan again."):
        quantized_weights(quantization, {})


def test_a_layer_decoded_once_gives_the_same():
    config = make_config("llama")
    model = random_model(config, uniform_quantization(config, NUQ), CPU, dtype=torch.float32)
    module = model.model.layers[0].mlp.down_proj
    assert isinstance(module, QuantizedLinear)
    x = torch.randn(3, 128)
    before, stored = module(x), set(module.state_dict())
    module.keep_decoded()
    assert torch.equal(module(x), before) and set(module.state_dict()) == stored
