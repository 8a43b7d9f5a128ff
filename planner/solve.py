"""From a profile and budgets to a plan: build, solve, check, choose kernels, promise.

A solver is never trusted. The chosen columns are checked by `solvers.check`; the promises are recomputed from
the profile's tables alone, out of the finished list of layers, and must agree with what was solved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from .. import __version__
from ..profiles.tables import Profile
from ..solvers.check import CAP_TOLERANCE, check
from ..solvers.errors import SolverError
from ..solvers.reach import reachable
from ..solvers.registry import get_solver
from ..solvers.solution import Solution, Status
from .budget import Budget
from .errors import InfeasibleBudgetError, PlanError
from .plan import (
    Plan,
    PlanBudget,
    PlanModel,
    PlannedLayer,
    PlanProfile,
    PlanQuantizer,
    Promise,
    SolverReport,
)
from .problem_builder import REFERENCE, BuiltProblem, build_problem, match_patterns, signatures

_AGREEMENT = 1e-9
"""Relative difference allowed between a sum over columns and the same sum over layers."""


def make_plan(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
    solver: str = "lagrangian",
    time_limit: float = 60.0,
    rel_gap: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> Plan:
    """The best plan that `solver` finds within the budgets.

    Args:
        profile, budgets, quantizers, implementations, fusion: see `build_problem`.
        solver: name of a backend.
        time_limit: seconds.
        rel_gap: a plan proven to be this close to the best counts as optimal.
        seed: for backends that draw numbers.
        threads: most threads to use.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets; says what is within reach.
        PlanError: the input is wrong, or the solver ended with neither a plan nor a proof.
    """
    try:
        built = build_problem(profile, budgets, quantizers=quantizers, implementations=implementations, fusion=fusion)
        solution = get_solver(solver).solve(
            built.problem, time_limit=time_limit, rel_gap=rel_gap, seed=seed, threads=threads
        )
        if solution.columns is None:
            raise _no_plan(built, solution, time_limit)
    except SolverError as cause:
        raise PlanError(f"{str(cause).rstrip('.')}.") from cause
    return plan_of(built, solution)


def plan_of(built: BuiltProblem, solution: Solution) -> Plan:
    """The plan that a solution with columns stands for, checked and with its promises recomputed.

    Raises:
        PlanError: the solution does not hold.
    """
    report = check(built.problem, solution.columns if solution.columns is not None else [])
    if not report.feasible or solution.columns is None:
        raise PlanError(f"the plan of solver '{solution.solver}' does not hold: {report.message}.")
    layers = _assign(built, [int(column) for column in solution.columns])
    profile = built.profile
    promised = promise(profile, layers)
    _check_promise(built, promised, report.loss)
    used = {entry.quantizer for entry in layers}
    multipliers = solution.multipliers
    manifest = profile.manifest
    return Plan(
        msq_version=__version__,
        model=PlanModel(
            name=manifest.model.name,
            architecture=manifest.model.architecture,
            blocks=manifest.model.blocks,
            digest=manifest.model.digest,
        ),
        profile=PlanProfile(digest=profile.digest, device=manifest.device.name, seed=manifest.loss.seed or 0),
        budgets=tuple(
            PlanBudget(text=b.text, resource=b.resource, cap=float(cap), batch_size=b.batch_size)
            for b, cap in zip(built.budgets, built.problem.caps, strict=True)
        ),
        promised=promised,
        solver=SolverReport(
            name=solution.solver,
            status="optimal" if solution.status is Status.OPTIMAL else "feasible",
            objective=report.loss,
            lower_bound=_finite(solution.lower_bound),
            gap=_finite(solution.gap),
            shadow_prices=None
            if multipliers is None
            else {b.name: float(price) for b, price in zip(built.budgets, multipliers, strict=True)},
            seconds=solution.seconds,
            columns=built.problem.columns,
        ),
        quantizers={
            label: PlanQuantizer(family=spec.family, bits=spec.bits, state_bits=spec.state_bits)
            for label, spec in ((label, profile.spec(label)) for label in built.labels if label in used)
        },
        layers=tuple(layers),
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `msq plan --json` prints: promises and proof, null for what isn't known, batch sizes as text."""
    report, promised = plan.solver, plan.promised
    return {
        "status": report.status,
        "objective": report.objective,
        "lower_bound": report.lower_bound,
        "gap": report.gap,
        "loss": promised.loss,
        "memory_bytes": promised.memory_bytes,
        "bits_per_weight": promised.bits_per_weight,
        "latency_us": {str(batch): latency for batch, latency in promised.latency_us.items()},
        "budgets": [budget.model_dump(mode="json") for budget in plan.budgets],
        "shadow_prices": report.shadow_prices,
        "solver": report.name,
        "solve_seconds": report.seconds,
        "columns": report.columns,
        "model": plan.model.name,
        "device": plan.profile.device,
        "profile_digest": plan.profile.digest,
    }


def promise(profile: Profile, layers: Sequence[PlannedLayer]) -> Promise:
    """What the profile's tables say about an assignment of all its layers.

    Latency at a batch size is null when any kernel was not measured there.

    Raises:
        PlanError: the layers are not those of the profile.
    """
    position = {name: row for row, name in enumerate(profile.layer_names)}
    if {entry.layer for entry in layers} != position.keys() or len(layers) != len(position):
        raise PlanError(f"expected an assignment of the profile's {len(position)} layers; got {len(layers)}.")
    column = {label: i for i, label in enumerate(profile.labels)}
    cells = [(position[entry.layer], column[entry.quantizer]) for entry in layers]
    sensitivity = profile.layers["sensitivity"].to_numpy(np.float64)
    memory = math.fsum(profile.size_matrix[cell] for cell in cells)
    return Promise(
        loss=math.fsum(float(sensitivity[cell[0]]) * float(profile.error_matrix[cell]) for cell in cells),
        memory_bytes=int(memory),
        bits_per_weight=8 * memory / int(profile.layer_weights.sum()),
        latency_us=_promised_latency(profile, layers, position),
    )


def _promised_latency(
    profile: Profile, layers: Sequence[PlannedLayer], position: dict[str, int]
) -> dict[int, float | None]:
    if profile.latency is None or profile.manifest.latency is None:
        return {}
    keys = ["pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size"]
    measured = profile.latency.set_index(keys)["latency_us"].to_dict()
    roles = profile.layers["role"].tolist()
    rows, width = profile.layers["out_features"].tolist(), profile.layers["in_features"].tolist()
    kernels = []
    for entry in layers:
        if entry.layer != entry.pattern[0]:
            continue
        members = [position[name] for name in entry.pattern]
        shape = (sum(rows[i] for i in members), width[members[0]])
        kernels.append(("+".join(roles[i] for i in members), *shape, entry.quantizer, entry.implementation))
    totals: dict[int, float | None] = {}
    for batch in profile.batch_sizes:
        times = [measured.get((*kernel, batch)) for kernel in kernels]
        known = [float(time) for time in times if time is not None]
        overhead = profile.manifest.latency.overhead_us[batch]
        totals[batch] = math.fsum([overhead, *known]) if len(known) == len(times) else None
    return totals


def _assign(built: BuiltProblem, columns: list[int]) -> list[PlannedLayer]:
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


def _check_promise(built: BuiltProblem, promised: Promise, loss: float) -> None:
    """The tables must say what the solver was told, and the budgets must hold."""
    if abs(promised.loss - loss) > _AGREEMENT * max(loss, promised.loss):
        raise PlanError(f"the tables give a loss of {promised.loss!r}, the solved problem {loss!r}; report this.")
    for budget, cap in zip(built.budgets, built.problem.caps, strict=True):
        used = promised.memory_bytes if budget.batch_size is None else promised.latency_us[budget.batch_size]
        if used is None or used > cap * (1 + CAP_TOLERANCE + _AGREEMENT):
            raise PlanError(f'the tables give {used!r} for "{budget.text}", above its cap {cap!r}; report this.')


def _no_plan(built: BuiltProblem, solution: Solution, time_limit: float) -> PlanError:
    """Why there is no plan: what each budget could reach, alone and together."""
    problem, budgets = built.problem, built.budgets
    reach = reachable(problem)
    if solution.status is not Status.INFEASIBLE and not reach.proven_infeasible:
        return PlanError(
            f"solver '{solution.solver}' found neither a plan nor a proof that there is none within "
            f"{time_limit:g} s; allow more time, try another solver, or loosen a budget."
        )
    least = [float(amount) for amount in reach.minimum_usage]
    short = [i for i, (amount, cap) in enumerate(zip(least, problem.caps, strict=True)) if amount > cap]
    sentences = [f"{budgets[i].text} can't be met: {_within_reach(built, i, least[i])}" for i in short]
    if sentences:
        return InfeasibleBudgetError(f"{'; '.join(sentences)}; {_remedy([budgets[i] for i in short])}.")
    if len(budgets) == 1:
        return PlanError(
            f"solver '{solution.solver}' says that {budgets[0].text} can't be met, yet {budgets[0].in_unit(least[0])} "
            "is within reach; try another solver and report this."
        )
    alone = ", ".join(f"{budget.in_unit(least[i])}" for i, budget in enumerate(budgets))
    factor = f" by a factor of at least {reach.common_scale:.4g}" if reach.common_scale > 1 else ""
    return InfeasibleBudgetError(
        f"{' and '.join(b.text for b in budgets)} can't be met together: each alone could be as tight as {alone}, "
        f"together all must be loosened{factor}; {_remedy(budgets)}."
    )


def _within_reach(built: BuiltProblem, i: int, least: float) -> str:
    budget = built.budgets[i]
    if budget.resource == "memory":
        size = f" ({math.ceil(least / 2**20 * 100) / 100:.2f} MiB)" if budget.unit == "bpw" else ""
        return f"the least that these quantizers reach is {budget.in_unit(least)}{size}"
    overhead = float(built.problem.base[i])
    word = "most" if budget.unit == "tps" else "least"
    return f"the {word} that these kernels reach is {budget.in_unit(least)} ({overhead:.0f} us of a step are overhead)"


def _remedy(budgets: Sequence[Budget]) -> str:
    wanted = {"memory": "smaller quantizers", "latency": "faster kernels"}
    offers = dict.fromkeys(wanted[budget.resource] for budget in budgets)
    return f"loosen the budget{'s' if len(budgets) > 1 else ''}, or offer {' and '.join(offers)}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
