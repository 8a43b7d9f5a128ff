"""`msq apply`: from a plan to a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    CalibrationSource,
    CalibrationText,
    Device,
    EngineName,
    Json,
    Seed,
    Tokens,
    Window,
    Workers,
    calibration_tokens,
    named_path,
    note,
    print_json,
    refuse_given,
)


def apply(
    command: typer.Context,
    model: Annotated[str, typer.Argument(help="The model that was profiled.")],
    plan: Annotated[Path, typer.Option("--plan", help="plan.yaml of `msq plan`.", parser=named_path)],
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint; must not exist.", parser=named_path)],
    hessian: Annotated[
        bool, typer.Option("--hessian", help="Error feedback under Hessians of the calibration tokens.")
    ] = False,
    tune: Annotated[
        str,
        typer.Option(
            help="What isn't codes, fitted after encoding: layers (least squares of scales and codebooks), blocks "
            "(that and norms, by gradient descent against the original's outputs on the calibration tokens), model "
            "(after the blocks all together, against its distribution; both models are in memory) or none."
        ),
    ] = "none",
    text: CalibrationText = None,
    calibration: CalibrationSource = "random",
    tokens: Tokens = 65536,
    window: Window = 512,
    seed: Seed = 0,
    device: Device = "cpu",
    engine: EngineName = "local",
    workers: Workers = None,
    json_output: Json = False,
) -> None:
    """Quantize a model as planned and save the checkpoint; an interrupted command goes on when it is repeated."""
    from .planner.errors import PlanError
    from .planner.executor.apply import apply_plan, work_directory
    from .planner.executor.manifest import TuneMethod
    from .planner.executor.tuning import Tuning, parse_tune
    from .planner.plan import load_plan
    from .profiles.engines import Engine
    from .profiles.model_source import resolve_model

    method = parse_tune(tune)
    tuned_on_tokens = method in (TuneMethod.BLOCKS, TuneMethod.MODEL)
    needed = hessian or tuned_on_tokens
    if not needed:
        names = ("text", "calibration", "tokens", "window", "seed")
        why = "for Hessians and tuning alone; add --hessian or --tune blocks, or leave it out."
        refuse_given(command, names, why, PlanError)
    promised = load_plan(plan)
    directory = resolve_model(model)
    chosen = {"tokens": tokens, "window": window, "seed": seed}
    calibrated = calibration_tokens(directory, text, calibration, device=device, **chosen) if needed else None
    tuning = None if method is None else Tuning(method, calibrated if tuned_on_tokens else None)
    who = Engine(engine, workers)
    try:
        applied = apply_plan(
            directory,
            promised,
            out,
            device=device,
            hessian=calibrated if hessian else None,
            tuning=tuning,
            engine=who,
        )
    except KeyboardInterrupt:
        note(f"\nmsq: interrupted; finished layers are in {work_directory(out)}, the same command goes on from them.")
        sys.exit(130)
    facts = {
        "hessian": calibrated.described if calibrated and hessian else None,
        "tuning": method,
        "calibration": calibrated and calibrated.described,
        "checkpoint": str(out),
        "memory_bytes": applied.memory_bytes,
        "promised_bytes": promised.promised.memory_bytes,
        "layers": len(applied.errors),
    }
    if json_output:
        print_json(facts)
    else:
        print(f"{facts['layers']} layers in {applied.memory_bytes} bytes, as promised; checkpoint in {out}")
