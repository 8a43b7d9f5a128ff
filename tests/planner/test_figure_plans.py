"""The plans of the paper's first figure."""

from __future__ import annotations

import pytest
from msq.experiments.figure_plans import figure_plans
from msq.planner.budget import parse_budgets
from msq.planner.errors import PlanError
from msq.planner.solve import find_plan
from msq.profiles.errors import ProfileError


def test_mixed_plans_are_as_good_as_the_best_uniform_scheme_and_hardly_any_faster_one_is(profile):
    plans = figure_plans(profile, "3.6bpw", ["vq-3", "tcq-2"], 1)
    loss = min(plans[label].promised.loss for label in ("vq-3", "tcq-2"))
    single, mixed = plans["msq without fusion"], plans["msq"]
    assert all(len(entry.pattern) == 1 for entry in single.layers)
    for plan, fusion in ((single, False), (mixed, True)):
        assert plan.promised.loss <= loss and plan.promised.bits_per_weight <= 3.6
        less = plan.promised.latency_us[1] * 0.998
        faster = find_plan(profile, parse_budgets(["memory=3.6bpw", f"latency={less}us"]), fusion=fusion).plan
        assert faster.promised.loss > loss
    assert mixed.promised.latency_us[1] <= single.promised.latency_us[1]


def test_what_stands_beside_the_uniform_schemes_changes_no_mixed_plan(profile):
    alone = figure_plans(profile, "3.6bpw", ["tcq-2"], 1)
    more = figure_plans(profile, "3.6bpw", ["tcq-2"], 1, beside=["vq-3"])
    assert set(more) - set(alone) == {"vq-3"}
    assert more["vq-3"].promised.loss < more["tcq-2"].promised.loss
    assert all(more[name].promised == alone[name].promised for name in alone)


def test_what_cannot_be_planned_is_one_sentence(profile):
    with pytest.raises(ProfileError, match="no quantizer 'nuq-9'; near matches: nuq"):
        figure_plans(profile, "3bpw", ["nuq-9"], 1)
    with pytest.raises(PlanError, match=r"no plan within memory=2.3bpw has a predicted loss of"):
        figure_plans(profile, "2.3bpw", ["nuq-4"], 1)
