"""Options that several commands share, and how commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .profiles.calibration import Calibration
    from .profiles.tables import Profile


def named_path(text: str | Path) -> Path:
    """Reads a path of the command line; an empty one would be the current directory, which nobody named.

    Raises:
        FileNotFoundError: it is empty; no ValueError, of which typer would make a message of its own.
    """
    if not str(text):
        raise FileNotFoundError("expected the name of a file or directory, got an empty one; `.` is this directory.")
    return Path(text)


ProfileDir = Annotated[Path, typer.Option("--profile", help="Directory of a profile.", parser=named_path)]
Budgets = Annotated[
    list[str],
    typer.Option("--budget", help='"memory=3.25bpw", "memory=4.2GiB", "latency=5ms", "latency=200tps@8"; repeatable.'),
]
Quantizers = Annotated[str | None, typer.Option(help='Comma-separated globs on labels, e.g. "tcq-*,nuq-4".')]
Implementations = Annotated[
    str | None, typer.Option(help="Comma-separated kernels to consider; default: all measured.")
]
Fusion = Annotated[bool, typer.Option("--fusion/--no-fusion", help="Whether layers may run as one kernel.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
EngineName = Annotated[
    str,
    typer.Option("--engine", help="local (this machine) or ray (the cluster at RAY_ADDRESS, else one started here)."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that encode; default: one a GPU, on a CPU one a core where the model is large enough."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")]
CalibrationText = Annotated[Path | None, typer.Option("--text", help="Calibration text, UTF-8.", parser=named_path)]
CalibrationSource = Annotated[
    str,
    typer.Option(
        "--calibration", help="Tokens to calibrate on without --text: random, or self, what the model writes; no data."
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]


def _positive(seconds: float) -> float:
    """A time limit that solvers take, before anything is read or solved.

    Raises:
        SolverError: not above 0.
    """
    from .solvers.errors import SolverError

    if not seconds > 0:
        raise SolverError(f"--time-limit: expected seconds above 0, got {seconds:g}; use inf for no limit.")
    return seconds


TimeLimit = Annotated[float, typer.Option(callback=_positive, help="Seconds for a solver on a problem; inf for none.")]


def refuse_given(command: typer.Context, names: Iterable[str], why: str, error: type[ValueError]) -> None:
    """Refuses options that would do nothing beside another one, if the command line names any.

    Args:
        names: of parameters.
        why: rest of the sentence after the options' names.

    Raises:
        error: one of them was given.
    """
    sources = ((name, command.get_parameter_source(name)) for name in names)
    given = [f"--{name.replace('_', '-')}" for name, source in sources if source and source.name == "COMMANDLINE"]
    if given:
        raise error(f"{', '.join(given)}: {why}")


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A message for people, off stdout."""
    print(text, file=sys.stderr)


def split_names(text: str | None) -> tuple[str, ...] | None:
    """A comma-separated option; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def calibration_tokens(
    model: Path, text: Path | None, source: str, *, tokens: int, window: int, seed: int, device: str
) -> Calibration:
    """The tokens that `--text`, `--calibration`, `--tokens`, `--window` and `--seed` mean."""
    from .profiles.calibration import calibration, parse_source
    from .profiles.models import choose_device

    chosen = parse_source(source, text)
    sizes = {"tokens": tokens, "window": window, "seed": seed}
    return calibration(model, text, source=chosen, device=choose_device(device), **sizes)


def load(profile: Path) -> Profile:
    from .profiles.tables import load_profile

    return load_profile(profile)
