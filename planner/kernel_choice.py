"""From chosen columns to a kernel for every layer."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

from ..solvers.problem import Problem
from ..solvers.reach import fits
from .plan import PlannedLayer
from .problem_builder import REFERENCE, BuiltProblem, match_patterns, signatures

Integers = npt.NDArray[np.int64]


def assign(built: BuiltProblem, columns: list[int]) -> list[PlannedLayer]:
    """The layers of chosen columns, in the order of the profile."""
    problem = built.problem
    kernels: list[tuple[list[int], str, str]] = []  # layers, quantizer, implementation
    if all(budget.batch_size is None for budget in built.budgets):
        choice = {built.covered(c)[0]: built.labels[problem.choice[c]] for c in columns}
        kernels = _free_fusion(built, choice)
    else:
        for c in columns:
            name = built.implementations[built.implementation[c]]
            kernels.append((built.covered(c), built.labels[problem.choice[c]], name))
    names = built.profile.layer_names
    entries = {}
    for members, quantizer, implementation in kernels:
        pattern = tuple(names[i] for i in members)
        for i in members:
            entries[i] = PlannedLayer(
                layer=names[i], quantizer=quantizer, implementation=implementation, pattern=pattern
            )
    return [entries[i] for i in sorted(entries)]


def _free_fusion(built: BuiltProblem, choice: dict[int, str]) -> list[tuple[list[int], str, str]]:
    """Kernels for layers whose quantizers are settled: in every group the partition that runs fastest.

    Fastest at the smallest measured batch size, after having as few layers as possible on an unmeasured
    reference. Equal groups with equal quantizers are worked out once.
    """
    batch = min(built.profile.batch_sizes, default=0)
    kernels = built.kernels[built.kernels["batch_size"] == batch]
    chosen: list[tuple[list[int], str, str]] = []
    for signature, members in signatures(built.profile.layers, built.group_start).items():
        matched = match_patterns(kernels, signature)
        fastest = matched.sort_values(["latency_us", "implementation"]).drop_duplicates(["mask", "quantizer"])
        columns = (fastest[name] for name in ("mask", "quantizer", "implementation", "latency_us"))
        options = [(int(m), str(q), str(i), float(us)) for m, q, i, us in zip(*columns, strict=True)]
        known: dict[tuple[str, ...], tuple[tuple[int, str], ...]] = {}
        for start in built.group_start[members].tolist():
            labels = tuple(choice[start + bit] for bit in range(len(signature)))
            if labels not in known:
                known[labels] = _fastest_partition(labels, options, reference=built.reference_allowed)
            for mask, implementation in known[labels]:
                bits = [bit for bit in range(len(labels)) if mask >> bit & 1]
                chosen.append(([start + bit for bit in bits], labels[bits[0]], implementation))
    return chosen


def _fastest_partition(
    labels: tuple[str, ...], options: list[tuple[int, str, str, float]], *, reference: bool
) -> tuple[tuple[int, str], ...]:
    """(mask, implementation) of the kernels that cover layers with these quantizers.

    Args:
        labels: quantizer of each layer of a group.
        options: (mask, quantizer, implementation, µs) of measured kernels.
        reference: whether a layer may run unmeasured, on `REFERENCE`.
    """
    usable = [
        (mask, name, us)
        for mask, quantizer, name, us in options
        if all(label == quantizer for bit, label in enumerate(labels) if mask >> bit & 1)
    ]

    @cache
    def best(missing: int) -> tuple[int, float, tuple[tuple[int, str], ...]]:
        """Least (unmeasured layers, µs) to cover the missing layers, and how."""
        if missing == 0:
            return 0, 0.0, ()
        low = missing & -missing
        found = [(0, mask, name, us) for mask, name, us in usable if mask & low and mask & ~missing == 0]
        if reference:
            found.append((1, low, REFERENCE, 0.0))
        answers = []
        for unmeasured, mask, name, us in found:
            rest = best(missing & ~mask)
            answers.append((unmeasured + rest[0], us + rest[1], ((mask, name), *rest[2])))
        return min(answers, default=(len(labels) + 1, math.inf, ()))

    return best((1 << len(labels)) - 1)[2]


def fastest_kernels(problem: Problem, plan: Integers) -> Integers:
    """The plan's quantizers on the kernels and fusions that use least, of caps taken together; (chosen,) columns.

    A solver minimises the loss alone, so of plans with the same quantizers it may return any that meets the caps.
    """
    chosen = np.empty(int(problem.group_sizes.sum()), dtype=np.int64)
    position, layer = problem.covers(plan)
    chosen[layer] = problem.choice[plan[position]]
    column, layer = problem.covers(np.arange(problem.columns))
    differs = np.bincount(column, problem.choice[column] != chosen[layer], problem.columns) > 0
    scale = np.where(problem.caps > 0, problem.caps, 1.0)
    use = (problem.usage / scale[:, None]).sum(axis=0)
    _, faster = problem.structure.evaluate(np.where(differs, float(use.sum()) + 1.0, use))
    kept = not differs[faster].any() and fits(problem, faster) and use[faster].sum() < use[plan].sum()
    return np.asarray(np.sort(faster) if kept else plan)
