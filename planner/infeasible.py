"""Why there is no plan: what each budget could reach, alone and together, and what would have to give."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..solvers.reach import Reach, reachable
from ..solvers.solution import Solution, Status
from .budget import Budget
from .constraints import Constrained
from .errors import InfeasibleBudgetError, PlanError
from .problem_builder import BuiltProblem


def no_plan(constrained: Constrained, solution: Solution, time_limit: float) -> PlanError:
    """The error to raise for a solution without a plan.

    Side constraints are held responsible only where the budgets could be met without them.
    """
    free = reachable(constrained.built.problem)
    if constrained.is_constrained and not free.proven_infeasible and solution.status is Status.INFEASIBLE:
        return _under_constraints(constrained)
    return _without_constraints(constrained.built, free, solution, time_limit)


def _under_constraints(constrained: Constrained) -> InfeasibleBudgetError:
    """What each cap could reach alone under the constraints."""
    problem, budgets = constrained.problem, constrained.built.budgets
    parts = []
    for i, least in enumerate(reachable(problem).minimum_usage.tolist()):
        if i < len(budgets):
            parts.append(f"{budgets[i].text} could be as tight as {budgets[i].in_unit(least)}")
        else:
            parts.append(
                f"{problem.resource_names[i]} could be {math.ceil(least)}B (cap {math.floor(problem.caps[i])}B)"
            )
    tied = "; layers that must agree and the limit on distinct quantizers are not counted in this"
    return InfeasibleBudgetError(
        f"no plan meets the budgets under the side constraints: alone, {', '.join(parts)}"
        f"{tied if problem.has_side_constraints else ''}; loosen a budget or a constraint."
    )


def _without_constraints(built: BuiltProblem, reach: Reach, solution: Solution, time_limit: float) -> PlanError:
    problem, budgets = built.problem, built.budgets
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
