"""What a profile says that a decoding step takes beside its products."""

from __future__ import annotations

import json

import pytest
import torch
from msq.planner.executor import overhead
from msq.planner.executor.benchmark import StepTime
from msq.planner.executor.overhead import ExecutorOverhead, less_products, products_us
from msq.planner.executor.random_model import uniform_quantization
from msq.profiles.inventory import inventory_of_config
from msq.profiles.latency import KernelLatency, kernel_shapes
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import load_config

CPU = torch.device("cpu")
ROW_US = {"q_proj+k_proj+v_proj": 7.0, "o_proj": 5.0, "gate_proj+up_proj": 11.0, "down_proj": 13.0}
OUTSIDE_US = {True: {"tied_embedding": 17.0}, False: {"embed_tokens": 3.0, "lm_head": 19.0}}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    """A config, its planned layers, all of them, and what a row of each pattern that runs takes."""
    settings = json.loads((EMBEDDED / "ref-tiny-3m" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings | {"tie_word_embeddings": request.param}))
    layers = inventory_of_config(path, name="tiny", head=True, embedding=True).layers
    return path, layers, ROW_US | OUTSIDE_US[request.param]


def quantization_of(path):
    return uniform_quantization(load_config(path), overhead._SPEC, head=overhead._SPEC, embedding=overhead._SPEC)


def test_every_product_counts_once_by_its_fastest_row(model, monkeypatch):
    path, layers, row_us = model

    def rows(layers, specs, *, batch_sizes, **_):
        assert specs == (overhead._SPEC,)
        return [
            KernelLatency(shape, specs[0], name, batch, row_us.get(shape.pattern, 1e6) * batch * times, 0.0, False)
            for shape in kernel_shapes(layers)
            for name, times in (("reference", 9), ("tensor_core", 1))
            for batch in batch_sizes
        ]

    monkeypatch.setattr(overhead, "measure_latency", rows)
    blocks = load_config(path).num_hidden_layers
    expected = blocks * sum(ROW_US.values()) + sum(us for name, us in row_us.items() if name not in ROW_US)
    found = products_us(quantization_of(path), layers, (1, 8), CPU, torch.float32)
    assert found == {1: pytest.approx(expected), 8: pytest.approx(8 * expected)}


def test_the_step_less_its_products_is_the_overhead(monkeypatch):
    def measured(model, batch, context):
        assert context == 32
        return StepTime(batch, context, 100.0 * batch, 0.0, 0.0, 0)

    monkeypatch.setattr(overhead, "measure_step", measured)
    with pytest.warns(UserWarning, match=r"batch size 4 a step took 100.0 us less"):
        assert less_products(torch.nn.Identity(), {1: 40.0, 2: 40.0, 4: 500.0}, 32) == {1: 60.0, 2: 160.0, 4: 0.0}


def test_on_a_gpu_the_step_runs_beside_products(model, monkeypatch):
    path, layers, _ = model
    device, asked = torch.device("cuda"), []

    def products(quantization, of_layers, batch_sizes, where, dtype):
        assert quantization == quantization_of(path) and of_layers == layers
        asked.append((batch_sizes, where, dtype))
        return dict.fromkeys(batch_sizes, 30.0)

    def packed(settings, quantization, where, *, dtype):
        assert quantization == quantization_of(path)
        asked.append((where, dtype))
        return torch.nn.Identity()

    monkeypatch.setattr(overhead, "products_us", products)
    monkeypatch.setattr(overhead, "random_model", packed)
    monkeypatch.setattr(overhead, "measure_step", lambda model, *step: StepTime(*step, 100.0 * step[0], 0.0, 0.0, 0))
    assert ExecutorOverhead()(path, layers, (1, 2), 24, device) == {1: 70.0, 2: 170.0}
    assert asked == [((1, 2), device, torch.float16), (device, torch.float16)]


def test_both_ways_run_on_a_model(model, monkeypatch):
    path, layers, _ = model
    left_out = ExecutorOverhead()(path, layers, (1, 2), 16, CPU)
    assert left_out.keys() == {1, 2} and min(left_out.values()) > 0
    quantization = quantization_of(path)
    products = products_us(quantization, layers, (1, 2), CPU, torch.float32)
    whole = overhead.random_model(load_config(path), quantization, CPU, dtype=torch.float32)
    assert min(products.values()) > 0 and less_products(whole, dict.fromkeys(products, 0.0), 16)[1] > 0
