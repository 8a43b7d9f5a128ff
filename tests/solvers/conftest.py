"""Tiny problems and a brute force to compare every backend with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from msq.solvers.problem import Problem, column_order
from msq.solvers.registry import missing_requirements, solver_names

Column = tuple[int, int, int, float, tuple[float, ...]]
"""(group, mask, choice, loss, usage of each resource)"""


def build_problem(
    columns: list[Column],
    caps: list[float],
    base: list[float] | None = None,
    names: tuple[str, ...] | None = None,
    sizes: list[int] | None = None,
) -> Problem:
    """A problem from a list of columns in any order; every layer has weight 100 and sensitivity 1."""
    group = np.array([column[0] for column in columns])
    mask = np.array([column[1] for column in columns])
    choice = np.array([column[2] for column in columns])
    order = column_order(group, mask)
    if sizes is None:
        sizes = [int(np.bitwise_or.reduce(mask[group == g])).bit_length() for g in range(int(group.max()) + 1)]
    return Problem(
        group=group[order],
        mask=mask[order],
        choice=choice[order],
        loss=np.array([float(column[3]) for column in columns])[order],
        usage=np.array([column[4] for column in columns], dtype=float).T[:, order],
        caps=np.array(caps, dtype=float),
        base=np.zeros(len(caps)) if base is None else np.array(base, dtype=float),
        group_sizes=np.array(sizes),
        resource_names=names or ("memory", "latency@1", "latency@8")[: len(caps)],
        choice_names=tuple(f"option-{i}" for i in range(int(choice.max()) + 1)),
        layer_sensitivity=np.ones(sum(sizes)),
        layer_weights=np.full(sum(sizes), 100.0),
        column_bits=1.0 + choice[order],
    )


@functools.cache
def random_problem(seed: int, resources: int, tightness: float, *, fusion: bool = True) -> Problem:
    """One to three groups, at most one of them of three layers; tightness 0 leaves caps loose, above 1 breaks them."""
    random = np.random.default_rng(seed)
    columns: list[Column] = []
    sizes = [int(random.integers(1, 4)), *random.integers(1, 3, size=random.integers(0, 3)).tolist()]
    for group, size in enumerate(sizes):
        for mask in range(1, 1 << size):
            single = mask & (mask - 1) == 0
            if not single and (not fusion or random.random() < 0.5):
                continue
            layers = mask.bit_count()
            for choice in range(3):
                loss = layers * random.uniform(0.5, 1.5) * 4.0 ** -(1 + choice)
                usage = layers * random.uniform(0.8, 1.2, resources) * (1 + choice) * (0.9 if layers > 1 else 1)
                columns.append((group, mask, choice, loss, tuple(usage)))
    loose = build_problem(columns, [1e9] * resources, sizes=sizes)
    plans = list(all_plans(loose))
    uses = np.array([loose.usage[:, list(plan)].sum(axis=1) for plan in plans])
    low, high = uses.min(axis=0), uses.max(axis=0)
    caps = high - tightness * (high - low)
    base = random.uniform(0, 2, resources)
    return build_problem(columns, (caps + base).tolist(), base.tolist(), sizes=sizes)


def all_plans(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Every plan, by the definition: subsets of each group's columns whose masks are disjoint and complete."""

    def of_group(group: int) -> list[tuple[int, ...]]:
        members = np.flatnonzero(problem.group == group).tolist()
        full = (1 << int(problem.group_sizes[group])) - 1

        def extend(covered: int, chosen: tuple[int, ...], rest: list[int]) -> Iterator[tuple[int, ...]]:
            if covered == full:
                yield chosen
                return
            for position, column in enumerate(rest):
                mask = int(problem.mask[column])
                if not mask & covered:
                    yield from extend(covered | mask, (*chosen, column), rest[position + 1 :])

        return list(extend(0, (), members))

    for parts in itertools.product(*(of_group(group) for group in range(problem.groups))):
        yield tuple(column for part in parts for column in part)


@functools.cache
def brute_force(problem: Problem) -> float:
    """Least loss of a plan that meets the caps; inf if there is none."""
    plans = list(all_plans(problem))
    width = max(len(plan) for plan in plans)
    table = np.array([plan + (problem.columns,) * (width - len(plan)) for plan in plans])
    loss = np.append(problem.loss, 0.0)[table].sum(axis=1)
    usage = np.append(problem.usage, np.zeros((problem.resources, 1)), axis=1)[:, table].sum(axis=2)
    fits = (usage + problem.base[:, None] <= problem.caps[:, None] * (1 + 1e-12)).all(axis=0)
    return float(loss[fits].min()) if fits.any() else float("inf")


@dataclass(frozen=True)
class Known:
    """A problem with its answer."""

    name: str
    problem: Problem
    optimum: float  # inf when infeasible


def _ladder(group: int, losses: list[float], uses: list[float], mask: int = 1) -> list[Column]:
    return [(group, mask, i, loss, (use,)) for i, (loss, use) in enumerate(zip(losses, uses, strict=True))]


def known_problems() -> list[Known]:
    """Degenerate and hand-solved problems."""
    two = _ladder(0, [4, 1, 0], [1, 2, 3]) + _ladder(1, [4, 1, 0], [1, 2, 3])
    fused = [(0, 1, 0, 2.0, (2.0,)), (0, 2, 0, 2.0, (2.0,)), (0, 3, 0, 4.0, (3.0,)), (0, 3, 1, 1.0, (9.0,))]
    joint: list[Column] = [(0, 1, 0, 1.0, (1.0, 3.0)), (0, 1, 1, 1.0, (3.0, 1.0))]
    return [
        Known("loose", build_problem(two, [100]), 0.0),
        Known("knapsack", build_problem(two, [4]), 2.0),
        Known("cap equals least use", build_problem(two, [2]), 8.0),
        Known("cap equals most use", build_problem(two, [6]), 0.0),
        Known("cap in decimals", build_problem(_ladder(0, [1, 0], [0.1, 0.2]) + _ladder(1, [0], [0.1]), [0.3]), 0.0),
        Known("base fills the cap", build_problem(two, [5], [3]), 8.0),
        Known("base above the cap", build_problem(two, [5], [6]), float("inf")),
        Known("below least use", build_problem(two, [1.99]), float("inf")),
        Known("one group, one column", build_problem(_ladder(0, [3], [1]), [1]), 3.0),
        Known("zero losses", build_problem(_ladder(0, [0, 0], [1, 2]) + _ladder(1, [0, 0], [2, 1]), [2]), 0.0),
        Known("zero uses", build_problem(_ladder(0, [2, 1], [0, 0]) + _ladder(1, [1], [0]), [0]), 2.0),
        Known("equal columns", build_problem(_ladder(0, [1] * 5, [1] * 5) + _ladder(1, [1] * 5, [1] * 5), [2]), 2.0),
        Known("fusion saves", build_problem(fused, [3.5]), 4.0),
        Known("fusion impossible", build_problem(fused, [2.5]), float("inf")),
        Known("jointly infeasible", build_problem(joint, [2, 2]), float("inf")),
        Known("provably jointly infeasible", build_problem(joint, [1.9, 1.9]), float("inf")),
        Known("one of two caps binds", build_problem(joint, [1, 100]), 1.0),
    ]  # fmt: skip


@pytest.fixture(params=solver_names())
def solver_name(request: pytest.FixtureRequest) -> str:
    """Every backend whose requirements are installed."""
    name: str = request.param
    if missing_requirements(name):
        pytest.skip(f"{name} needs {', '.join(missing_requirements(name))}")
    return name


@pytest.fixture
def make() -> Callable[..., Problem]:
    return build_problem


@pytest.fixture
def make_random() -> Callable[..., Problem]:
    return random_problem


@pytest.fixture
def brute() -> Callable[[Problem], float]:
    return brute_force


@pytest.fixture
def plans() -> Callable[[Problem], Iterator[tuple[int, ...]]]:
    return all_plans


@pytest.fixture(params=known_problems(), ids=lambda known: known.name.replace(" ", "-"))
def known(request: pytest.FixtureRequest) -> Known:
    value: Known = request.param
    return value
