"""The commands that make profiles, beside `msq profile` itself: `msq combine`, and what `--latency-only` runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import Json, load, named_path, note, print_json

if TYPE_CHECKING:
    from .kernels.specs import QuantizerSpec
    from .profiles.tables import Profile


def combine(
    loss: Annotated[
        Path, typer.Option(help="Profile with the losses of the model, measured anywhere.", parser=named_path)
    ],
    latency: Annotated[
        Path,
        typer.Option(
            help="Profile of the target GPU for the same shapes, or a shipped one: h200/llama-3.1-8b.",
            parser=named_path,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the joined profile; must not exist.", parser=named_path)],
    sensitivity: Annotated[
        list[str] | None,
        typer.Option(help='"LAYER=VALUE" for a layer that only the latency profile has, such as lm_head; repeatable.'),
    ] = None,
    json_output: Json = False,
) -> None:
    """Join the losses of one profile with the latencies of another, to plan for a GPU that is not at hand."""
    from .profiles.combine import combine as join
    from .profiles.errors import ProfileError

    if out.exists():
        raise ProfileError(f"{out} exists already; choose another --out, or remove it.")
    joined = join(load(loss), load(latency), out, sensitivities=_parse_sensitivities(sensitivity or []))
    facts = {"profile": str(out), "digest": joined.digest, "device": joined.manifest.device.name}
    if json_output:
        print_json(facts | {"layers": len(joined.layers), "quantizers": len(joined.quantizers)})
    else:
        print(f"profile of {joined.manifest.model.name} on {facts['device']} in {out}")


def _parse_sensitivities(texts: list[str]) -> dict[str, float]:
    """``LAYER=VALUE`` pairs.

    Raises:
        ProfileError: another form, a value below 0, or a layer named twice.
    """
    import math

    from .profiles.errors import ProfileError

    values: dict[str, float] = {}
    for text in texts:
        layer, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not layer.strip() or not 0 <= value < math.inf or layer.strip() in values:
            raise ProfileError(f'expected one "LAYER=VALUE" with a value of at least 0 for each layer; got "{text}".')
        values[layer.strip()] = value
    return values


def measure_latencies(
    model: str,
    out: Path,
    specs: tuple[QuantizerSpec, ...],
    batches: tuple[int, ...],
    context: int | None,
    device: str,
    *,
    embedding: bool,
    restart: bool,
    json_output: bool,
) -> None:
    """`msq profile --latency-only`."""
    from .planner.executor.overhead import ExecutorOverhead
    from .profiles.latency_job import LatencySettings, run_latency_profile
    from .profiles.shipped import resolve_config

    chosen = {} if context is None else {"context": context}
    settings = LatencySettings(specs=specs, batch_sizes=batches, device=device, embedding=embedding, **chosen)
    config = resolve_config(model)
    done = finish_profile(
        lambda: run_latency_profile(config, out, settings, overhead=ExecutorOverhead(), restart=restart), out
    )
    assert done.latency is not None and done.manifest.latency is not None
    held_back = int(done.latency["throttled"].sum()) if "throttled" in done.latency else 0
    if held_back:
        note(f"msq: the GPU was held back by heat or power in {held_back} rows, marked as throttled; measure again.")
    facts = {"profile": str(out), "digest": done.digest, "rows": len(done.latency), "throttled": held_back}
    if json_output:
        print_json(facts | {"overhead_us": {str(b): us for b, us in done.manifest.latency.overhead_us.items()}})
    else:
        print(f"{facts['rows']} latencies on {done.manifest.device.name} in {out}")


def finish_profile(run: Callable[[], Profile], out: Path) -> Profile:
    """Run a profiling job; an interruption says how to go on and exits with 130."""
    try:
        return run()
    except KeyboardInterrupt:
        note(f"\nmsq: interrupted; finished rows are in {out}, the same command goes on from them.")
        sys.exit(130)
