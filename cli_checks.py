"""`msq check`: whether a checkpoint keeps its plan's promises."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    CalibrationSource,
    CalibrationText,
    Device,
    Json,
    ProfileDir,
    Seed,
    Tokens,
    Window,
    calibration_tokens,
    named_path,
    note,
    print_json,
    refuse_given,
)

if TYPE_CHECKING:
    from .experiments.promise_check import PromiseReport, Steps
    from .planner.executor.manifest import CheckpointManifest
    from .profiles.calibration import Calibration
    from .profiles.tables import Profile


def check(
    command: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of `msq apply`.", parser=named_path)],
    model: Annotated[str, typer.Option(help="The model that was quantized.")],
    profile: ProfileDir,
    on: Annotated[
        Path | None, typer.Option(help="Text to measure on, UTF-8; default: random tokens.", parser=named_path)
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 32,
    window: Window = 512,
    repair: Annotated[
        Path | None,
        typer.Option(
            help="Where a promise is broken, solve again with measured values and build here; must be new.",
            parser=named_path,
        ),
    ] = None,
    hessian: Annotated[
        bool, typer.Option("--hessian", help="Build what it is compared with as `apply --hessian` does.")
    ] = False,
    text: CalibrationText = None,
    calibration: CalibrationSource = "random",
    tokens: Tokens = 65536,
    seed: Seed = 0,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Hold a checkpoint against its promises and the best uniform scheme of its budgets; exit 2 if one is broken."""
    from .experiments.evaluate import load_any
    from .experiments.promise_check import PromiseCheck, check_places, check_profile
    from .planner.errors import PlanError
    from .planner.executor.apply import apply_plan
    from .planner.executor.manifest import PLAN_FILE, read_manifest
    from .planner.executor.tuning import Tuning
    from .planner.plan import load_plan
    from .profiles.model_source import resolve_model
    from .profiles.models import load_config, random_windows, token_windows

    mended = None if repair is None else (repair, repair.with_name(f"{repair.name}.profile"))
    if mended is not None:
        check_places(*mended)
    manifest = read_manifest(checkpoint)
    tuned = None if manifest.tuning is None else manifest.tuning.tokens
    if not hessian and tuned is None:
        why = "for Hessians and tuning alone; add --hessian, or leave it out (--on is the text to measure on)."
        refuse_given(command, ("text", "calibration", "tokens"), why, PlanError)
    plan, directory = load_plan(checkpoint / PLAN_FILE), resolve_model(model)
    measured = check_profile(profile, plan)
    calibrated = None
    if hessian or tuned is not None:
        chosen = {"tokens": tokens, "window": window, "seed": seed}
        calibrated = calibration_tokens(directory, text, calibration, device=device, **chosen)
    feedback = calibrated if hessian else None
    _check_calibration(manifest, calibrated, feedback)
    tuning = None
    if manifest.tuning is not None:
        tuning = Tuning(manifest.tuning.method, None if tuned is None else calibrated)
    with tempfile.TemporaryDirectory(dir=checkpoint.absolute().parent, prefix=".check-") as scratch:
        checker = PromiseCheck(
            model_dir=directory,
            reference=load_any(directory, device),
            profile=measured,
            windows=random_windows(load_config(directory).vocab_size, windows, window, seed + _FRESH)
            if on is None
            else token_windows(directory, on, window, windows),
            build=lambda made, out: apply_plan(directory, made, out, device=device, hessian=feedback, tuning=tuning),
            scratch=Path(scratch),
            device=device,
            steps=_steps(measured, device),
            context=_context(measured),
        )
        report = checker.check(plan, checkpoint)
        facts = _facts(report)
        if report.broken and mended is not None:
            out, profile_out = mended
            _, report = checker.repair(plan, checkpoint, out, profile_out)
            facts |= {"repaired": _facts(report) | {"checkpoint": str(out), "profile": str(profile_out)}}
    if json_output:
        print_json(facts)
    else:
        _print_facts(facts)
    if report.broken:
        raise PlanError(f"{checkpoint} breaks its promises: {'; '.join(report.broken)}; --repair OUT solves again.")


def _steps(profile: Profile, device: str) -> Steps | None:
    """Measures decoding steps where they were promised: on the GPU that the profile was measured on."""
    from .planner.executor.benchmark import measure_step
    from .profiles.device import describe_device
    from .profiles.models import choose_device

    if profile.latency is None:
        return None
    here, there = describe_device(choose_device(device)), profile.manifest.device
    if here.kind != "cuda" or here.name != there.name:
        note(f"msq: only a GPU's latencies are checked, on that GPU; these are of {there.name}, run on a {here.kind}.")
        return None
    context = _context(profile)
    return lambda model, batches: {batch: measure_step(model, batch, context).step_us for batch in batches}


def _context(profile: Profile) -> int:
    """Tokens in the cache of the steps that the profile promises."""
    part = profile.manifest.latency
    return 256 if part is None or part.context is None else part.context


_FRESH = 1_000_003
"""Added to the seed of random tokens, so that none is measured on which the profile saw."""


def _check_calibration(
    manifest: CheckpointManifest, calibrated: Calibration | None, feedback: Calibration | None
) -> None:
    """What the checkpoint is compared with must be quantized and tuned as it was."""
    from .planner.errors import PlanError

    tuned = None if manifest.tuning is None else manifest.tuning.tokens
    if tuned is not None and calibrated is not None and tuned.digest != calibrated.digest:
        raise PlanError("the checkpoint was tuned on other tokens than those given; repeat those of its `msq apply`.")
    digest = None if manifest.hessian is None else manifest.hessian.digest
    if digest != (None if feedback is None else feedback.digest):
        built = "data-free" if digest is None else "under Hessians"
        given = "no --hessian" if feedback is None else "a --hessian of other tokens"
        wanted = "leave out --hessian" if digest is None else "give the options of its `msq apply`"
        raise PlanError(f"the checkpoint was quantized {built}, and {given} is given; {wanted}.")


def _facts(report: PromiseReport) -> dict[str, Any]:
    steps = {
        str(batch): {"promised_us": promised, "measured_us": found}
        for batch, (promised, found) in report.steps_us.items()
    }
    return asdict(report) | {"steps_us": steps, "broken": list(report.broken), "kept": not report.broken}


def _print_facts(facts: dict[str, Any]) -> None:
    print(f"bytes promised {facts['promised_bytes']}, stored {facts['stored_bytes']}")
    print(f"loss promised {facts['promised_loss']:.6g}, KL measured {facts['kl']:.6g}")
    print(f"perplexity {facts['perplexity']:.4f}")
    for batch, step in facts["steps_us"].items():
        print(f"step at batch {batch}: promised {step['promised_us']:.1f} us, measured {step['measured_us']:.1f} us")
    if facts["uniform"] is not None:
        print(f"best uniform scheme within the budgets: {facts['uniform']}, KL {facts['uniform_kl']:.6g}")
    if "repaired" in facts:
        print(f"repaired in {facts['repaired']['checkpoint']}, its profile in {facts['repaired']['profile']}:")
        _print_facts(facts["repaired"])
