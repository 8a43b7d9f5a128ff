"""The benchmark's random problems, in the size for every day; `--count 10000` is for the night."""

from __future__ import annotations

import csv

import pytest
from msq.experiments import bench_solvers
from msq.experiments.instances import LLAMA_405B, generate
from msq.solvers.registry import get_solver, missing_requirements
from msq.solvers.solution import Status


def test_random_problems_and_brute_force(tmp_path, brute) -> None:
    for seed in range(10):
        problem = bench_solvers.random_problem(seed)
        assert bench_solvers.brute_force(problem) == pytest.approx(brute(problem))
    out = tmp_path / "deep" / "results.csv"
    names = [name for name in ("lagrangian", "exact", "scip") if not missing_requirements(name)]
    bench_solvers.main(["--set", "random", "--count", "40", "--solvers", ",".join(names), "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["solver"] for row in rows] == names
    assert {row["remark"] for row in rows} == {"0 mismatches with brute force"}
    assert all(row["machine"] and row["date"] for row in rows)


@pytest.mark.parametrize("latency", [None, 0.8])
def test_generated_models_are_solved(latency) -> None:
    problem = generate(LLAMA_405B, 6, quantizers=12, latency=latency)
    assert problem.columns == 6 * 12 * (7 + 1 + 3 + 1)
    solution = get_solver("exact").solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.gap <= 1e-6
