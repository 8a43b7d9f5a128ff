"""Proven optima: dual, reduced-cost fixing, bounded dynamic programme, and a residual programme where that fails.

The dual (see `dual`) bounds every plan from below and leaves a gap of 1e-4 or less to the optimum on tables of
real models. The bounded programme (see `search`, `programme`) lists all plans of loss below ``dual + delta`` that
could be best; delta starts small and grows until it covers the gap to the best plan, which is then proven optimal,
or until the programme exceeds its size. What is left then, the columns whose deviation is within the gap, goes to a
mixed-integer solver (see `residual`).

The programme costs milliseconds as long as it stays small, so it is carried on to a gap of 1e-10 even when the
caller asks for less; large programmes, millions of columns and the residual get the gap that was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .base import PROOF_TOLERANCE, Answer, Options, Solver
from .configurations import Penalties, enumerate_configurations
from .dual import Dual, priced, solve_dual
from .lagrangian import relax_and_repair
from .problem import Problem
from .reach import fits, usable_caps
from .residual import solve_residual
from .search import search
from .solution import Limit, Stats, relative_gap
from .structure import Integers, distinct

FIRST_COLUMNS, FIRST_OF_SEVERAL = 60, 90
"""Columns above the best ones at which delta starts, with one price and with several."""
GROWTH = 2.0
"""Factor of delta from round to round; its cube with one resource, whose programme grows slowly."""
POLISHED = 500_000
"""Columns up to which the programme goes on below the asked gap; beyond, every round takes a tenth of a second."""
EMPTY_GROWTH = 3.0
"""Most of that after a round in which no plan could be, which costs little."""
NEAR = 0.1
"""Delta goes at least so far beyond the least that a plan deviates by, relative."""
LAST_STEP = 1.25
"""Delta is set to the whole gap if that takes no more than this factor."""
MAX_RESIDUAL = 5_000
"""Most columns of the residual: HiGHS doesn't stop near its time limit in the presolve of much larger ones."""
SMALL, LARGE = 150_000, 400_000
"""Partial plans of the same groups: what is always tried, and what is tried for the asked gap."""
ALL_SMALL, ALL_LARGE = 5_000_000, 50_000_000
"""Partial plans of all groups together, likewise, where several resources have a price: a million take two seconds."""
CONFIGURATIONS = 20_000
"""Most configurations of the programme, beyond one for every group."""


class ExactSolver(Solver):
    """Dual, reduced-cost fixing, bounded dynamic programme, residual programme."""

    name = "exact"
    summary = "proven optimum: dual, reduced-cost fixing, bounded dynamic programme, residual programme"
    exact = True
    gives_bound = True

    def _solve(self, problem: Problem, options: Options) -> Answer:
        affordable = affordable_columns(problem)
        if affordable.size < problem.columns:
            return self._solve_part(problem, affordable, options)
        dual = solve_dual(problem, options.clock)
        if dual.infeasible:
            return Answer(lower_bound=math.inf, infeasible=True, stats={"infeasible_by": "dual"})
        return _Proof(problem, options, dual).run()

    def _solve_part(self, problem: Problem, columns: Integers, options: Options) -> Answer:
        """Solve with some of the columns, where no plan that meets the caps has others.

        Columns far above a cap would drown the others' uses in rounding.
        """
        if problem.uncovered_groups(columns).size:
            return Answer(infeasible=True, lower_bound=math.inf, stats={"infeasible_by": "columns above a cap"})
        warm = options.warm_start
        if warm is not None:
            warm = np.searchsorted(columns, warm) if np.isin(warm, columns).all() else None
        answer = self._solve(problem.with_columns(columns), replace(options, warm_start=warm))
        if answer.columns is not None:
            answer.columns = columns[answer.columns]
        return answer


def affordable_columns(problem: Problem) -> Integers:
    """The columns that exceed no cap by themselves, ascending."""
    room = usable_caps(problem) - problem.base
    return np.flatnonzero((problem.usage <= room[:, None]).all(axis=0))


@dataclass(eq=False)
class _Best:
    """The best plan so far; loss inf without one."""

    columns: Integers | None = None
    loss: float = math.inf


class _Proof:
    """One solve: bounds that close in on each other."""

    def __init__(self, problem: Problem, options: Options, dual: Dual) -> None:
        self.problem, self.options = problem, options
        self.multipliers = dual.multipliers
        self.cost = priced(problem, dual.multipliers)
        self.dual = problem.structure.evaluate(self.cost)[0] - float(dual.multipliers @ problem.room)
        self.lower_bound = max(self.dual, dual.value)
        self.penalties = Penalties.build(problem.structure, self.cost)
        self.deviations = self.penalties.total
        self.best = _Best()
        self.delta = self._first_delta()
        self.growth = GROWTH if np.count_nonzero(dual.multipliers) > 1 else GROWTH**3
        self.stats: Stats = {"evaluations": dual.evaluations, "dual_bound": self.lower_bound}
        for plan in dual.plans:
            self._offer(plan)
        if options.warm_start is not None:
            self._offer(options.warm_start)

    def run(self) -> Answer:
        """Small programme, local search, large programme, residual."""
        goal = self.options.rel_gap
        polished = self.problem.columns <= POLISHED
        finished = self._grow(SMALL, ALL_SMALL, min(goal, PROOF_TOLERANCE / 10) if polished else goal)
        if not finished and self._gap() > goal:
            self._offer(relax_and_repair(self.problem, self.options).columns)
            finished = self._grow(LARGE, ALL_LARGE, goal)
        infeasible = False
        if not finished and self._gap() > goal and not self.options.clock.over:
            infeasible = self._residual()
        elif finished and self.best.columns is None:
            infeasible = True
        self.stats["kept_columns"] = int(np.count_nonzero(self.deviations <= self.best.loss - self.dual))
        proven = infeasible or self._gap() <= goal + PROOF_TOLERANCE
        limited = not proven and self.options.clock.over
        return Answer(
            columns=self.best.columns,
            lower_bound=math.inf if infeasible else min(self.lower_bound, self.best.loss),
            infeasible=infeasible,
            optimal=proven and not infeasible,
            limit=Limit.TIME if limited else Limit.NONE,
            multipliers=self.multipliers,
            stats=self.stats,
        )

    def _gap(self) -> float:
        return relative_gap(self.best.loss, self.lower_bound)

    def _offer(self, plan: Integers | None) -> bool:
        """Keep a plan if it meets the caps and is the best; whether it meets them."""
        if plan is None or not fits(self.problem, plan):
            return False
        loss = math.fsum(self.problem.loss[plan].tolist())
        if loss < self.best.loss:
            self.best = _Best(plan, loss)
        return True

    def _grow(self, limit: int, total: int, goal: float) -> bool:
        """Run the programme with growing delta until the gap is at most `goal`.

        Returns:
            whether it is: False when the programme exceeds `limit` or `total`, or time is over. Without a plan,
            True says that there is none.
        """
        delta = self._capped(self.delta)
        rounds = int(self.stats.get("rounds", 0))
        while self._gap() > goal:
            if self.options.clock.over:
                return False
            rounds += 1
            most_configurations = self.problem.groups + CONFIGURATIONS
            near = enumerate_configurations(self.problem, self.penalties, delta, limit=most_configurations)
            most_states = limit
            if np.count_nonzero(self.multipliers) > 1:
                open_groups = distinct(near.group[1:][np.diff(near.group) == 0]).size
                most_states = min(limit, total // max(open_groups, 1))
            found = search(self.problem, near, self.multipliers, delta, limit=most_states, clock=self.options.clock)
            before, self.delta = self.best.loss, delta
            sound = found.columns is None or self._offer(found.columns)
            self.stats |= {"rounds": rounds, "delta": delta, "configurations": near.count}
            self.stats |= {"states": found.states, "pairs": found.pairs}
            if found.complete and sound:
                self.lower_bound = max(self.lower_bound, min(self.dual + delta, self.best.loss))
                if self.best.columns is None and delta >= self._most():
                    return True
                delta = self._capped(self._grown(delta, found.least))
                continue
            if near.complete:
                self.lower_bound = max(self.lower_bound, min(self.dual + min(found.least, delta), self.best.loss))
            if not self.best.loss < before or self._capped(delta) > delta * 0.99:
                return False
            delta = self._capped(delta)
        return True

    def _most(self) -> float:
        """Loss of the worst plan above the dual: a programme up to there leaves out none."""
        return (-self.problem.structure.evaluate(-self.problem.loss)[0] - self.dual) * (1 + 1e-9)

    def _grown(self, delta: float, least: float) -> float:
        """The next delta: partial plans become many with what it leaves above the least that a plan deviates by."""
        if least > delta:  # nothing was there, and what is said of more than delta is a guess
            return max(min(least * (1 + 2 * NEAR), delta * min(self.growth, EMPTY_GROWTH)), delta * LAST_STEP)
        beyond = max(delta - least, NEAR * least)
        return max(min(least + self.growth * beyond, delta * self.growth), delta * LAST_STEP)

    def _capped(self, delta: float) -> float:
        """Delta, or the whole gap where that is not much larger."""
        gap = max(self.best.loss - self.dual, 0.0)
        return gap if gap <= delta * LAST_STEP else delta

    def _first_delta(self) -> float:
        """Delta at which few columns beyond the best ones come into play."""
        positive = self.deviations[(self.deviations > 0) & np.isfinite(self.deviations)]
        first = FIRST_COLUMNS if np.count_nonzero(self.multipliers) <= 1 else FIRST_OF_SEVERAL
        if positive.size > first:
            least = float(np.partition(positive, first)[first])
        else:
            least = float(positive.max(initial=0.0))
        return max(least, self.lower_bound - self.dual, abs(self.dual) * 1e-12, np.finfo(np.float64).tiny)

    def _residual(self) -> bool:
        """Hand what is left to a mixed-integer solver; True if it proves that there is no plan.

        Columns that were fixed cost at least the gap, so its bound holds up to the best plan's loss.
        """
        kept = int(np.count_nonzero(self.deviations <= self.best.loss - self.dual))
        if kept > MAX_RESIDUAL:
            self.stats["residual_skipped"] = kept
            return False
        found = solve_residual(
            self.problem,
            self.deviations,
            self.cost,
            self.multipliers,
            self.best.loss - self.dual,
            self.options,
        )
        self.stats |= found.stats
        self._offer(found.columns)
        if found.infeasible and self.best.columns is None:
            return True
        bound = self.best.loss if found.infeasible else self.dual + found.bound
        self.lower_bound = max(self.lower_bound, min(bound, self.best.loss))
        return False
