"""Why there is no plan: what each budget could reach, alone and together, and what would have to give."""

from __future__ import annotations

import dataclasses
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

    What is within reach is worked out under the side constraints; layers that must agree and the limit on distinct
    quantizers are left aside in this, and held responsible where the rest could be met.
    """
    problem = constrained.problem
    reach = reachable(dataclasses.replace(problem, same_choice=None, max_choices=None))
    if solution.status is not Status.INFEASIBLE and not reach.proven_infeasible:
        return PlanError(
            f"solver '{solution.solver}' found neither a plan nor a proof that there is none within "
            f"{time_limit:g} s; allow more time, try another solver, or loosen a budget."
        )
    if not reach.proven_infeasible and problem.has_side_constraints:
        ties = " and ".join(one.text for one in constrained.constraints if one.kind in ("same", "distinct"))
        return InfeasibleBudgetError(
            f"{_texts(constrained)} can't be met under {ties}, though perhaps without; loosen a budget or drop a "
            "constraint."
        )
    under = " under the side constraints" if constrained.constraints else ""
    least = [float(amount) for amount in reach.minimum_usage]
    short = [i for i, (amount, cap) in enumerate(zip(least, problem.caps, strict=True)) if amount > cap]
    if short:
        sentences = [
            f"{_name(constrained, i)} can't be met{under}: {_within_reach(constrained, i, least)}" for i in short
        ]
        return InfeasibleBudgetError(f"{'; '.join(sentences)}{_joint(reach)}; {_remedy(constrained, short)}.")
    if problem.resources == 1:
        return PlanError(
            f"solver '{solution.solver}' says that {_texts(constrained)} can't be met, yet "
            f"{_amount(constrained, 0, least[0])} is within reach; try another solver and report this."
        )
    alone = ", ".join(_amount(constrained, i, amount) for i, amount in enumerate(least))
    return InfeasibleBudgetError(
        f"{_texts(constrained)} can't be met together{under}: each alone could be as tight as {alone}{_joint(reach)}; "
        f"{_remedy(constrained, range(problem.resources))}."
    )


def _joint(reach: Reach) -> str:
    """The least common scaling, where there are several caps."""
    if reach.minimum_usage.size < 2 or not 1 < reach.common_scale < math.inf:
        return ""
    return f", together all must be loosened by a factor of at least {reach.common_scale:.4g}"


def _name(constrained: Constrained, i: int) -> str:
    budgets = constrained.built.budgets
    return budgets[i].text if i < len(budgets) else f"the cap on the {constrained.problem.resource_names[i]}"


def _texts(constrained: Constrained) -> str:
    return " and ".join(_name(constrained, i) for i in range(constrained.problem.resources))


def _amount(constrained: Constrained, i: int, amount: float) -> str:
    """An amount of a resource in the unit of its budget; bytes for devices."""
    budgets = constrained.built.budgets
    return budgets[i].in_unit(amount) if i < len(budgets) else f"{math.ceil(amount)}B"


def _within_reach(constrained: Constrained, i: int, least: Sequence[float]) -> str:
    built: BuiltProblem = constrained.built
    shown = _amount(constrained, i, least[i])
    if i >= len(built.budgets):
        return f"the least that these quantizers reach is {shown}"
    budget: Budget = built.budgets[i]
    if budget.resource == "memory":
        size = f" ({math.ceil(least[i] / 2**20 * 100) / 100:.2f} MiB)" if budget.unit == "bpw" else ""
        return f"the least that these quantizers reach is {shown}{size}"
    overhead = float(built.problem.base[i])
    word = "most" if budget.unit == "tps" else "least"
    return f"the {word} that these kernels reach is {shown} ({overhead:.0f} us of a step are overhead)"


def _remedy(constrained: Constrained, caps: Sequence[int]) -> str:
    wanted = {"memory": "smaller quantizers", "latency": "faster kernels"}
    budgets = constrained.built.budgets
    offers = dict.fromkeys(wanted[budgets[i].resource if i < len(budgets) else "memory"] for i in caps)
    drop = ", drop a constraint" if constrained.constraints else ""
    return f"loosen the budget{'s' if len(caps) > 1 else ''}{drop}, or offer {' and '.join(offers)}"
