"""Latency profiles of a config alone, and joining them with losses measured elsewhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.executor.apply import apply_plan
from msq.planner.solve import find_plan
from msq.profiles import latency_job as job_module
from msq.profiles import shipped
from msq.profiles.combine import combine
from msq.profiles.errors import ProfileError
from msq.profiles.inventory import inventory, inventory_of_config
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.journal import JOURNAL_FILE
from msq.profiles.latency import Product, kernel_shapes, products
from msq.profiles.latency_job import LatencySettings, model_with_zeros, run_latency_profile
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import choose_device, load_model
from msq.profiles.overhead import static_step
from msq.profiles.schema import EMBED, EMBEDDING_ROLES, HEAD
from msq.profiles.tables import load_profile, save_profile

from .conftest import Interrupting

CPU = choose_device("cpu")
SPECS = (QuantizerSpec(Family.INT, 4), QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.TCQ, 2, 9))
SETTINGS = LatencySettings(specs=SPECS[:2], batch_sizes=(1, 2), context=8, device="cpu")


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory) -> Path:
    """A config without weights beside it."""
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_bytes((tiny_llama / "config.json").read_bytes())
    return path


@pytest.fixture(scope="module")
def latency(config, tmp_path_factory):
    return run_latency_profile(config, tmp_path_factory.mktemp("latency") / "p", SETTINGS)


def losses(model: Path, out: Path, **changes: object):
    settings = ProfileSettings(specs=SPECS, tokens=64, window=32, batch_sizes=())
    return run_profile(model, out, dataclasses.replace(settings, **changes), name="tiny")


def test_a_config_is_enough(config, latency):
    assert latency.manifest.loss is None and latency.errors is None and latency.manifest.model.name == "tiny"
    part = latency.manifest.latency
    assert part is not None and part.head_us is not None and part.context == 8
    assert set(part.overhead_us) == set(part.head_us) == {1, 2}
    assert HEAD in latency.layer_names and len(latency.latency) == 13 * 2 * 2
    assert len(kernel_shapes(inventory_of_config(config, head=True).layers)) == 13


def test_a_plan_needs_losses(latency):
    with pytest.raises(ProfileError, match=r"holds latencies and no losses.*msq combine"):
        find_plan(latency, parse_budgets(["memory=4bpw"]))


@pytest.mark.parametrize("rows", [0, 5, 28, 31])
def test_an_interrupted_job_goes_on(config, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(job_module, "Journal", Interrupting)
    Interrupting.left = rows
    with pytest.raises(KeyboardInterrupt):
        run_latency_profile(config, tmp_path / "p", SETTINGS)
    monkeypatch.undo()
    path = tmp_path / "p" / JOURNAL_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    assert len(lines) == rows
    profile = run_latency_profile(config, tmp_path / "p", SETTINGS)
    for (kind, *key), row in lines:
        if kind == "latency":
            kept = profile.latency.query("out_features == @key[0] and in_features == @key[1] and quantizer == @key[2]")
            assert (kept["latency_us"][kept["batch_size"] == key[4]] == round(row[0], 3)).all() and len(kept)
        else:
            part = profile.manifest.latency
            assert {"overhead": part.overhead_us, HEAD: part.head_us}[kind][key[0]] == row


def test_rows_of_another_device_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "Journal", Interrupting)
    Interrupting.left = 3
    with pytest.raises(KeyboardInterrupt):
        run_latency_profile(config, tmp_path / "p", SETTINGS)
    monkeypatch.undo()
    real = job_module.describe_device
    monkeypatch.setattr(job_module, "describe_device", lambda device: real(device, driver="another"))
    with pytest.raises(ProfileError, match=r"made with other settings \(device\)"):
        run_latency_profile(config, tmp_path / "p", SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"specs": ()}, "at least one quantizer"),
        ({"batch_sizes": ()}, "needs batch sizes"),
        ({"batch_sizes": (1, 1)}, "distinct batch sizes"),
        ({"context": 0}, "context of at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ProfileError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_the_model_with_zeros_is_the_stock_model_without_planned_layers(config):
    model = model_with_zeros(config, inventory_of_config(config, head=False), CPU, torch.float32)
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" in names and not any("_proj" in name for name in names)
    with torch.inference_mode():
        step, reset = static_step(model, 2, 8)
        assert step().shape == (2, 1, 2048)
        reset()
        assert bool(torch.isfinite(step()).all())


def test_the_timed_step_decodes_one_token_after_the_context(tiny_model):
    model = load_model(tiny_model, CPU)
    with torch.inference_mode():
        step, reset = static_step(model, 2, 8)
        first = step()
        reset()
        expected = model(torch.ones(2, 9, dtype=torch.int64)).logits[:, -1:]
        assert torch.allclose(step(), first) and torch.allclose(first, expected, atol=1e-4)


def test_the_reference_is_measured_on_a_gpu_only_where_no_kernel_runs(tiny_llama, monkeypatch):
    class Kernel:
        name = "tensor_core"

        def unsupported_reason(self, spec, out_features, in_features, batch_size, device):
            return None if out_features % 64 == 0 else "too narrow."

    monkeypatch.setitem(job_module.measure_latency.__globals__["IMPLEMENTATIONS"], "tensor_core", Kernel())
    shapes = kernel_shapes(inventory(tiny_llama).layers)
    found = products(shapes, SPECS[:1], (1,), torch.device("cuda"))
    assert len(found) == len(set(found)) == len({(s.out_features, s.in_features) for s in shapes})
    assert all(p.implementation == ("tensor_core" if p.out_features % 64 == 0 else "reference") for p in found)
    assert {p.implementation for p in found} == {"tensor_core", "reference"}
    assert isinstance(found[0], Product)


def test_joined_profiles_plan_for_the_other_machine_and_keep_their_bytes(tiny_llama, latency, tmp_path):
    profile = combine(losses(tiny_llama, tmp_path / "loss"), latency, tmp_path / "joined")
    assert load_profile(tmp_path / "joined").digest == profile.digest
    assert profile.manifest.device == latency.manifest.device and profile.loss.error == "measured"
    assert set(profile.latency["quantizer"]) == {"int-4", "nuq-2"} and "tcq-2-L9" in profile.labels
    slowest = profile.manifest.latency.overhead_us[1] + profile.latency["latency_us"].sum()
    plan = find_plan(profile, parse_budgets(["memory=3.5bpw", f"latency={slowest}us"])).plan
    assert plan.promised.latency_us[1] is not None
    assert apply_plan(tiny_llama, plan, tmp_path / "out").memory_bytes == plan.promised.memory_bytes


def test_a_head_that_is_not_planned_goes_to_the_overhead(tiny_llama, latency, tmp_path):
    profile = combine(losses(tiny_llama, tmp_path / "loss", head=False), latency, tmp_path / "joined")
    there, part = latency.manifest.latency, profile.manifest.latency
    assert HEAD not in profile.layer_names and HEAD not in set(profile.latency["pattern"])
    assert part.overhead_us == {batch: there.overhead_us[batch] + there.head_us[batch] for batch in (1, 2)}


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_joins_and_goes_to_the_overhead_where_it_is_not_planned(tiny_llama, latency, tmp_path, tied):
    model = shutil.copytree(EMBEDDED / "ref-tiny-3m" if tied else tiny_llama, tmp_path / "model")
    settings = dataclasses.replace(SETTINGS, specs=SPECS[1:2], embedding=True)
    measured = run_latency_profile(model / "config.json", tmp_path / "latency", settings)
    rows = measured.latency[measured.latency["pattern"].isin(EMBEDDING_ROLES)]
    assert len(rows) == 2 and (rows["latency_us"] > 0).all()
    loss = losses(model, tmp_path / "loss", embedding=True)
    profile = combine(loss, measured, tmp_path / "joined")
    assert profile.layer_names[0] == EMBED
    assert profile.manifest.latency.overhead_us == measured.manifest.latency.overhead_us
    plan = find_plan(profile, parse_budgets(["memory=4bpw", "latency=100s"]), quantizers="nuq-2").plan
    assert plan.promised.latency_us[2] == pytest.approx(
        float(rows[rows["batch_size"] == 2]["latency_us"].iloc[0])
        + _blocks_and_head_us(plan, profile, 2)
        + measured.manifest.latency.overhead_us[2]
    )
    without = losses(model, tmp_path / "without", head=False)
    plain, part = combine(without, measured, tmp_path / "plain").manifest.latency, measured.manifest.latency
    for batch in (1, 2):
        expected = part.overhead_us[batch] + part.head_us[batch] + part.embedding_us[batch]
        assert plain.overhead_us[batch] == pytest.approx(expected)
    if not tied:
        with pytest.raises(ProfileError, match=r"embed_tokens of tiny has no counterpart.*measured with --embedding"):
            combine(loss, latency, tmp_path / "x")


def _blocks_and_head_us(plan, profile, batch):
    """µs of every kernel of a plan but the embedding's."""
    rows = profile.latency.set_index(["pattern", "out_features", "in_features", "implementation", "batch_size"])
    shapes = profile.layers.set_index("layer")
    total = 0.0
    for entry in plan.layers:
        if entry.layer == EMBED or entry.layer != entry.pattern[0]:
            continue
        members = shapes.loc[list(entry.pattern)]
        key = ("+".join(members["role"]), members["out_features"].sum(), members["in_features"].iloc[0])
        total += rows.loc[(*key, entry.implementation, batch), "latency_us"]
    return total


def test_a_sensitivity_can_be_given_for_the_head(tiny_llama, latency, tmp_path):
    loss = losses(tiny_llama, tmp_path / "loss", head=False)
    profile = combine(loss, latency, tmp_path / "joined", sensitivities={HEAD: 0.25})
    assert profile.layer_names[-1] == HEAD and profile.sensitivities[-1] == 0.25
    assert profile.manifest.latency.overhead_us == latency.manifest.latency.overhead_us
    assert "assumed sensitivities: lm_head 0.25" in profile.manifest.source
    for label, size in zip(profile.labels, profile.size_matrix[-1], strict=True):
        assert size == profile.spec(label).size_bytes(2048, 64)
    with pytest.raises(
        ProfileError, match=r"sensitivity is given for model\.layers\.0\.mlp\.up_proj; expected a layer"
    ):
        combine(loss, latency, tmp_path / "x", sensitivities={"model.layers.0.mlp.up_proj": 1.0})


def test_losses_that_rest_on_gaussian_errors_take_the_palette_of_the_gpu_without_int(tiny_llama, latency, tmp_path):
    measured = losses(tiny_llama, tmp_path / "loss")
    part = measured.loss.model_copy(update={"error": "gaussian"})
    quantizers = measured.quantizers.assign(gaussian_error=0.5)
    loss = save_profile(
        tmp_path / "gaussian", measured.manifest.model_copy(update={"loss": part}), measured.layers, quantizers
    )
    profile = combine(loss, latency, tmp_path / "joined")
    rotated = latency.quantizers[latency.quantizers["family"] != "int"]
    assert list(profile.labels) == rotated["quantizer"].tolist() and len(rotated) == len(latency.labels) - 1
    assert set(profile.latency["quantizer"]) == set(profile.labels)
    assert np.array_equal(profile.error_matrix, np.tile(rotated["gaussian_error"], (len(profile.layers), 1)))
    for layer, sizes in zip(profile.layers.itertuples(), profile.size_matrix, strict=True):
        for label, size in zip(profile.labels, sizes, strict=True):
            assert size == profile.spec(label).size_bytes(layer.out_features, layer.in_features)


def test_profiles_that_do_not_belong_together_are_refused(tiny_llama, latency, tmp_path):
    loss = losses(tiny_llama, tmp_path / "loss")
    with pytest.raises(ProfileError, match="has no latencies to join"):
        combine(loss, loss, tmp_path / "x")
    with pytest.raises(ProfileError, match="holds latencies and no losses"):
        combine(latency, latency, tmp_path / "x")
    wide = save_profile(
        tmp_path / "wide",
        loss.manifest,
        loss.layers.assign(out_features=loss.layers["out_features"] * 2),
        loss.quantizers,
        errors=loss.errors,
    )
    with pytest.raises(ProfileError, match="out_features in the loss profile and"):
        combine(wide, latency, tmp_path / "x")
    other = save_profile(
        tmp_path / "other", loss.manifest, loss.layers, loss.quantizers[loss.quantizers["family"] == "tcq"],
        errors=loss.errors[loss.errors["quantizer"].str.startswith("tcq")],
    )  # fmt: skip
    with pytest.raises(ProfileError, match="no quantizer in common"):
        combine(other, latency, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_shipped_profile_goes_by_its_name(latency, tmp_path, monkeypatch):
    tables = (latency.layers, latency.quantizers)
    saved = save_profile(tmp_path / "gpu" / "tiny", latency.manifest, *tables, latency=latency.latency)
    monkeypatch.setattr(shipped, "_PROFILES", tmp_path)
    assert shipped.profile_names() == ("gpu/tiny",)
    assert load_profile("gpu/tiny").digest == saved.digest
    with pytest.raises(ProfileError, match=r"expected a profile directory at gpu/tinny; .*shipped: gpu/tiny"):
        load_profile("gpu/tinny")


def test_tables_mark_throttled_rows(latency, tmp_path):
    marked = latency.latency.assign(throttled=[1, *[0] * (len(latency.latency) - 1)])
    saved = save_profile(tmp_path / "p", latency.manifest, latency.layers, latency.quantizers, latency=marked)
    pd.testing.assert_series_equal(saved.latency["throttled"], marked["throttled"])
