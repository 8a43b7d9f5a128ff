"""Fisher and direct sensitivities against what they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msq.kernels.quantize import dequantize, normalized_error, quantize
from msq.kernels.rotation import input_seed
from msq.kernels.specs import Family, QuantizerSpec
from msq.profiles.blockwise import token_kl
from msq.profiles.fisher import measure_fisher
from msq.profiles.inventory import inventory
from msq.profiles.job import ProfileSettings, middle_quantizer, run_profile
from msq.profiles.journal import Journal
from msq.profiles.models import choose_device, load_model, random_windows
from msq.profiles.schema import LossMethod
from msq.profiles.sensitivity import measure_direct, measure_sensitivities
from scipy.stats import spearmanr

SPECS = (QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.NUQ, 3), QuantizerSpec(Family.NUQ, 4))
TOKENS = random_windows(2048, 32, 32, seed=0)


def test_fisher_is_the_limit_of_the_kl_under_small_noise(tiny_llama, tmp_path):
    model, layers = load_model(tiny_llama, choose_device("cpu")), inventory(tiny_llama).layers
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with Journal(tmp_path / "a", {}) as journal:
        fisher = measure_fisher(model, layers, TOKENS, seed=0, windows_per_group=2, journal=journal)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    with Journal(tmp_path / "b", {}) as journal:
        noise = measure_sensitivities(model, layers, TOKENS, noise=0.02, seed=0, windows_per_group=2, journal=journal)
    ratios = torch.tensor([fisher[layer.name].value / noise[layer.name].value for layer in layers])
    assert 0.85 < float(ratios.mean()) < 1.15 and bool(((ratios > 0.6) & (ratios < 1.6)).all())
    values = [[found[layer.name].value for layer in layers] for found in (fisher, noise)]
    assert spearmanr(*values).statistic > 0.95
    assert all(0 < found.standard_error < 0.5 * found.value for found in fisher.values())


def test_direct_is_the_kl_of_a_quantized_layer_over_its_error(tiny_model, tmp_path):
    model, layers = load_model(tiny_model, choose_device("cpu")), inventory(tiny_model).layers
    tokens = TOKENS[:4]
    with Journal(tmp_path / "j", {}) as journal:
        found = measure_direct(model, layers, tokens, spec=SPECS[0], seed=5, windows_per_group=2, journal=journal)
    with torch.no_grad():
        original = model(tokens).logits
        for layer in (layers[1], layers[6], layers[10]):
            weight = model.get_parameter(f"{layer.name}.weight")
            quantized = quantize(weight, SPECS[0], rotation_seed=input_seed(layer.fusion_group, 5))
            kept, error = weight.data, normalized_error(weight, quantized)
            weight.data = dequantize(quantized)
            kl = float(token_kl(original, model(tokens).logits).mean())
            weight.data = kept
            assert found[layer.name].value == pytest.approx(kl / error, rel=1e-3)


@pytest.mark.parametrize("method", [LossMethod.FISHER, LossMethod.DIRECT])
@pytest.mark.parametrize("with_text", [False, True])
def test_profiles_by_every_method_are_whole_and_say_how(tiny_llama, tmp_path, method, with_text):
    text = tmp_path / "text.txt"
    text.write_text("A short text about nothing, told again and again. " * 60)
    settings = ProfileSettings(
        specs=SPECS, method=method, text=text if with_text else None, tokens=96, window=32, batch_sizes=()
    )
    profile = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    loss = profile.manifest.loss
    assert loss.method is method and loss.noise is None and loss.text == ("text.txt" if with_text else None)
    assert loss.quantizer == ("nuq-3" if method is LossMethod.DIRECT else None)
    assert (profile.layers["sensitivity"] > 0).all() and (profile.layers["standard_error"] > 0).all()
    other = dataclasses.replace(settings, text=None if with_text else text)
    again = run_profile(tiny_llama, tmp_path / "q", other, name="tiny")
    assert not again.layers["sensitivity"].equals(profile.layers["sensitivity"])


def test_the_quantizer_of_direct_sensitivities_is_the_middle_one():
    assert middle_quantizer(SPECS[::-1]) == SPECS[1]
    assert middle_quantizer(SPECS[:1]) == SPECS[0]


@pytest.mark.parametrize("method", [LossMethod.FISHER, LossMethod.DIRECT])
def test_an_interrupted_job_goes_on(tiny_llama, tmp_path, monkeypatch, method):
    settings = ProfileSettings(specs=SPECS, method=method, tokens=128, window=32, windows_per_group=1, batch_sizes=())
    undisturbed = run_profile(tiny_llama, tmp_path / "whole", settings, name="tiny")
    rows, add = 20, Journal.add

    def interrupted(journal, key, row):
        if len(journal._rows) == rows:
            raise KeyboardInterrupt
        add(journal, key, row)

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    monkeypatch.undo()
    found = run_profile(tiny_llama, tmp_path / "p", settings, name="tiny")
    assert found.layers.equals(undisturbed.layers)
