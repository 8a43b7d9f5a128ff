import io
import math

import pytest
import torch
from msq.experiments.demo import help_text_windows
from msq.experiments.evaluate import evaluate
from msq.experiments.plan_map import plan_map
from msq.planner.plan import Plan
from msq.profiles.errors import ProfileError
from msq.profiles.model_source import resolve_model
from msq.profiles.models import choose_device, load_model, load_tokenizer
from rich.console import Console


def test_perplexity_and_kl_are_as_defined(tiny_model):
    model = load_model(tiny_model, choose_device("cpu"))
    other = load_model(tiny_model, choose_device("cpu"))
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.2)
    windows = torch.randint(2048, (3, 16), generator=torch.Generator().manual_seed(0))
    found = evaluate(other, windows, reference=model)
    with torch.no_grad():
        log_q = other(windows).logits.double().log_softmax(-1)
        log_p = model(windows).logits.double().log_softmax(-1)
    picked = log_q[:, :-1].gather(2, windows[:, 1:, None])
    assert found.perplexity == pytest.approx(math.exp(-float(picked.mean())), rel=1e-5)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert found.tokens == 48


def test_windows_of_one_token_are_refused(tiny_llama):
    with pytest.raises(ProfileError, match="at least 2 tokens"):
        evaluate(load_model(tiny_llama, choose_device("cpu")), torch.zeros(2, 1, dtype=torch.int64))


def test_the_embedded_model_knows_language():
    directory = resolve_model("ref-tiny-3m")
    windows = help_text_windows(load_tokenizer(directory), 256, 8)
    assert evaluate(load_model(directory, choose_device("cpu")), windows).perplexity < 60


def test_the_map_fits_a_terminal_and_marks_fusion():
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{b}.x.{role}" for b in range(2) for role in roles]
    layers = [
        {"layer": n, "quantizer": "half-tcq-2.75-L12", "implementation": "reference", "pattern": [n]} for n in names
    ]
    layers[0]["pattern"] = layers[1]["pattern"] = names[:2]
    plan = Plan.model_validate(
        {
            "msq_version": "0",
            "model": {"name": "m", "architecture": "LlamaForCausalLM", "blocks": 2},
            "profile": {"digest": "0" * 64, "device": "d"},
            "budgets": [{"text": "memory=3bpw", "resource": "memory", "cap": 1.0}],
            "promised": {"loss": 0.1, "memory_bytes": 1, "bits_per_weight": 3.0},
            "solver": {"name": "s", "status": "optimal", "objective": 0.1, "lower_bound": None, "gap": None,
                       "shadow_prices": None, "seconds": 0.1, "columns": 1},
            "quantizers": {"half-tcq-2.75-L12": {"family": "half_tcq", "bits": 2.75, "state_bits": 12}},
            "layers": layers,
        }
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan_map(plan))
    lines = console.export_text().splitlines()
    rows = [line for line in lines if "half 2.75" in line]
    assert len(rows) == 2 and all(row.count("half 2.75") == 7 for row in rows)
    assert rows[0].count("+half") == 1 and rows[1].count("+half") == 0
