"""Checkpoints held against their promises: kept, broken and repaired, refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from msq import cli
from msq.experiments import promise_check
from msq.experiments.evaluate import evaluate
from msq.experiments.promise_check import PromiseCheck, check_profile, stored_bytes
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.errors import InfeasibleBudgetError, PlanError
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.load import load_checkpoint
from msq.planner.plan import load_plan, save_plan
from msq.planner.solve import find_plan
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import choose_device, load_model, random_windows
from msq.profiles.schema import LossMethod
from msq.profiles.tables import load_profile, save_profile

MODEL = EMBEDDED / "ref-tiny-3m"
SPECS = tuple(QuantizerSpec(Family.NUQ, bits) for bits in (2, 3, 4, 5))
BUDGET = "memory=3.2bpw"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A profile whose sensitivities are right."""
    out = tmp_path_factory.mktemp("profiles") / "honest"
    settings = ProfileSettings(specs=SPECS, method=LossMethod.FISHER, tokens=2048, window=128, batch_sizes=())
    return run_profile(MODEL, out, settings, name="ref-tiny-3m")


@pytest.fixture(scope="module")
def misled(honest, tmp_path_factory):
    """The same with sensitivities turned upside down."""
    out = tmp_path_factory.mktemp("profiles") / "misled"
    layers = honest.layers.assign(sensitivity=1 / honest.layers["sensitivity"])
    return save_profile(out, honest.manifest, layers, honest.quantizers, errors=honest.errors)


@pytest.fixture
def checker(honest, tmp_path):
    def build(plan, out: Path):
        return apply_plan(MODEL, plan, out)

    return PromiseCheck(
        model_dir=MODEL,
        reference=load_model(MODEL, choose_device("cpu")),
        profile=honest,
        windows=random_windows(2048, 4, 128, 7),
        build=build,
        scratch=tmp_path,
    )


def test_a_good_plan_keeps_its_promises(checker, tmp_path):
    plan = find_plan(checker.profile, parse_budgets([BUDGET])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    report = checker.check(plan, tmp_path / "checkpoint")
    assert report.broken == () and report.uniform == "nuq-3" and report.kl < report.uniform_kl
    assert report.promised_bytes == report.stored_bytes == plan.promised.memory_bytes
    assert report.promised_loss == plan.promised.loss and report.steps_us == {}
    found = evaluate(load_checkpoint(tmp_path / "checkpoint"), checker.windows, reference=checker.reference)
    assert (report.kl, report.perplexity) == (found.kl, found.perplexity)


def test_a_plan_from_wrong_sensitivities_is_repaired(checker, misled, tmp_path):
    checker = dataclasses.replace(checker, profile=misled)
    plan = find_plan(misled, parse_budgets([BUDGET])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    report = checker.check(plan, tmp_path / "checkpoint")
    assert len(report.broken) == 1 and "that of nuq-3 for every layer" in report.broken[0]
    repaired, after = checker.repair(plan, tmp_path / "checkpoint", tmp_path / "out", tmp_path / "out.profile")
    assert after.broken == () and after.kl < report.kl and after.kl <= after.uniform_kl
    assert load_plan(tmp_path / "out" / "plan.yaml") == repaired
    corrected = load_profile(tmp_path / "out.profile")
    assert corrected.loss.method is LossMethod.DIRECT and corrected.digest == repaired.profile.digest
    cap = parse_budgets([BUDGET])[0].resolve(int(misled.layer_weights.sum())).cap
    assert repaired.promised.memory_bytes <= cap
    with pytest.raises(PlanError, match="exists already"):
        checker.repair(plan, tmp_path / "checkpoint", tmp_path / "out", tmp_path / "other")


def test_what_repair_cannot_mend_is_refused(checker, misled, tmp_path, monkeypatch):
    checker = dataclasses.replace(checker, profile=misled)
    monkeypatch.setattr(PromiseCheck, "corrected", lambda self, *_: self)
    plan = find_plan(misled, parse_budgets([BUDGET])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    with pytest.raises(PlanError, match=r"is refused: after 2 repairs its KL is .* that of nuq-3"):
        checker.repair(plan, tmp_path / "checkpoint", tmp_path / "out", tmp_path / "out.profile")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.profile").exists()


def test_slow_steps_break_a_promise_and_correct_the_overhead(checker, tmp_path):
    settings = ProfileSettings(
        specs=SPECS, method=LossMethod.FISHER, tokens=512, window=128, batch_sizes=(1,), context=8
    )
    profile = run_profile(MODEL, tmp_path / "timed", settings, name="ref-tiny-3m")
    profile = dataclasses.replace(profile, latency=profile.latency.assign(latency_us=100.0))
    part = profile.manifest.latency.model_copy(update={"overhead_us": {1: 1000.0}})
    profile = dataclasses.replace(profile, manifest=profile.manifest.model_copy(update={"latency": part}))
    plan = find_plan(profile, parse_budgets([BUDGET, "latency=4000us"])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    kernels = len({entry.pattern for entry in plan.layers})
    taken = {1: plan.promised.latency_us[1]}
    checker = dataclasses.replace(checker, profile=profile, steps=lambda model, batches: taken, context=8)
    assert checker.check(plan, tmp_path / "checkpoint").broken == ()
    taken = {1: plan.promised.latency_us[1] * 1.06}
    report = checker.check(plan, tmp_path / "checkpoint")
    assert report.broken == (
        f"a step at batch 1 was promised in {plan.promised.latency_us[1]:.1f} us and takes {taken[1]:.1f}",
    )
    corrected = checker.corrected(plan, tmp_path / "checkpoint", report, tmp_path / "corrected").profile
    assert corrected.manifest.latency.step_overhead_us[1] == pytest.approx(taken[1] - 100 * kernels)
    assert (corrected.sensitivities == profile.sensitivities).all()


def test_bytes_are_counted_in_the_files(checker, tmp_path):
    plan = find_plan(checker.profile, parse_budgets([BUDGET])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    names = {entry.layer for entry in plan.layers}
    assert stored_bytes(tmp_path / "checkpoint", names) == plan.promised.memory_bytes
    promised = plan.promised.model_copy(update={"memory_bytes": plan.promised.memory_bytes - 2})
    report = checker.check(plan.model_copy(update={"promised": promised}), tmp_path / "checkpoint")
    assert report.broken[0] == f"{promised.memory_bytes} bytes were promised, {promised.memory_bytes + 2} are stored"


def test_where_no_uniform_scheme_fits_there_is_nothing_to_compare_with(checker, tmp_path, monkeypatch):
    plan = find_plan(checker.profile, parse_budgets([BUDGET])).plan
    apply_plan(MODEL, plan, tmp_path / "checkpoint")
    real = promise_check.find_plan

    def find(*arguments, solver=None, **options):
        if solver == "uniform":
            raise InfeasibleBudgetError("no uniform scheme fits.")
        return real(*arguments, solver=solver, **options)

    monkeypatch.setattr(promise_check, "find_plan", find)
    report = checker.check(plan, tmp_path / "checkpoint")
    assert (report.uniform, report.uniform_kl, report.broken) == (None, None, ()) and report.kl > 0


def test_another_profile_is_refused(honest, tmp_path):
    plan = find_plan(honest, parse_budgets([BUDGET])).plan
    kept = honest.layers[honest.layers["block"] < 3]
    model = honest.manifest.model.model_copy(update={"blocks": 3})
    errors = honest.errors[honest.errors["layer"].isin(kept["layer"])]
    manifest = honest.manifest.model_copy(update={"model": model})
    save_profile(tmp_path / "short", manifest, kept, honest.quantizers, errors=errors)
    with pytest.raises(PlanError, match="is not the profile of the plan's model"):
        check_profile(tmp_path / "short", plan)


def run(*arguments: str) -> int:
    """The exit code of a command."""
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["msq", *arguments]), pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_command_checks_and_repairs(honest, misled, tmp_path, capsys):
    for name, profile, code in (("good", honest, 0), ("bad", misled, 2)):
        save_profile(
            tmp_path / f"{name}.profile", profile.manifest, profile.layers, profile.quantizers, errors=profile.errors
        )
        plan = find_plan(profile, parse_budgets([BUDGET])).plan
        save_plan(plan, tmp_path / "plan.yaml")
        apply_plan(MODEL, plan, tmp_path / name)
        options = ["--model", "ref-tiny-3m", "--profile", str(tmp_path / f"{name}.profile"), "--windows", "4"]
        options += ["--window", "128"]
        assert run("check", str(tmp_path / name), *options) == code
    captured = capsys.readouterr()
    assert "best uniform scheme within the budgets: nuq-3" in captured.out
    assert "breaks its promises: its KL is" in captured.err and "--repair OUT" in captured.err
    assert run("check", str(tmp_path / "bad"), *options, "--repair", str(tmp_path / "mended")) == 0
    assert f"repaired in {tmp_path / 'mended'}" in capsys.readouterr().out
    assert run("check", str(tmp_path / "no checkpoint"), *options, "--repair", str(tmp_path / "mended")) == 2
    assert "mended exists already" in capsys.readouterr().err
    assert run("check", str(tmp_path / "bad"), *options, "--hessian") == 2
    assert "the checkpoint was quantized data-free, and a --hessian" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".check")]
    assert isinstance(load_checkpoint(tmp_path / "mended"), torch.nn.Module)
    assert promise_check.ROUNDS == 2
