"""Solvers against each other, each run in a process of its own, with machine and commit in every row.

    python -m msq.experiments.bench_solvers --profile DIR --known known_optima.json --out results.csv
    python -m msq.experiments.bench_solvers --set published --solvers exact --profile DIR --out results.csv
    python -m msq.experiments.bench_solvers --set large --solvers exact,lagrangian --out results.csv
    python -m msq.experiments.bench_solvers --set frontier --profile DIR --out results.csv
    python -m msq.experiments.bench_solvers --set random --count 10000 --solvers exact --out results.csv

Seconds are those of `Solver.solve` in a fresh process: building the problem and loading msq are not in them, loading
what a backend needs (OR-Tools, scipy, CVXPY) is. Where other work shares the processor, compare `cpu_seconds`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..solvers.check import check
from ..solvers.errors import SolverError
from ..solvers.frontier import frontier
from ..solvers.isolated import solve_isolated
from ..solvers.problem import Problem, column_order
from ..solvers.registry import get_solver, solver_names
from ..solvers.solution import Status
from .instances import Instance, known_instances, large_instances, published_instances

COLUMNS = (
    "instance",
    "solver",
    "status",
    "objective",
    "relative_to_optimum",
    "lower_bound",
    "gap",
    "within_caps",
    "seconds",
    "cpu_seconds",
    "peak_mb",
    "columns",
    "columns_kept",
    "remark",
    "rel_gap",
    "time_limit",
    "threads",
    "machine",
    "commit",
    "date",
)
Row = dict[str, Any]

LONG = 1.0
"""Seconds from which a solve is not repeated."""


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    options = _parser().parse_args(arguments)
    rows = {"frontier": _frontier_rows, "random": _random_rows}.get(options.set, _solver_rows)(options)
    stamp = {"machine": machine(), "commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | stamp)
            file.flush()
            print(*(f"{name}={row[name]}" for name in COLUMNS if row.get(name, "") != ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare solvers; see the module.")
    parser.add_argument("--set", choices=("known", "published", "large", "frontier", "random"), default="known")
    parser.add_argument("--profile", type=Path, help="directory of the published tables")
    parser.add_argument("--known", type=Path, help="known_optima.json, to compare objectives with")
    parser.add_argument("--solvers", default="all", help="comma-separated names, or all")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--rel-gap", type=float, default=1e-9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="runs of solves of under a second; the median counts")
    parser.add_argument("--count", type=int, default=1000, help="random problems")
    parser.add_argument("--only", default="", help="instances whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def machine() -> str:
    """Processor, cores and system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    """The commit of this checkout, with a plus sign when files differ from it; empty outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _solver_rows(options: argparse.Namespace) -> Iterator[Row]:
    names = solver_names() if options.solvers == "all" else tuple(options.solvers.split(","))
    optima: dict[str, float | None] = {}
    if options.known is not None:
        optima = {entry["instance"]: entry["optimum"] for entry in json.loads(options.known.read_text())["instances"]}
    for instance in _instances(options):
        problem = instance.build()
        for name in names:
            yield _measured(instance.name, name, problem, optima.get(instance.name), options)


def _instances(options: argparse.Namespace) -> Iterator[Instance]:
    if options.set != "large" and options.profile is None:
        raise SystemExit(f"--set {options.set} needs --profile, the directory of the published tables")
    source = {
        "known": lambda: known_instances(options.profile),
        "published": lambda: published_instances(options.profile),
        "large": large_instances,
    }[options.set]
    return (instance for instance in source() if options.only in instance.name)


def _measured(instance: str, name: str, problem: Problem, optimum: float | None, options: argparse.Namespace) -> Row:
    """One row; of several runs the median time, all else from the last. Long solves are run once."""
    limits = {"time_limit": options.time_limit, "rel_gap": options.rel_gap, "threads": options.threads}
    runs = [solve_isolated(name, problem, **limits)]
    while len(runs) < options.repeat and runs[0].seconds < LONG:
        runs.append(solve_isolated(name, problem, **limits))
    found = runs[-1]
    row: Row = {
        "instance": instance,
        "solver": name,
        "columns": problem.columns,
        "seconds": f"{statistics.median(run.seconds for run in runs):.4g}",
        "cpu_seconds": f"{statistics.median(run.cpu_seconds for run in runs):.4g}",
        "peak_mb": round(found.peak_bytes / 1e6),
        "rel_gap": options.rel_gap,
        "time_limit": options.time_limit,
        "threads": options.threads,
    }
    solution = found.solution
    if solution is None:
        return row | {"status": "error", "remark": found.error}
    row |= {"status": str(solution.status), "remark": solution.stats.get("rejected", "")}
    row["columns_kept"] = solution.stats.get("kept_columns", "")
    if solution.columns is not None:
        row |= {
            "objective": repr(solution.objective),
            "lower_bound": repr(solution.lower_bound),
            "gap": f"{solution.gap:.3g}",
            "within_caps": check(problem, solution.columns).feasible,
        }
        if optimum is not None:
            row["relative_to_optimum"] = f"{solution.objective / optimum - 1:.3g}"
    return row


def _frontier_rows(options: argparse.Namespace) -> Iterator[Row]:
    """All break points of the frontier: the median of many passes, structure built before."""
    if options.profile is None:
        raise SystemExit("--set frontier needs --profile, the directory of the published tables")
    for instance in known_instances(options.profile):
        problem = instance.build()
        started = time.perf_counter()
        _ = problem.structure
        structure = time.perf_counter() - started
        for resource, name in enumerate(problem.resource_names):
            seconds = []
            for _ in range(max(options.repeat, 5)):
                started = time.perf_counter()
                curve = frontier(problem, resource)
                seconds.append(time.perf_counter() - started)
            yield {
                "instance": f"{instance.name} {name}",
                "solver": "frontier",
                "status": f"{curve.points} points",
                "seconds": f"{statistics.median(seconds):.4g}",
                "columns": problem.columns,
                "remark": f"structure, built once per problem, took {structure:.4g} s",
            }


def _random_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Random small problems against brute force: one row per solver, with the number of mismatches."""
    names = solver_names() if options.solvers == "all" else tuple(options.solvers.split(","))
    problems = [(random_problem(seed), seed) for seed in range(options.count)]
    optima = [brute_force(problem) for problem, _ in problems]
    for name in names:
        solver = get_solver(name)
        wrong: list[int] = []
        unproven: list[int] = []
        status: dict[str, int] = {}
        started = time.perf_counter()
        for (problem, seed), optimum in zip(problems, optima, strict=True):
            try:
                solution = solver.solve(problem, time_limit=options.time_limit, rel_gap=options.rel_gap)
            except SolverError:
                status["refused"] = status.get("refused", 0) + 1
                continue
            status[str(solution.status)] = status.get(str(solution.status), 0) + 1
            if not _agrees(solution.status, solution.objective, solution.lower_bound, optimum):
                wrong.append(seed)
            elif solver.exact and solution.status not in (Status.OPTIMAL, Status.INFEASIBLE):
                unproven.append(seed)
        yield {
            "instance": f"{options.count} random problems",
            "solver": name,
            "status": "; ".join(f"{count} {kind}" for kind, count in sorted(status.items())),
            "seconds": f"{time.perf_counter() - started:.4g}",
            "remark": "; ".join(
                f"{len(seeds)} {kind}" + (f", seeds {seeds[:10]}" if seeds else "")
                for kind, seeds in (("mismatches with brute force", wrong), ("left without proof", unproven))
                if kind.startswith("mismatches") or seeds
            ),
            "rel_gap": options.rel_gap,
        }


def _agrees(status: str, objective: float, bound: float, optimum: float) -> bool:
    """Whether every claim of an answer is true of the optimum (inf when infeasible)."""
    if math.isinf(optimum):
        return status in (Status.INFEASIBLE, Status.UNKNOWN)
    slack = 1e-8 * optimum
    if status == Status.OPTIMAL and objective > optimum + slack:
        return False
    return bound <= optimum + slack and objective >= optimum - slack and status != Status.INFEASIBLE


def random_problem(seed: int) -> Problem:
    """One to four groups of up to three layers, three choices, one to three resources, fusion, any tightness."""
    random = np.random.default_rng(seed)
    resources = int(random.integers(1, 4))
    sizes = random.integers(1, 4, size=random.integers(1, 5))
    rounded = random.random() < 0.3
    rows = []
    for group, size in enumerate(sizes.tolist()):
        for mask in range(1, 1 << size):
            single = mask & (mask - 1) == 0
            if not single and random.random() < 0.6:
                continue
            for choice in range(3):
                loss = mask.bit_count() * random.uniform(0.5, 1.5) * 4.0 ** -(1 + choice)
                use = mask.bit_count() * random.uniform(0.8, 1.2, resources) * (1 + choice) * (1 if single else 0.9)
                rows.append((group, mask, choice, loss, *(np.ceil(use) if rounded else use)))
    table = np.array(rows, dtype=np.float64)
    order = column_order(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64))
    table = table[order]
    usage = table[:, 4:].T
    loose = Problem(
        group=table[:, 0].astype(np.int64),
        mask=table[:, 1].astype(np.int64),
        choice=table[:, 2].astype(np.int64),
        loss=table[:, 3],
        usage=usage,
        caps=usage.sum(axis=1),
        base=np.zeros(resources),
        group_sizes=sizes.astype(np.int32),
        resource_names=("memory", "latency@1", "latency@8")[:resources],
        choice_names=("low", "middle", "high"),
    )
    least = np.array([loose.structure.evaluate(use)[0] for use in usage])
    most = -np.array([loose.structure.evaluate(-use)[0] for use in usage])
    caps = most - random.choice([0.3, 0.7, 0.95, 1.02]) * (most - least)
    return dataclasses.replace(loose, caps=np.floor(caps) if rounded else caps)


def brute_force(problem: Problem) -> float:
    """Least loss over all plans that meet the caps, by the definition; inf if there is none."""
    loss, usage = np.zeros(1), np.zeros((problem.resources, 1))
    for group, size in enumerate(problem.group_sizes.tolist()):
        members = np.flatnonzero(problem.group == group).tolist()
        plans = list(_covers(problem, members, (1 << size) - 1))
        own = np.array([sum(problem.loss[c] for c in plan) for plan in plans])
        use = np.array([problem.usage[:, list(plan)].sum(axis=1) for plan in plans]).T
        loss = (loss[:, None] + own).ravel()
        usage = (usage[:, :, None] + use[:, None, :]).reshape(problem.resources, -1)
    fits = (usage + problem.base[:, None] <= problem.caps[:, None] * (1 + 1e-12)).all(axis=0)
    return float(loss[fits].min()) if fits.any() else math.inf


def _covers(problem: Problem, members: list[int], missing: int) -> Iterator[tuple[int, ...]]:
    """All sets of columns that cover the missing layers once."""
    if not missing:
        yield ()
        return
    low = missing & -missing
    for column in members:
        mask = int(problem.mask[column])
        if mask & low and not mask & ~missing:
            yield from ((column, *rest) for rest in _covers(problem, members, missing & ~mask))


if __name__ == "__main__":
    main()
