"""Resampled sensitivities: robust plans are judged right, and stability counts what changes."""

from __future__ import annotations

import numpy as np
import pytest
from msq.planner.budget import parse_budgets
from msq.planner.constraints import constrain, parse_constraints
from msq.planner.errors import PlanError
from msq.planner.plan import parse_plan
from msq.planner.problem_builder import BuiltProblem, build_problem
from msq.planner.robust import Robust, _LayerErrors, robust_solution, sample_sensitivities, stability, standard_errors
from msq.planner.solve import find_plan, plan_of
from msq.profiles.tables import save_profile
from msq.solvers.registry import get_solver
from msq.solvers.solution import Status


@pytest.fixture
def noisy(tmp_path, manifest, tables):
    """A profile builder: relative standard errors of 0 or `scale`, differing from layer to layer."""

    def build(scale: float, budget: str = "memory=3bpw") -> BuiltProblem:
        layers = tables["layers"]
        share = np.random.default_rng(3).choice([0.0, scale], len(layers))
        frames = tables | {"layers": layers.assign(standard_error=layers["sensitivity"] * share)}
        profile = save_profile(tmp_path / f"noisy-{scale}", manifest, **frames)
        return build_problem(profile, parse_budgets([budget]))

    return build


def test_samples_have_the_measured_moments(noisy) -> None:
    built = noisy(0.2)
    drawn = sample_sensitivities(built, 4000, 0)
    assert (drawn >= 0).all()
    measured = built.profile.layers["sensitivity"].to_numpy()
    np.testing.assert_allclose(drawn.mean(axis=0), measured, atol=5 * standard_errors(built.profile).max() / 60)
    np.testing.assert_allclose(drawn.std(axis=0), standard_errors(built.profile), rtol=0.1, atol=1e-12)
    np.testing.assert_array_equal(drawn, sample_sensitivities(built, 4000, 0))


def robust(built: BuiltProblem, **arguments: object) -> Robust:
    constrained = constrain(built, ())
    solver = get_solver("exact")
    return robust_solution(constrained, solver, solver.solve(built.problem), **arguments)


def test_robust_plan_has_the_least_quantile(noisy) -> None:
    built = noisy(1.0)
    found = robust(built, quantile=0.9, samples=500, seed=1)
    assert found.chosen.choosing_quantile == min(candidate.choosing_quantile for candidate in found.candidates)
    assert len(found.candidates) > 1 and found.chosen.step > 0, "this noise is made to move the plan"
    assert found.chosen.loss >= found.nominal.loss
    # judged by hand: each layer's share of the loss is its sampled sensitivity times its error
    plan = plan_of(built, found.solution)
    profile = built.profile
    error = np.array(
        [profile.error_matrix[row, profile.labels.index(entry.quantizer)] for row, entry in enumerate(plan.layers)]
    )
    losses = sample_sensitivities(built, 1000, 1) @ error
    assert found.chosen.choosing_quantile == pytest.approx(np.quantile(losses[:500], 0.9))
    assert found.chosen.quantile == pytest.approx(np.quantile(losses[500:], 0.9))
    assert found.solution.objective == pytest.approx(plan.promised.loss)
    assert found.solution.lower_bound <= found.nominal.loss


def test_without_noise_everything_stays(noisy) -> None:
    built = noisy(0.0)
    found = robust(built, samples=10)
    assert found.chosen.step == 0
    assert found.solution.status is Status.OPTIMAL
    still = stability(constrain(built, ()), found.solution.columns, get_solver("exact"), samples=3)
    assert still.changes.tolist() == [0.0] * len(built.profile.layers)
    assert still.regret.tolist() == [0.0] * 3


def test_noise_moves_choices(noisy) -> None:
    built = noisy(1.0)
    plan = get_solver("exact").solve(built.problem)
    moved = stability(constrain(built, ()), plan.columns, get_solver("exact"), samples=20, seed=2)
    assert moved.samples == 20
    assert 0 < moved.changes.max() <= 1
    assert (moved.regret >= -1e-9).all()
    assert moved.regret.max() > 0


def test_a_robust_plan_is_better_on_fresh_samples(noisy) -> None:
    built = noisy(1.0)
    found = robust(built, quantile=0.95, samples=2000, seed=3)
    fresh = sample_sensitivities(built, 20000, 99)
    cover = _LayerErrors(constrain(built, ()))
    chosen, nominal = (np.quantile(fresh @ cover.of_plan(one.columns), 0.95) for one in (found.chosen, found.nominal))
    assert chosen < nominal


def test_stability_counts_only_what_is_proven(noisy) -> None:
    built = noisy(1.0)
    plan = get_solver("exact").solve(built.problem)
    with pytest.raises(PlanError, match="proved none of the 3 resampled plans"):
        stability(constrain(built, ()), plan.columns, get_solver("greedy"), samples=3)


def test_bad_input_is_explained(noisy, profile) -> None:
    built = noisy(0.5)
    solver = get_solver("exact")
    with pytest.raises(PlanError, match=r"expected a quantile of at least 0\.5 and below 1"):
        robust(built, quantile=1.0)
    with pytest.raises(PlanError, match="expected at least one sample"):
        robust(built, samples=0)
    bare = build_problem(profile, parse_budgets(["memory=3bpw"]))
    with pytest.raises(PlanError, match="has no standard errors"):
        robust(bare)
    tight = build_problem(built.profile, parse_budgets(["memory=1bpw"]))
    with pytest.raises(PlanError, match="expected a solution with a plan"):
        robust(tight)
    with pytest.raises(PlanError, match="proved none of the 2 resampled plans"):
        least = tight.problem.structure.evaluate(tight.problem.loss)[1]
        stability(constrain(tight, ()), least, solver, samples=2)
    with pytest.raises(PlanError, match="expected the columns of a plan"):
        stability(constrain(built, ()), [0], solver)


def test_robust_plans_keep_side_constraints(noisy) -> None:
    built = noisy(1.0)
    constraints = parse_constraints(["ban:down_proj=*-2*", "max-bits:q_proj=3"])
    found = find_plan(built.profile, built.budgets, constraints=constraints, robust=0.9).plan
    bits = {entry.layer: found.quantizers[entry.quantizer].bits for entry in found.layers}
    assert all(2 <= bits[name] <= 3 for name in bits if "q_proj" in name)
    assert all(not 2 <= bits[name] < 3 for name in bits if "down_proj" in name)
    assert found.robustness is not None
    assert found.robustness.quantile_loss > 0
    assert found.constraints == ("ban:down_proj=*-2*", "max-bits:q_proj=3")
    assert parse_plan(found.model_dump(mode="json"), "here") == found
