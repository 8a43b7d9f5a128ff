"""The commands that plan: `msq plan | frontier | compare`. Nothing here needs torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cli_options import (
    Budgets,
    Fusion,
    Implementations,
    Json,
    ProfileDir,
    Quantizers,
    Seed,
    TimeLimit,
    load,
    named_path,
    note,
    print_json,
    refuse_given,
    split_names,
)

if TYPE_CHECKING:
    from .experiments.compare import Comparison
    from .planner.plan import Plan
    from .planner.robust import Stability
    from .profiles.tables import Profile

Constraints = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint",
        help='"pin:REGEX=QUANTIZERS", "ban:REGEX=QUANTIZERS", "min-bits:REGEX=BITS", "max-bits:REGEX=BITS", '
        '"same:REGEX", "distinct=N" or "device:REGEX=AMOUNT" of memory; regular expressions on layers; repeatable.',
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw a chart here (.png, .svg or .pdf).", parser=named_path)]

_MOST_SHOWN = 8
"""Layers of a plan whose changes are printed."""


def plan(
    profile: ProfileDir,
    budget: Budgets,
    quantizers: Quantizers = None,
    implementations: Implementations = None,
    fusion: Fusion = True,
    constraint: Constraints = None,
    robust: Annotated[
        float | None,
        typer.Option(help="Minimise this quantile of the loss over resampled sensitivities, e.g. 0.95."),
    ] = None,
    stability: Annotated[
        int, typer.Option(min=0, help="Resample the sensitivities so often and count how choices change.")
    ] = 0,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="What `msq benchmark --json` printed: puts the profile's overheads right first; repeatable.",
            parser=named_path,
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Backend; `msq doctor` lists them. Default: exact; scip with same/distinct.")
    ] = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the plan here (YAML).", parser=named_path)] = None,
    json_output: Json = False,
) -> None:
    """Find the assignment of least loss within memory and latency budgets."""
    from .planner.budget import parse_budgets
    from .planner.constraints import parse_constraints
    from .planner.plan import save_plan
    from .planner.robust import stability as resample
    from .planner.robust import standard_errors
    from .planner.solve import find_plan, plan_json

    _check_files(out, None, [*_tables(profile), *(calibrate or ())])
    measured = load(profile)
    if calibrate:
        measured = _calibrated(measured, profile, calibrate)
    if stability:
        standard_errors(measured)
    found = find_plan(
        measured,
        parse_budgets(budget),
        quantizers=quantizers,
        implementations=split_names(implementations),
        fusion=fusion,
        constraints=parse_constraints(constraint or ()),
        robust=robust,
        solver=solver,
        time_limit=time_limit,
        seed=seed,
    )
    if out is not None:
        save_plan(found.plan, out)
    for remark in found.remarks:
        note(f"msq: {found.plan.solver.name}: {remark}")
    moved = None
    if stability:
        moved = resample(
            found.constrained, found.columns, found.solver, samples=stability, time_limit=time_limit, seed=seed
        )
    if json_output:
        names = found.constrained.built.profile.layer_names
        print_json(plan_json(found.plan) | ({} if moved is None else {"stability": moved.to_json(names)}))
        return
    _print_plan(found.plan)
    if moved is not None:
        _print_stability(moved, found.constrained.built.profile.layer_names)


def _calibrated(measured: Profile, directory: Path, benchmarks: list[Path]) -> Profile:
    """The profile with its overheads put right, in memory and on disk; says how far runs and promises are apart."""
    from .planner.calibrate import calibrate, load_run

    found, steps = calibrate(measured, directory, [load_run(path) for path in benchmarks])
    for step in steps:
        note(
            f"msq: {benchmarks[step.run]}, batch {step.batch_size}: {step.measured_us:.1f} us a step, promised "
            f"{step.promised_us:.1f}, calibrated {step.calibrated_us:.1f} ({100 * step.error:+.1f}%)"
        )
    return found


def _print_plan(found: Plan) -> None:
    from .experiments.plan_map import plan_map

    console = Console()
    console.print(plan_map(found))
    promised, report = found.promised, found.solver
    bound = "no bound" if report.gap is None else f"proven gap {100 * report.gap:.3g}% of it"
    print(f"loss {promised.loss:.6g} ({report.status}, {bound}; {report.name}, {report.seconds:.2f} s)")
    rest = found.model.unplanned_bytes
    whole = "" if rest is None else f"; {promised.memory_bytes + rest} with all that stays as it is"
    print(f"memory {promised.memory_bytes} bytes, {promised.bits_per_weight:.4f} bits per weight{whole}")
    for batch, latency in promised.latency_us.items():
        shown = "not profiled" if latency is None else f"{latency:.1f} us a step, {batch * 1e6 / latency:.1f} tokens/s"
        print(f"latency at batch {batch}: {shown} on {found.profile.device}")
    for name, price in (report.shadow_prices or {}).items():
        amount, unit = (price * 1e6, "MB") if name == "memory" else (price, "us")
        print(f"shadow price of {name}: one more {unit} saves a loss of {amount:.3g}")
    if found.robustness is not None:
        made = found.robustness
        print(
            f"{100 * made.quantile:g}% quantile of the loss over {made.samples} resampled profiles: "
            f"{made.quantile_loss:.6g}; of the plan of least loss as measured: {made.ordinary_quantile_loss:.6g}"
        )


def _print_stability(moved: Stability, layers: tuple[str, ...]) -> None:
    print(
        f"over {moved.samples} resampled profiles {100 * moved.changes.mean():.1f}% of the choices change; the plan "
        f"loses {100 * moved.regret.mean():.2f}% on average to the best plan of each"
    )
    most = sorted(zip(moved.changes.tolist(), layers, strict=True), reverse=True)[:_MOST_SHOWN]
    for share, layer in most:
        if share:
            print(f"  {100 * share:5.1f}%  {layer}")


def frontier(
    command: typer.Context,
    profile: ProfileDir,
    resource: Annotated[str, typer.Option(help="memory or latency.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.", parser=named_path)],
    plot: Plot = None,
    at: Annotated[
        str | None, typer.Option(help='Amounts to plan for, comma-separated: "3bpw,4GiB" or "200tps".')
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option("--plan", help="Plans to show; repeatable.", parser=named_path)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size, for latency.")] = 1,
    quantizers: Quantizers = None,
    implementations: Implementations = None,
    fusion: Fusion = True,
    constraint: Constraints = None,
    time_limit: TimeLimit = 60.0,
    json_output: Json = False,
) -> None:
    """Every break point of least loss against memory or latency, beside uniform schemes and the ideal."""
    from .experiments.charts import frontier_chart
    from .planner.constraints import broken_by, parse_constraints
    from .planner.errors import PlanError
    from .planner.frontier import frontier_table
    from .profiles.files import write_atomic

    if resource == "memory":
        refuse_given(command, ["batch_size"], "memory is the same at every batch size; leave it out.", PlanError)
    _check_files(out, plot, [*_tables(profile), *(plan or ())])
    measured = load(profile)
    plans, constraints = _labelled_plans(plan or (), measured), parse_constraints(constraint or ())
    table = frontier_table(
        measured,
        resource,
        batch_size=batch_size,
        at=split_names(at) or (),
        plans=plans,
        quantizers=quantizers,
        implementations=split_names(implementations),
        fusion=fusion,
        constraints=constraints,
        time_limit=time_limit,
    )
    for label, shown in plans.items():
        if broken := broken_by(shown, measured, constraints):
            texts = ", ".join(f'"{c.text}"' for c in broken)
            note(f"msq: {label}: it breaks {texts}, which the rest of this frontier keeps.")
    for label in table.loc[table["series"] == "feasible", "label"]:
        note(f"msq: {label}: not proven optimal within {time_limit:g} s; it is in the series 'feasible'.")
    write_atomic(out, table.to_csv(index=False, lineterminator="\n"), PlanError)
    if plot is not None:
        frontier_chart(table, plot, f"{measured.manifest.model.name} on {measured.manifest.device.name}")
    points = int((table["series"] == "frontier").sum())
    if json_output:
        files = {"frontier": str(out), "plot": None if plot is None else str(plot)}
        print_json(files | {"points": points, "rows": len(table)})
    else:
        print(f"{points} break points in {out}" + ("" if plot is None else f", chart in {plot}"))


def _check_files(out: Path | None, plot: Path | None, inputs: Sequence[Path]) -> None:
    """Refuses files that can't be written, or that are read, before hours are spent on what is to be in them."""
    from .planner.errors import PlanError
    from .profiles.files import check_writable

    read = {path.resolve() for path in inputs}
    for option, path in (("--out", out), ("--plot", plot)):
        if path is not None and path.resolve() in read:
            raise PlanError(f"{option} {path} would replace what this command reads; give it another name.")
    if out is not None:
        check_writable(out, PlanError)
    if plot is not None:
        from .experiments.charts import check_chart

        check_chart(plot)
    if out is not None and plot is not None and out.resolve() == plot.resolve():
        raise PlanError(f"--out and --plot are both {out}; give the chart another name.")


def _tables(profile: Path) -> list[Path]:
    """The files that a profile is made of."""
    from .profiles.schema import MANIFEST_FILE, TABLES

    return [profile / name for name in (MANIFEST_FILE, *(table.file for table in TABLES))]


def _labelled_plans(paths: Sequence[Path], measured: Profile) -> dict[str, Plan]:
    """Plans by the stem of their files, by the whole path where stems clash."""
    from .planner.plan import load_plan

    paths = list(dict.fromkeys(paths))
    stems = Counter(path.stem for path in paths)
    plans = {}
    for path in paths:
        found = load_plan(path)
        plans[path.stem if stems[path.stem] == 1 else str(path)] = found
        if found.profile.digest != measured.digest:
            note(f"msq: {path} was made from another profile; what it promises may not compare with this frontier.")
    return plans


def compare(
    profile: ProfileDir,
    budget: Budgets,
    also: Annotated[
        list[str] | None,
        typer.Option(help='A further problem: its budgets, comma-separated ("memory=3bpw,latency=5ms"); repeatable.'),
    ] = None,
    solvers: Annotated[str | None, typer.Option(help="Comma-separated backends; default: all.")] = None,
    quantizers: Quantizers = None,
    implementations: Implementations = None,
    fusion: Fusion = True,
    constraint: Constraints = None,
    time_limit: TimeLimit = 60.0,
    rel_gap: Annotated[float, typer.Option(min=0, help="Relative gap at which a plan counts as optimal.")] = 1e-6,
    threads: Annotated[int, typer.Option(min=1, help="Most threads of a solver.")] = 1,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the comparison here (CSV).", parser=named_path)] = None,
    plot: Plot = None,
    json_output: Json = False,
) -> None:
    """Solver strategies side by side, each in a process of its own: answers, proofs, seconds, memory."""
    import pandas as pd

    from .experiments.charts import comparison_chart
    from .experiments.compare import contradictions, out_of_reach, trials
    from .planner.budget import parse_budgets
    from .planner.constraints import parse_constraints
    from .planner.errors import InfeasibleBudgetError, PlanError
    from .profiles.files import write_atomic
    from .profiles.progress import progress

    _check_files(out, plot, _tables(profile))
    measured = load(profile)
    problems = [parse_budgets(budget), *(parse_budgets(split_names(text) or ()) for text in also or ())]
    pending = trials(
        measured,
        problems,
        solvers=split_names(solvers),
        quantizers=quantizers,
        implementations=split_names(implementations),
        fusion=fusion,
        constraints=parse_constraints(constraint or ()),
    )
    total = sum(map(len, pending))
    rows: list[Comparison] = []
    hopeless = []
    interrupted = False
    for problem in pending:
        answers: list[Comparison] = []
        # a bar per problem: while one is shown, what goes to stdout may end up on stderr
        try:
            with progress("comparing solvers", total, done=len(rows)) as advance:
                for trial in problem:
                    answers.append(trial.run(time_limit=time_limit, rel_gap=rel_gap, seed=seed, threads=threads))
                    advance()
        except KeyboardInterrupt:
            interrupted = True
        rows += contradictions(answers)
        if answers and not json_output:
            _print_comparison(rows[-len(answers) :])
        if interrupted:
            break
        if out_of_reach(answers):
            hopeless.append(answers[0].budgets)
    if out is not None and rows:
        table = pd.DataFrame([asdict(row) for row in rows])
        write_atomic(out, table.to_csv(index=False, lineterminator="\n"), PlanError)
    if plot is not None and rows:
        comparison_chart(rows, plot, measured.manifest.model.name)
    if json_output:
        print_json({"budgets": budget, "interrupted": interrupted, "solvers": [asdict(row) for row in rows]})
    if interrupted:
        note(f"msq: interrupted after {len(rows)} of {total} solves.")
        raise typer.Exit(130)
    if len(hopeless) == len(pending):
        raise InfeasibleBudgetError(
            f"it is proven that no plan meets {' or '.join(hopeless)}; `msq plan` says what can be met."
        )


def _print_comparison(rows: list[Comparison]) -> None:
    names = ("solver", "status", "loss", "bound", "gap", "in caps", "seconds", "MB", "kept")
    shown = Table(*names, box=None, padding=(0, 1, 0, 0), title=rows[0].budgets, title_justify="left")
    for row in rows:
        numbers = (f"{x:.6g}" if x is not None else "-" for x in (row.objective, row.lower_bound))
        gap = "-" if row.gap is None else f"{row.gap:.1e}"
        kept = {None: "-", True: "yes", False: "no"}[row.within_caps]
        seconds = "-" if row.seconds is None else f"{row.seconds:.3f}"
        counts = ("-" if x is None else str(x) for x in (row.peak_mb, row.columns_kept))
        shown.add_row(row.solver, row.status, *numbers, gap, kept, seconds, *counts)
    Console().print(shown)
    for row in rows:
        if row.remark:
            note(f"{row.solver}: {row.remark}")
