"""The command line, `msq COMMAND`: profile, plan, apply and what belongs to them; `msq --help` lists all.

Each command only reads its arguments, calls one function of the package, and prints. Heavy imports are inside the
commands, so that `msq plan` starts without torch. Exit codes: 0 success, 2 bad usage or input, 3 a budget that can't be
met. With `--json`, stdout holds one JSON object and nothing else; progress and messages go to stderr.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import __version__, cli_apply, cli_checks, cli_planning, cli_profiles, cli_running
from .cli_options import (
    CalibrationSource,
    CalibrationText,
    Device,
    EngineName,
    Json,
    Quantizers,
    Seed,
    Window,
    Workers,
    named_path,
    note,
    print_json,
    refuse_given,
)

BAD_INPUT, INFEASIBLE = 2, 3

_OF_LOSSES = ("loss", "text", "calibration", "tokens", "window", "noise", "error", "head", "seed", "engine", "workers")
"""Options of `msq profile` that mean nothing to `--latency-only`."""

app = typer.Typer(
    name="msq",
    help="Plan, build and run mixed-scheme quantized language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the `msq` command: known errors become one sentence and an exit code."""
    # Before torch loads its threads: let them sleep at barriers. Spinning makes the many small steps of the trellis
    # search 20 times slower as soon as another process wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .experiments.errors import ChartError
    from .kernels.errors import KernelError, QuantizerError
    from .planner.errors import InfeasibleBudgetError, PlanError
    from .planner.executor.errors import CheckpointError
    from .profiles.errors import ProfileError
    from .solvers.errors import SolverError

    try:
        app()
    except InfeasibleBudgetError as cause:
        _fail(cause, INFEASIBLE)
    except (QuantizerError, KernelError, SolverError, ProfileError, PlanError, CheckpointError, ChartError) as cause:
        _fail(cause, BAD_INPUT)
    except (OSError, MemoryError) as cause:  # a full disk, a path too long: nothing that a command foresees everywhere
        _fail(cause, BAD_INPUT)


def _fail(cause: Exception, code: int) -> None:
    print(f"msq: {' '.join(str(cause).split())}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def profile(
    command: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Model directory, embedded model (ref-tiny-3m) or hub name; with --latency-only a config.json or "
            "shipped shapes (llama-3.1-8b) will do."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the profile; an interrupted job goes on from it.", parser=named_path)
    ],
    device: Device = "cpu",
    quantizers: Quantizers = None,
    state_bits: Annotated[
        int, typer.Option(help="Trellis state length L of tcq and half_tcq; 12 encodes faster.")
    ] = 16,
    batch_sizes: Annotated[
        str, typer.Option(help='Batch sizes for latency, e.g. "1,8"; "none" leaves latency out.')
    ] = "1",
    loss: Annotated[
        str, typer.Option(help="data-free or calibration (KL under noise), fisher (one backward pass), direct (swaps).")
    ] = "data-free",
    text: CalibrationText = None,
    calibration: CalibrationSource = "random",
    tokens: Annotated[int, typer.Option(help="Tokens that the sensitivities see.")] = 16384,
    window: Window = 256,
    noise: Annotated[float, typer.Option(help="Relative size of the perturbation of a weight.")] = 0.1,
    error: Annotated[
        str, typer.Option(help="weights (data-free) or proxy (under Hessians, to be built with `apply --hessian`).")
    ] = "weights",
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Plan lm_head; default: where its weight isn't the embedding's."),
    ] = None,
    embedding: Annotated[
        bool,
        typer.Option(
            "--embedding/--no-embedding",
            help="Plan the input embedding; where lm_head is tied to it, the two as one layer.",
        ),
    ] = False,
    latency_only: Annotated[
        bool, typer.Option("--latency-only", help="Measure kernels and overhead alone; no weights are needed.")
    ] = False,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in the cache for the overhead.")] = None,
    seed: Seed = 0,
    engine: EngineName = "local",
    workers: Workers = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what is in --out and begin anew.")] = False,
    json_output: Json = False,
) -> None:
    """Measure what every quantizer costs every layer: loss, bytes, microseconds."""
    from .cli_profiles import finish_profile, measure_latencies
    from .kernels.rotation import rotation_note
    from .planner.executor.overhead import ExecutorOverhead
    from .profiles.calibration import parse_source
    from .profiles.engines import Engine
    from .profiles.errors import ProfileError
    from .profiles.job import ProfileSettings, run_profile
    from .profiles.model_source import resolve_model
    from .profiles.options import parse_batch_sizes, parse_loss_method, parse_palette

    if latency_only:
        refuse_given(
            command, _OF_LOSSES, "--latency-only measures no losses; leave one or the other out.", ProfileError
        )
    if loss not in ("data-free", "calibration"):
        refuse_given(command, ["noise"], f"--loss {loss} perturbs nothing; leave one or the other out.", ProfileError)
    specs, batches = parse_palette(quantizers, state_bits), parse_batch_sizes(batch_sizes)
    if not batches:
        refuse_given(command, ["context"], "--batch-sizes none times no step; leave out one of them.", ProfileError)
    if latency_only:
        measure_latencies(
            model, out, specs, batches, context, device, embedding=embedding, restart=restart, json_output=json_output
        )
        return
    settings = ProfileSettings(
        specs=specs,
        method=parse_loss_method(loss),
        text=text,
        source=parse_source(calibration, text),
        batch_sizes=batches,
        tokens=tokens,
        window=window,
        noise=noise,
        seed=seed,
        device=device,
        error=error,
        head=head,
        embedding=embedding,
    )
    if context is not None:
        settings = replace(settings, context=context)
    who, overhead = Engine(engine, workers), ExecutorOverhead()
    done = finish_profile(
        lambda: run_profile(
            resolve_model(model), out, settings, name=model, overhead=overhead, restart=restart, engine=who
        ),
        out,
    )
    for remark in filter(None, map(rotation_note, sorted(set(done.layers["in_features"])))):
        note(f"msq: {remark}.")
    facts = {"profile": str(out), "digest": done.digest, "layers": len(done.layers), "quantizers": len(done.quantizers)}
    if json_output:
        print_json(facts)
    else:
        print(f"profile of {facts['layers']} layers x {facts['quantizers']} quantizers in {out}")


app.command()(cli_profiles.combine)
app.command()(cli_planning.plan)
app.command()(cli_planning.frontier)
app.command()(cli_planning.compare)


app.command()(cli_apply.apply)
app.command()(cli_checks.check)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model or checkpoint.")],
    text: Annotated[Path, typer.Option(help="Text to measure on, UTF-8.", parser=named_path)],
    reference: Annotated[str | None, typer.Option(help="Model to measure the KL divergence to.")] = None,
    window: Window = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Read at most so many windows; default: all.")] = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Perplexity on a text, and KL divergence to a reference model."""
    from .experiments.evaluate import evaluate as run
    from .experiments.evaluate import load_any
    from .profiles.model_source import resolve_model
    from .profiles.models import token_windows

    directory = resolve_model(model)
    tokens = token_windows(directory, text, window, windows)
    against = None if reference is None else load_any(resolve_model(reference), device)
    result = run(load_any(directory, device), tokens, reference=against)
    if json_output:
        print_json(asdict(result))
        return
    print(f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in windows of {window}")
    if result.kl is not None:
        print(f"KL to {reference}: {result.kl:.6f} nats per token")


app.command()(cli_running.generate)
app.command()(cli_running.benchmark)


@app.command()
def doctor(json_output: Json = False) -> None:
    """What works on this machine, and why something doesn't."""
    from .experiments.doctor import examine

    findings = examine()
    if json_output:
        print_json({"msq": __version__, "findings": [asdict(finding) for finding in findings]})
        return
    table = Table("", "what", "detail", title=f"msq {__version__}", title_justify="left")
    for finding in findings:
        table.add_row("ok" if finding.works else "no", finding.name, finding.detail)
    Console().print(table)


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Option(help="Directory for profile, plans and checkpoints; must be new or a demo's.", parser=named_path),
    ] = Path("demo"),
) -> None:
    """The main job on the embedded model: profile, plan, apply, evaluate."""
    from .experiments.demo import run_demo

    run_demo(out)


if __name__ == "__main__":
    main()
