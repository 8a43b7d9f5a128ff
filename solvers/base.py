"""What a backend is: abilities as class attributes, and a `solve` whose answers are always rechecked."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .check import CheckReport, check
from .clock import Clock
from .errors import SolverError
from .problem import Problem
from .reach import fits
from .solution import Limit, Solution, Stats, Status, relative_gap
from .structure import Floats, Integers

PROOF_TOLERANCE = 1e-9
"""Rounding allowed on top of the asked relative gap."""
CONTRADICTION_TOLERANCE = 1e-7
"""A bound may exceed the loss of a plan by this much, relative: what mixed-integer solvers make of their tolerances."""


@dataclass(frozen=True)
class Options:
    """Arguments of one solve, checked.

    Attributes:
        clock: started with the solve; knows the time limit.
        rel_gap: relative gap at which to stop.
        seed: for backends that draw numbers.
        threads: most threads to use.
        warm_start: (chosen,) int64 columns that partition every group, perhaps above a cap; or None.
    """

    clock: Clock
    rel_gap: float = 1e-6
    seed: int = 0
    threads: int = 1
    warm_start: Integers | None = None


@dataclass(eq=False)
class Answer:
    """What a backend claims, before the check.

    Attributes:
        columns: the plan, or None.
        lower_bound: proven bound on the loss of every plan, -inf if none.
        infeasible: it is proven that no plan meets the caps.
        optimal: the backend says that its plan is the best within the asked gap.
        limit: what stopped it.
        multipliers: (resources,) shadow prices, or None.
        stats: counts and remarks.
    """

    columns: Integers | None = None
    lower_bound: float = -math.inf
    infeasible: bool = False
    optimal: bool = False
    limit: Limit = Limit.NONE
    multipliers: Floats | None = None
    stats: Stats = field(default_factory=dict)


class Solver(ABC):
    """A backend. Subclasses set the attributes and write `_solve`.

    Attributes:
        name: what users type.
        summary: one line for people.
        max_resources: most resources it handles; None for any number.
        fusion: handles columns that cover several layers.
        exact: given time, reaches and proves the optimum.
        gives_bound: comes with a lower bound on every problem that it solves.
        honours_time_limit: stops near the time limit.
        deterministic: same problem, same answer (unless a time limit strikes).
        side_constraints: handles layers that must share a choice, and a limit on the number of choices.
        requires: top-level modules to import that not every installation has.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    max_resources: ClassVar[int | None] = None
    fusion: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    gives_bound: ClassVar[bool] = False
    honours_time_limit: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    side_constraints: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    def solve(
        self,
        problem: Problem,
        *,
        time_limit: float = 60.0,
        rel_gap: float = 1e-6,
        seed: int = 0,
        threads: int = 1,
        warm_start: npt.ArrayLike | None = None,
    ) -> Solution:
        """Solve and recheck.

        Args:
            problem: what to solve.
            time_limit: seconds of wall time, > 0, may be inf.
            rel_gap: a plan proven to be within this relative gap counts as optimal; >= 0.
            seed: for backends that draw numbers; >= 0.
            threads: most threads to use; >= 1.
            warm_start: columns of a plan to start from. It must cover every layer once; it may exceed a cap.

        Returns:
            a `Solution`. Its objective is recomputed here, `optimal` is said only when the bound supports it,
            a plan that breaks a cap is never returned, and what the backend said wrongly stands in
            ``stats["rejected"]``.

        Raises:
            SolverError: an argument is wrong, the backend can't handle the problem, or a package is missing.
        """
        clock = Clock(time_limit)
        self._check_arguments(time_limit, rel_gap, seed, threads)
        self._check_abilities(problem)
        options = Options(clock, rel_gap, seed, threads, _checked_warm_start(problem, warm_start))
        return self._judge(problem, self._solve(problem, options), options)

    @abstractmethod
    def _solve(self, problem: Problem, options: Options) -> Answer:
        """Find a plan, a bound, or a proof that there is none."""

    @classmethod
    def missing_requirements(cls) -> tuple[str, ...]:
        """The modules of `requires` that aren't installed, found without importing them."""
        return tuple(module for module in cls.requires if importlib.util.find_spec(module) is None)

    def _check_arguments(self, time_limit: float, rel_gap: float, seed: int, threads: int) -> None:
        if not time_limit > 0:
            raise SolverError(f"time_limit: expected seconds > 0, got {time_limit}; use inf for no limit")
        if not 0 <= rel_gap < math.inf:
            raise SolverError(f"rel_gap: expected a number >= 0, got {rel_gap}; 1e-6 is the default")
        if seed < 0 or seed != int(seed):
            raise SolverError(f"seed: expected an integer >= 0, got {seed}")
        if threads < 1 or threads != int(threads):
            raise SolverError(f"threads: expected an integer >= 1, got {threads}")

    def _check_abilities(self, problem: Problem) -> None:
        missing = self.missing_requirements()
        if missing:
            raise SolverError(
                f"solver {self.name!r} needs {', '.join(missing)}, which can't be imported here; install it "
                "or choose another solver"
            )
        if self.max_resources is not None and problem.resources > self.max_resources:
            raise SolverError(
                f"solver {self.name!r} handles at most {self.max_resources} budgets, the problem has "
                f"{problem.resources} ({', '.join(problem.resource_names)}); drop one or choose "
                "another solver"
            )
        if not self.fusion and bool((problem.mask & (problem.mask - 1)).any()):
            raise SolverError(
                f"solver {self.name!r} can't handle columns that fuse layers; leave out the fusion "
                "patterns or choose another solver"
            )
        if problem.has_side_constraints and not self.side_constraints:
            raise SolverError(
                f"solver {self.name!r} can't handle layers that must share a choice, nor a limit on the number of "
                "choices; leave these out or choose scip, highs or cp_sat"
            )

    def _judge(self, problem: Problem, answer: Answer, options: Options) -> Solution:
        """Recompute the plan and keep of the claims what holds."""
        stats = dict(answer.stats)
        rejected: list[str] = []
        columns, report = _accepted(problem, answer.columns, rejected)
        objective = report.loss if report is not None else math.inf
        lower_bound = float(answer.lower_bound)
        if math.isnan(lower_bound):
            rejected.append("its bound is not a number")
            lower_bound = -math.inf
        infeasible = answer.infeasible
        if columns is not None:
            if infeasible:
                rejected.append("it says infeasible, its own plan meets the caps")
                infeasible = False
            if lower_bound > objective + CONTRADICTION_TOLERANCE * abs(objective):
                rejected.append(f"its bound {lower_bound:.12g} is above the loss of its own plan")
                lower_bound = -math.inf
            lower_bound = min(lower_bound, objective)
        proven = relative_gap(objective, lower_bound) <= options.rel_gap + PROOF_TOLERANCE
        if columns is not None:
            status = Status.OPTIMAL if proven else Status.FEASIBLE
            if answer.optimal and not proven:
                rejected.append("it says optimal, its bound doesn't prove that")
        else:
            status = Status.INFEASIBLE if infeasible else Status.UNKNOWN
            lower_bound = math.inf if infeasible else lower_bound
        if rejected:
            stats["rejected"] = "; ".join(rejected)
        return Solution(
            columns=columns,
            objective=objective,
            lower_bound=lower_bound,
            status=status,
            limit=Limit.NONE if status in (Status.OPTIMAL, Status.INFEASIBLE) else answer.limit,
            solver=self.name,
            seconds=options.clock.seconds,
            multipliers=answer.multipliers,
            stats=stats,
        )


def _accepted(
    problem: Problem, columns: Integers | None, rejected: list[str]
) -> tuple[Integers | None, CheckReport | None]:
    """The plan in its final form with its report, or None and a remark if it doesn't hold."""
    if columns is None:
        return None, None
    plan = np.sort(np.asarray(columns, dtype=np.int64))
    report = check(problem, plan)
    if not report.feasible:
        rejected.append(f"its plan doesn't hold: {report.message}")
        return None, None
    if not fits(problem, plan):
        rejected.append("its plan exceeds a cap by more than rounding, though by less than the checker allows")
        return None, None
    plan.flags.writeable = False
    return plan, report


def _checked_warm_start(problem: Problem, warm_start: npt.ArrayLike | None) -> Integers | None:
    if warm_start is None:
        return None
    array = np.asarray(warm_start)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SolverError(
            f"warm_start: expected a list of column numbers, got {array.dtype} of shape {array.shape}; pass "
            "Solution.columns of an earlier solve"
        )
    report = check(problem, array)
    if not report.partition_ok:
        raise SolverError(
            f"warm_start: expected columns that cover every layer once, but {report.message}; pass a plan of "
            "this very problem"
        )
    return np.sort(array.astype(np.int64))
