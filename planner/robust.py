"""How far a plan depends on the noise in the measured sensitivities, and plans that depend on it less.

Every layer's sensitivity a_l was measured with a standard error s_l (layers.csv). Samples are drawn from N(a_l, s_l)
independently per layer, cut off at zero. `stability` plans again for every sample and counts how often a layer's
quantizer changes. `robust_solution` looks for a plan of small upper quantile of loss over the samples: candidates
are the plans that are best for a_l + z s_l at several z (the safety margin that a sum of independent errors asks for
lies between none and that of every layer at its worst), and the candidate of least quantile is the answer. z = 0 is
among them, so the answer is never worse than the ordinary plan by that measure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..solvers.base import Solver
from ..solvers.check import check
from ..solvers.solution import Solution, Status
from .constraints import Constrained
from .errors import PlanError
from .problem_builder import BuiltProblem

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MARGINS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""z of the candidates."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan that is best at one margin.

    Attributes:
        margin: z, in standard errors.
        columns: (chosen,) of the plan.
        loss: with the measured sensitivities.
        quantile: of its loss over the samples.
    """

    margin: float
    columns: Integers
    loss: float
    quantile: float


@dataclass(frozen=True, eq=False)
class Robust:
    """The plan of least upper quantile.

    Attributes:
        solution: its columns; objective with the measured sensitivities, bound of the ordinary problem.
        chosen: the candidate that it is.
        nominal: the ordinary plan, for comparison.
        candidates: all, by rising margin; different margins may give the same plan.
        samples: on which they were judged.
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
        samples: how many samples had a plan.
    """

    changes: Floats
    regret: Floats
    samples: int

    def to_json(self, layers: Sequence[str]) -> dict[str, Any]:
        """For `msq plan --json`; `layers` names the layers."""
        changes = dict(zip(layers, self.changes.tolist(), strict=True))
        return {"samples": self.samples, "mean_regret": float(self.regret.mean()), "changes": changes}


def sample_sensitivities(built: BuiltProblem, samples: int, seed: int) -> Floats:
    """Sensitivities drawn from the measurement; (samples, layers), >= 0.

    Raises:
        PlanError: fewer than one sample, or the profile has no standard errors.
    """
    if samples < 1:
        raise PlanError(f"expected at least one sample; got {samples}.")
    measured = built.profile.layers["sensitivity"].to_numpy(np.float64)
    noise = np.random.default_rng(seed).normal(size=(samples, measured.size))
    return np.maximum(measured + noise * standard_errors(built), 0.0)


def standard_errors(built: BuiltProblem) -> Floats:
    """Of each layer's sensitivity; (layers,).

    Raises:
        PlanError: the profile has none.
    """
    layers = built.profile.layers
    if "standard_error" not in layers or not np.isfinite(layers["standard_error"].to_numpy(np.float64)).all():
        raise PlanError(
            "the profile has no standard errors of the sensitivities; measure it again with `msq profile`, or plan "
            "without robustness."
        )
    return layers["standard_error"].to_numpy(np.float64)


def robust_solution(
    constrained: Constrained,
    solver: Solver,
    nominal: Solution,
    *,
    quantile: float = 0.95,
    samples: int = 1000,
    margins: Sequence[float] = MARGINS,
    time_limit: float = 60.0,
    seed: int = 0,
) -> Robust:
    """The plan of least upper quantile of the loss.

    Args:
        constrained: supplies the problem, sensitivities, errors and what columns stand for.
        solver: solves once per margin above 0.
        nominal: the ordinary solution, with a plan: the candidate of margin 0.
        quantile: such as 0.95; between 0 and 1.
        samples: on which plans are judged.
        margins: z of the candidates, >= 0.
        time_limit: seconds for all solves together.
        seed: of the samples and of the solver.

    Raises:
        PlanError: an argument is wrong, or the profile has no standard errors.
    """
    if not 0 < quantile < 1:
        raise PlanError(f"expected a quantile between 0 and 1, such as 0.95; got {quantile}.")
    if any(not 0 <= margin < np.inf for margin in margins):
        raise PlanError(f"expected margins of at least 0 standard errors; got {list(margins)}.")
    if nominal.columns is None:
        raise PlanError("expected a solution with a plan to start from; solve the ordinary problem first.")
    problem = constrained.problem
    errors = standard_errors(constrained.built)
    drawn = sample_sensitivities(constrained.built, samples, seed)
    cover = _LayerErrors(constrained)

    def candidate(margin: float, columns: Integers) -> Candidate:
        losses = drawn @ cover.of_plan(columns)
        return Candidate(margin, columns, check(problem, columns).loss, float(np.quantile(losses, quantile)))

    candidates = [candidate(0.0, nominal.columns)]
    zs = sorted({*margins} - {0.0})
    for margin in zs:
        marked = dataclasses.replace(problem, loss=problem.loss + margin * cover.losses(errors))
        warm = candidates[-1].columns
        found = solver.solve(marked, time_limit=time_limit / len(zs), seed=seed, warm_start=warm)
        if found.columns is not None:
            candidates.append(candidate(margin, found.columns))
    best = min(candidates, key=lambda one: (one.quantile, one.margin))
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
    seed: int = 0,
) -> Stability:
    """How often each layer's quantizer changes when the sensitivities are drawn anew.

    Args:
        constrained: see `robust_solution`.
        columns: the plan, columns of `constrained.problem`.
        solver: solves once per sample.
        samples: number of draws.
        time_limit: seconds for all solves together.
        seed: of the samples and of the solver.

    Raises:
        PlanError: the profile has no standard errors, `columns` is no plan, or no sample had one.
    """
    problem = constrained.problem
    plan = np.asarray(columns, dtype=np.int64)
    report = check(problem, plan)
    if not report.partition_ok:
        raise PlanError(f"expected the columns of a plan of this problem; {report.message}.")
    cover = _LayerErrors(constrained)
    own = cover.choices(plan)
    changes = np.zeros(own.size)
    regret = []
    for drawn in sample_sensitivities(constrained.built, samples, seed):
        resampled = dataclasses.replace(problem, loss=cover.losses(drawn))
        solution = solver.solve(resampled, time_limit=time_limit / samples, seed=seed, warm_start=plan)
        if solution.columns is None:
            continue
        changes += cover.choices(solution.columns) != own
        least = float(drawn @ cover.of_plan(solution.columns))
        loss = float(drawn @ cover.of_plan(plan))
        regret.append((loss - least) / least if least > 0 else 0.0)
    if not regret:
        raise PlanError("no sample could be planned; allow more time or loosen a budget.")
    return Stability(changes / len(regret), np.array(regret), len(regret))


class _LayerErrors:
    """The normalised error of every (column, layer that it covers)."""

    def __init__(self, constrained: Constrained) -> None:
        built, problem = constrained.built, constrained.problem
        self.columns, self.layers = problem.columns, len(built.profile.layers)
        bits = np.arange(int(problem.group_sizes.max()))
        self.column, bit = np.nonzero((problem.mask[:, None] >> bits & 1).astype(bool))
        self.layer = built.group_start[problem.group[self.column]] + bit
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
