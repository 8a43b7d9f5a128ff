"""Side constraints: their spelling, the columns they leave, and plans that keep them."""

from __future__ import annotations

import numpy as np
import pytest
from msq.planner.budget import parse_budgets
from msq.planner.constraints import Constrained, broken_by, constrain, parse_constraint, parse_constraints
from msq.planner.errors import InfeasibleBudgetError, PlanError
from msq.planner.infeasible import no_plan
from msq.planner.plan import Plan
from msq.planner.problem_builder import BuiltProblem, build_problem
from msq.planner.solve import find_plan, plan_of
from msq.solvers.registry import get_solver, missing_requirements
from msq.solvers.solution import Status


@pytest.fixture(params=[("memory=3.5bpw",), ("memory=3.5bpw", "latency=1ms")], ids=["memory", "joint"])
def built(profile, request) -> BuiltProblem:
    return build_problem(profile, parse_budgets(request.param))


def plan_with(built: BuiltProblem, *texts: str) -> Plan:
    constrained = constrain(built, parse_constraints(texts))
    name = "scip" if constrained.problem.has_side_constraints else "exact"
    if missing_requirements(name):
        pytest.skip(f"{name} needs {', '.join(missing_requirements(name))}")
    solution = get_solver(name).solve(constrained.problem)
    assert solution.status is Status.OPTIMAL
    return plan_of(built, constrained.restore(solution))


def labels(plan: Plan) -> dict[str, str]:
    return {entry.layer: entry.quantizer for entry in plan.layers}


def test_nothing_changes_nothing(built) -> None:
    constrained = constrain(built, ())
    np.testing.assert_array_equal(constrained.columns, np.arange(built.problem.columns))
    assert not constrained.problem.has_side_constraints


def test_pin_ban_and_bits(built) -> None:
    plan = plan_with(
        built, r"pin:^b0\.down=nuq-*", r"ban:o_proj=tcq-4,nuq-4", r"min-bits:q_proj=3", r"max-bits:gate_proj$=3"
    )
    found = labels(plan)
    assert found["b0.down_proj"].startswith("nuq-")
    for block in (0, 1):
        assert found[f"b{block}.o_proj"] not in ("tcq-4", "nuq-4")
        assert found[f"b{block}.q_proj"] in ("vq-3", "nuq-4", "tcq-4")
        assert found[f"b{block}.gate_proj"] in ("nuq-2", "tcq-2", "vq-3")


def test_what_a_plan_breaks_goes_by_its_fields(built) -> None:
    kept = (r"pin:^b0\.down=nuq-*", "ban:o_proj=tcq-*", "min-bits:q_proj=3", "max-bits:gate_proj$=3")
    plan = plan_with(built, *kept)
    assert not broken_by(plan, built.profile, parse_constraints([*kept, "pin:no_such_layer=vq-3"]))
    texts = [r"pin:^b0\.down=vq-*,tcq-*", "ban:down=nuq-*", "min-bits:q_proj=4.5", "max-bits:q_proj=2"]
    assert [c.text for c in broken_by(plan, built.profile, parse_constraints(texts))] == texts
    renamed = {label: f"my {label}" for label in plan.quantizers}
    layers = tuple(entry.model_copy(update={"quantizer": renamed[entry.quantizer]}) for entry in plan.layers)
    quantizers = {renamed[label]: fields for label, fields in plan.quantizers.items()}
    mine = plan.model_copy(update={"layers": layers, "quantizers": quantizers})
    assert not broken_by(mine, built.profile, parse_constraints(kept))
    assert [c.text for c in broken_by(mine, built.profile, parse_constraints(texts))] == texts


def test_same_and_distinct(built) -> None:
    found = labels(plan_with(built, "same:down_proj", "same:b1.(down|o)_proj", "distinct=2"))
    assert len({found["b0.down_proj"], found["b1.down_proj"], found["b1.o_proj"]}) == 1
    assert len(set(found.values())) <= 2


def test_devices_keep_their_caps(built) -> None:
    profile = built.profile
    size = {
        (layer, label): profile.size_matrix[row, column]
        for row, layer in enumerate(profile.layer_names)
        for column, label in enumerate(profile.labels)
    }
    plan = plan_with(built, r"device:^b0\.=2.5bpw", r"device:^b1\.=4bpw")
    for block, bits in ((0, 2.5), (1, 4.0)):
        own = [entry for entry in plan.layers if entry.layer.startswith(f"b{block}.")]
        weights = sum(
            int(w)
            for w, n in zip(profile.layer_weights, profile.layer_names, strict=True)
            if n.startswith(f"b{block}.")
        )
        assert sum(size[entry.layer, entry.quantizer] for entry in own) <= bits * weights / 8
    free = plan_with(built)
    assert plan.promised.loss >= free.promised.loss


def test_a_device_splits_fused_kernels(built) -> None:
    constrained = constrain(built, parse_constraints(["device:q_proj=10KiB"]))
    fused_q = [
        c
        for c in range(built.problem.columns)
        if built.problem.group[c] == 0 and built.problem.mask[c] & (built.problem.mask[c] - 1)
    ]
    q = next(i for i, name in enumerate(built.profile.layer_names) if name == "b0.q_proj")
    assert not set(constrained.columns) & {c for c in fused_q if q in built.covered(c)}
    assert constrained.problem.resource_names[-1] == "memory of q_proj"


def test_infeasible_names_every_cap(built) -> None:
    constrained = constrain(built, parse_constraints(["device:down_proj=1B"]))
    assert isinstance(constrained, Constrained)
    solution = get_solver("exact").solve(constrained.problem)
    assert solution.status is Status.INFEASIBLE
    error = no_plan(constrained, solution, 60.0)
    assert isinstance(error, InfeasibleBudgetError)
    assert "under the side constraints" in str(error) and "the cap on the memory of down_proj can't" in str(error)
    assert "loosened by a factor of at least" in str(error)
    assert constrained.restore(solution).columns is None


def test_infeasible_blames_ties_only_where_the_rest_can_be_met(built) -> None:
    constrained = constrain(built, parse_constraints(["distinct=1", "pin:q_proj=nuq-2", "pin:k_proj=nuq-4"]))
    solution = get_solver("scip").solve(constrained.problem)
    assert "under distinct=1, though perhaps without" in str(no_plan(constrained, solution, 60.0))


def test_the_reach_is_that_of_the_constrained_problem(built) -> None:
    profile = built.profile
    constraints = parse_constraints(["min-bits:.*=4"])
    with pytest.raises(InfeasibleBudgetError, match=r"under the side constraints: the least .* is 4\.\d*bpw"):
        find_plan(profile, parse_budgets(["memory=1bpw"]), constraints=constraints)


def test_two_caps_on_one_device_keep_the_tighter(built) -> None:
    constrained = constrain(built, parse_constraints(["device:down_proj=20KiB", "device:down_proj=10KiB"]))
    assert constrained.problem.resource_names[-1] == "memory of down_proj"
    assert constrained.problem.caps[-1] == 10240 and constrained.problem.resources == built.problem.resources + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pine:x=y", "expected a constraint such as pin:REGEX=QUANTIZERS"),
        ("", "expected a constraint such as"),
        ("pin:x", "expected pin:REGEX=QUANTIZERS"),
        ("pin=tcq-4", "expected pin:REGEX=QUANTIZERS"),
        ("pin:=tcq-4", "expected pin:REGEX=QUANTIZERS"),
        ("same:", "expected same:REGEX"),
        ("distinct:q=2", "expected distinct=N"),
        ("distinct=0", "expected a whole number of at least 1"),
        ("distinct=two", "expected a whole number of at least 1"),
        ("ban:(=tcq-4", "is not a regular expression"),
        ("min-bits:q=many", "expected a positive number of bits"),
        ("max-bits:q=-1", "expected a positive number of bits"),
    ],
)
def test_bad_spelling_is_explained(text, words) -> None:
    with pytest.raises(PlanError) as caught:
        parse_constraint(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pin:nowhere=tcq-4", 'no layer matches "nowhere"'),
        ("pin:q_proj=tcq-9", "no quantizer matches 'tcq-9'"),
        ("ban:q_proj=*", "without a candidate"),
        ("min-bits:q_proj=9", "without a candidate"),
        ("device:q_proj=fast", "expected a number and a unit"),
    ],
)
def test_bad_selection_is_explained(built, text, words) -> None:
    with pytest.raises(PlanError) as caught:
        constrain(built, [parse_constraint(text)])
    assert words in str(caught.value)


def test_a_regular_expression_may_hold_an_equals_sign() -> None:
    assert parse_constraint("pin:a(?=b)=tcq-4").layers == "a(?=b)"
    assert parse_constraint("same:a(?=b)").layers == "a(?=b)"
