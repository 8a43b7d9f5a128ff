"""The commands that run a checkpoint: `msq generate` and `msq benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_options import Device, Json, named_path, print_json

if TYPE_CHECKING:
    from torch import nn

    from .planner.plan import Plan

Implementation = Annotated[
    str | None, typer.Option(help="Run every layer on this (tensor_core, reference); default: as planned.")
]


def generate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    device: Device = "cpu",
    implementation: Implementation = None,
    json_output: Json = False,
) -> None:
    """Go on from a prompt; on CUDA every step is one graph of fused kernels."""
    from .experiments.evaluate import load_any
    from .planner.executor.generate import generate_text
    from .profiles.model_source import resolve_model
    from .profiles.models import load_tokenizer

    directory = resolve_model(checkpoint)
    model = load_any(directory, device, implementation=implementation)
    text = generate_text(model, load_tokenizer(directory), prompt, max_tokens, temperature=temperature)
    if json_output:
        print_json({"prompt": prompt, "text": text})
    else:
        print(prompt + text)


def benchmark(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Checkpoint; with --plan a config.json or shipped shapes, filled with random weights."),
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Plan to run on random weights of these shapes.", parser=named_path)
    ] = None,
    batch_size: Annotated[str, typer.Option(help='Sequences decoded together, e.g. "1,8".')] = "1",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 256,
    kernels: Annotated[bool, typer.Option("--kernels", help="Where a step's time goes, by kernel.")] = False,
    device: Device = "cpu",
    implementation: Implementation = None,
    json_output: Json = False,
) -> None:
    """Tokens per second, measured against promised; bytes of the weights, allocated against promised."""
    from .planner.executor.benchmark import measure_kernels, measure_prompt, measure_step, shared_bytes, weight_bytes
    from .planner.executor.errors import CheckpointError
    from .profiles.device import describe_device
    from .profiles.models import choose_device
    from .profiles.options import parse_batch_sizes

    target = choose_device(device)
    batches = parse_batch_sizes(batch_size)
    if not batches:
        raise CheckpointError('expected a batch size to measure, such as --batch-size 1,8; got "none".')
    model, promised = _subject(checkpoint, plan, device, implementation)
    steps = []
    for batch in batches:
        timed = asdict(measure_step(model, batch, context))
        told = {
            "promised_us": promised.promised.latency_us.get(batch),
            "prompt_us": measure_prompt(model, batch, context),
        }
        steps.append(timed | told)
    facts: dict[str, Any] = {
        "model": promised.model.name,
        "device": describe_device(target).name,
        "context": context,
        "weight_bytes": weight_bytes(model),
        "shared_codebook_bytes": shared_bytes(model),
        "promised_bytes": promised.promised.memory_bytes,
        "steps": steps,
    }
    if kernels:
        facts["kernels"] = [asdict(row) for row in measure_kernels(model, batches[0], context)]
    if json_output:
        print_json(facts | {"plan": promised.model_dump(mode="json")})
    else:
        _print(facts)


def _subject(checkpoint: str, plan: Path | None, device: str, implementation: str | None) -> tuple[nn.Module, Plan]:
    """The model to time, and what was promised of it."""
    from .planner.executor.load import load_checkpoint
    from .planner.executor.manifest import PLAN_FILE
    from .planner.executor.random_model import planned_quantization, random_model
    from .planner.plan import load_plan
    from .profiles.models import choose_device, load_config
    from .profiles.shipped import resolve_config

    if plan is None:
        model = load_checkpoint(named_path(checkpoint), device=device, implementation=implementation)
        return model, load_plan(Path(checkpoint) / PLAN_FILE)
    import torch

    promised, config = load_plan(plan), load_config(resolve_config(checkpoint))
    target = choose_device(device)
    dtype = torch.float16 if target.type == "cuda" else torch.float32
    quantization = planned_quantization(config, promised)
    return random_model(config, quantization, target, dtype=dtype, implementation=implementation), promised


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    table = Table(box=None, title_justify="left", title=f"{facts['model']} on {facts['device']}")
    for heading in ("batch", "context", "us per step", "spread", "promised", "tokens/s", "prompt us", "peak bytes"):
        table.add_column(heading, justify="right")
    for step in facts["steps"]:
        promised = step["promised_us"]
        table.add_row(
            str(step["batch_size"]),
            str(step["context"]),
            f"{step['step_us']:.1f}",
            f"{step['spread_us']:.1f}",
            "-" if promised is None else f"{promised:.1f} ({step['step_us'] / promised - 1:+.1%})",
            f"{step['tokens_per_second']:.1f}",
            f"{step['prompt_us']:.0f}",
            str(step["peak_bytes"]),
        )
    console.print(table)
    console.print(
        f"weights of planned layers: {facts['weight_bytes']} bytes, and {facts['shared_codebook_bytes']} of codebooks "
        f"that fused layers share; {facts['promised_bytes']} promised",
        soft_wrap=True,
    )
    for row in facts.get("kernels", ()):
        console.print(f"{row['total_us']:9.1f} us in {row['launches']:5.1f} launches  {row['kernel']}", markup=False)
