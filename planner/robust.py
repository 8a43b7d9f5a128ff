"""How far a plan depends on the noise in the measured sensitivities, and plans that depend on it less.

Every layer's sensitivity a_l was measured with a standard error s_l (layers.csv). Samples are drawn from N(a_l, s_l)
independently per layer, cut off at zero. `stability` plans again for every sample and counts how often a layer's
quantizer changes. `robust_solution` looks for a plan of small upper quantile of the loss over the samples. The loss of
a plan with errors e_l is close to normal, of mean sum a_l e_l and variance sum s_l^2 e_l^2, so its quantile is about
mean + z sigma; linearised at a plan of errors e0 that is a sum over layers again, with a_l + z s_l^2 e0_l / sigma0 in
place of a_l. Starting from the ordinary plan, each step solves that problem for the next candidate. The candidate of
least quantile over one set of samples is the answer; the quantiles that are reported come from another set. The
ordinary plan is a candidate too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ..profiles.tables import Profile
from ..solvers.base import Solver
from ..solvers.check import check
from ..solvers.solution import Solution, Status
from .constraints import Constrained
from .errors import PlanError
from .problem_builder import BuiltProblem

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STEPS = 5
"""Most candidates beyond the ordinary plan."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan to choose from.

    Attributes:
        step: 0 for the ordinary plan, then the number of the linearisation that it is best for.
        columns: (chosen,) of the plan.
        loss: with the measured sensitivities.
        choosing_quantile: of its loss over the samples by which plans are chosen.
        quantile: of its loss over the other samples.
    """

    step: int
    columns: Integers
    loss: float
    choosing_quantile: float
    quantile: float


@dataclass(frozen=True, eq=False)
class Robust:
    """The plan of least upper quantile.

    Attributes:
        solution: its columns; objective with the measured sensitivities, bound of the ordinary problem.
        chosen: the candidate that it is.
        nominal: the ordinary plan, for comparison.
        candidates: all, in the order of their steps.
        samples: in each of the two sets.
    """

    solution: Solution
    chosen: Candidate
    nominal: Candidate
    candidates: tuple[Candidate, ...]
    samples: int


@dataclass(frozen=True, eq=False)
class Stability:
    """What resampling does to the plan.

    Attributes:
        changes: (layers,) share of samples in which the layer's quantizer differs from the plan's.
        regret: (samples,) loss of the plan less that of the sample's own best plan, relative to the latter, both
            with the sample's sensitivities.
        samples: how many samples were planned with proof: only these count.
        unproven: how many were not, for want of time.
    """

    changes: Floats
    regret: Floats
    samples: int
    unproven: int

    def to_json(self, layers: Sequence[str]) -> dict[str, Any]:
        """For `msq plan --json`; `layers` names the layers."""
        changes = dict(zip(layers, self.changes.tolist(), strict=True))
        counts = {"samples": self.samples, "unproven": self.unproven}
        return counts | {"mean_regret": float(self.regret.mean()), "changes": changes}


def sample_sensitivities(built: BuiltProblem, samples: int, seed: int) -> Floats:
    """Sensitivities drawn from the measurement; (samples, layers), >= 0.

    Raises:
        PlanError: fewer than one sample, or the profile has no standard errors.
    """
    if samples < 1:
        raise PlanError(f"expected at least one sample; got {samples}.")
    measured = built.profile.sensitivities
    noise = np.random.default_rng(seed).normal(size=(samples, measured.size))
    return np.maximum(measured + noise * standard_errors(built.profile), 0.0)


def standard_errors(profile: Profile) -> Floats:
    """Of each layer's sensitivity; (layers,).

    Raises:
        PlanError: the profile has none.
    """
    layers = profile.layers
    if "standard_error" not in layers or not np.isfinite(layers["standard_error"].to_numpy(np.float64)).all():
        raise PlanError(
            "the profile has no standard errors of the sensitivities; measure it again with `msq profile`, or plan "
            "without --robust and --stability."
        )
    return layers["standard_error"].to_numpy(np.float64)


def check_quantile(quantile: float) -> None:
    """Refuses what isn't an upper quantile.

    Raises:
        PlanError: below 0.5, or not below 1.
    """
    if not 0.5 <= quantile < 1:
        raise PlanError(f"expected a quantile of at least 0.5 and below 1, such as 0.95; got {quantile}.")


def robust_solution(
    constrained: Constrained,
    solver: Solver,
    nominal: Solution,
    *,
    quantile: float = 0.95,
    samples: int = 5000,
    time_limit: float = 60.0,
    rel_gap: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> Robust:
    """The plan of least upper quantile of the loss.

    Args:
        constrained: supplies the problem, sensitivities, errors and what columns stand for.
        solver: solves once per step.
        nominal: the ordinary solution, with a plan.
        quantile: such as 0.95; at least 0.5 and below 1.
        samples: in each of the two sets.
        time_limit: seconds for all solves together.
        rel_gap, threads: of each solve.
        seed: of the samples and of the solver.

    Raises:
        PlanError: an argument is wrong, or the profile has no standard errors.
    """
    check_quantile(quantile)
    if nominal.columns is None:
        raise PlanError("expected a solution with a plan to start from; solve the ordinary problem first.")
    problem = constrained.problem
    errors = standard_errors(constrained.built.profile)
    measured = constrained.built.profile.sensitivities
    drawn = sample_sensitivities(constrained.built, 2 * samples, seed)
    cover = _LayerErrors(constrained)
    z = NormalDist().inv_cdf(quantile)

    def candidate(step: int, columns: Integers) -> Candidate:
        losses = drawn @ cover.of_plan(columns)
        quantiles = (float(np.quantile(part, quantile)) for part in (losses[:samples], losses[samples:]))
        return Candidate(step, columns, check(problem, columns).loss, *quantiles)

    candidates = [candidate(0, nominal.columns)]
    for step in range(1, STEPS + 1):
        error = cover.of_plan(candidates[-1].columns)
        deviation = float(np.linalg.norm(errors * error))
        if not deviation:
            break
        weighed = dataclasses.replace(problem, loss=cover.losses(measured + z * errors**2 * error / deviation))
        found = solver.solve(
            weighed,
            time_limit=time_limit / STEPS,
            rel_gap=rel_gap,
            seed=seed,
            threads=threads,
            warm_start=candidates[-1].columns,
        )
        if found.columns is None or any(np.array_equal(found.columns, known.columns) for known in candidates):
            break
        candidates.append(candidate(step, found.columns))
    best = min(candidates, key=lambda one: (one.choosing_quantile, one.step))
    solution = dataclasses.replace(
        nominal,
        columns=best.columns,
        objective=best.loss,
        status=nominal.status if best is candidates[0] else Status.FEASIBLE,
    )
    return Robust(solution, best, candidates[0], tuple(candidates), samples)


def stability(
    constrained: Constrained,
    columns: npt.ArrayLike,
    solver: Solver,
    *,
    samples: int = 50,
    time_limit: float = 60.0,
    rel_gap: float = 1e-4,
    seed: int = 0,
    threads: int = 1,
) -> Stability:
    """How often each layer's quantizer changes when the sensitivities are drawn anew.

    Args:
        constrained: see `robust_solution`.
        columns: the plan, columns of `constrained.problem`.
        solver: solves once per sample.
        samples: number of draws.
        time_limit: seconds for all solves together.
        rel_gap, threads: of each solve.
        seed: of the samples and of the solver.

    Raises:
        PlanError: the profile has no standard errors, `columns` is no plan, or no sample could be planned with proof.
    """
    problem = constrained.problem
    plan = np.asarray(columns, dtype=np.int64)
    report = check(problem, plan)
    if not report.partition_ok:
        raise PlanError(f"expected the columns of a plan of this problem; {report.message}.")
    cover = _LayerErrors(constrained)
    own = cover.choices(plan)
    changes = np.zeros(own.size)
    unproven = 0
    regret = []
    for drawn in sample_sensitivities(constrained.built, samples, seed):
        resampled = dataclasses.replace(problem, loss=cover.losses(drawn))
        solution = solver.solve(
            resampled, time_limit=time_limit / samples, rel_gap=rel_gap, seed=seed, threads=threads, warm_start=plan
        )
        if solution.columns is None or solution.status is not Status.OPTIMAL:
            unproven += 1
            continue
        changes += cover.choices(solution.columns) != own
        least = float(drawn @ cover.of_plan(solution.columns))
        loss = float(drawn @ cover.of_plan(plan))
        regret.append((loss - least) / least if least > 0 else 0.0)
    if not regret:
        raise PlanError(
            f"solver '{solver.name}' proved none of the {samples} resampled plans within {time_limit:g} s; allow more "
            "time, ask for fewer samples or choose a solver that proves."
        )
    return Stability(changes / len(regret), np.array(regret), len(regret), unproven)


class _LayerErrors:
    """The normalised error of every (column, layer that it covers)."""

    def __init__(self, constrained: Constrained) -> None:
        built, problem = constrained.built, constrained.problem
        self.columns, self.layers = problem.columns, len(built.profile.layers)
        self.column, self.layer = problem.covers(np.arange(problem.columns))
        self.choice = problem.choice.astype(np.int64)
        labels = np.array([built.profile.labels.index(label) for label in built.labels])
        self.error = built.profile.error_matrix[self.layer, labels[self.choice[self.column]]]

    def losses(self, sensitivity: Floats) -> Floats:
        """Loss of every column with these sensitivities (layers,); (columns,)."""
        return np.bincount(self.column, sensitivity[self.layer] * self.error, self.columns).astype(np.float64)

    def _rows(self, plan: Integers) -> Integers:
        return np.flatnonzero(np.isin(self.column, plan))

    def of_plan(self, plan: Integers) -> Floats:
        """Normalised error of every layer in a plan; (layers,)."""
        rows = self._rows(plan)
        return np.bincount(self.layer[rows], self.error[rows], self.layers).astype(np.float64)

    def choices(self, plan: Integers) -> Integers:
        """Choice of every layer in a plan; (layers,)."""
        rows = self._rows(plan)
        found = np.full(self.layers, -1, dtype=np.int64)
        found[self.layer[rows]] = self.choice[self.column[rows]]
        return found
