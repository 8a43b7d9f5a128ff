"""The plans of the paper's first figure for a profile: uniform schemes, and mixed ones that are as good and faster.

    python -m msq.experiments.figure_plans --profile joined --out plans --memory 3.25bpw --uniform nuq-3,half-tcq-3.25

Every uniform scheme is planned on its fastest kernels and fusions. The mixed plans, without and with fusion, stay
within `--memory` and take the least latency at which their predicted loss is no higher than that of the best scheme
of `--uniform` (to a thousandth of the latency, by bisection); what is `--beside` them is planned as well. Files: a plan
for each row, and `plans.csv` with their promises.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..planner.budget import parse_budgets
from ..planner.errors import InfeasibleBudgetError, PlanError
from ..planner.plan import Plan, save_plan
from ..planner.solve import find_plan
from ..profiles.tables import Profile, load_profile
from .records import write_csv

_PRECISION = 1e-3
"""Of the latency."""


def uniform_plan(profile: Profile, label: str) -> Plan:
    """One quantizer for all layers, on the kernels and fusions that run it fastest."""
    profile.spec(label)  # names near matches where there is none
    size = int(profile.size_matrix[:, profile.labels.index(label)].sum())
    return find_plan(profile, parse_budgets([f"memory={size}B"]), quantizers=label, solver="uniform").plan


def fastest_plan(profile: Profile, memory: str, loss: float, batch_size: int, *, fusion: bool) -> Plan:
    """The plan of least latency within a memory budget whose predicted loss is at most `loss`.

    Raises:
        PlanError: none is that good within the memory budget.
    """

    def within(latency_us: float | None) -> Plan | None:
        texts = [f"memory={memory}", *([] if latency_us is None else [f"latency={latency_us!r}us@{batch_size}"])]
        try:
            plan = find_plan(profile, parse_budgets(texts), fusion=fusion).plan
        except InfeasibleBudgetError:
            return None
        return plan if plan.promised.loss <= loss else None

    best = within(None)
    if best is None:
        raise PlanError(f"no plan within memory={memory} has a predicted loss of {loss:.6g} or less; allow more bits.")
    high = best.promised.latency_us.get(batch_size)
    if high is None:
        raise PlanError(f"the profile has no latency at batch size {batch_size} for every layer; measure it.")
    low = 0.0
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        found = within(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, found.promised.latency_us[batch_size] or middle)
    return best


def figure_plans(
    profile: Profile, memory: str, uniform: list[str], batch_size: int, beside: Sequence[str] = ()
) -> dict[str, Plan]:
    """Every row's plan by name; the mixed ones are as good as the best of `uniform`, whatever is `beside` it."""
    plans = {label: uniform_plan(profile, label) for label in uniform}
    loss = min(plan.promised.loss for plan in plans.values())
    plans |= {label: uniform_plan(profile, label) for label in beside}
    plans["msq without fusion"] = fastest_plan(profile, memory, loss, batch_size, fusion=False)
    plans["msq"] = fastest_plan(profile, memory, loss, batch_size, fusion=True)
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", required=True, help="with losses and latencies: see `msq combine`")
    parser.add_argument("--out", type=Path, required=True, help="directory for the plans")
    parser.add_argument("--memory", default="3.25bpw", help="budget of the mixed plans")
    parser.add_argument("--uniform", default="nuq-3,half-tcq-3.25", help="quantizers of the uniform rows")
    parser.add_argument("--beside", default="", help="further uniform rows, which no mixed plan is compared with")
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    beside = [label for label in arguments.beside.split(",") if label]
    plans = figure_plans(profile, arguments.memory, arguments.uniform.split(","), arguments.batch_size, beside)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, plan in plans.items():
        file = f"{name.replace(' ', '-')}.yaml"
        save_plan(plan, arguments.out / file)
        promised = plan.promised
        step_us = promised.latency_us[arguments.batch_size]
        kernels = len({entry.pattern for entry in plan.layers})
        speed = None if step_us is None else round(arguments.batch_size * 1e6 / step_us, 1)
        rows.append((name, file, promised.loss, round(promised.bits_per_weight, 4), step_us, speed, kernels))
    header = ("row", "file", "loss", "bits_per_weight", "step_us", "tokens_per_second", "kernels")
    write_csv(arguments.out / "plans.csv", header, rows)
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
