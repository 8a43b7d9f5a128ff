from __future__ import annotations

import math

import pytest
from msq.planner.budget import parse_budget, parse_budgets
from msq.planner.errors import PlanError


@pytest.mark.parametrize(("text", "resource", "cap", "batch"), [
    ("memory=4.5GiB", "memory", 4.5 * 2**30, None),
    ("memory=512MiB", "memory", 512 * 2**20, None),
    ("memory=64KiB", "memory", 64 * 2**10, None),
    ("memory=3GB", "memory", 3e9, None),
    ("memory=3 mb", "memory", 3e6, None),
    ("memory=1TB", "memory", 1e12, None),
    ("memory=123456B", "memory", 123456, None),
    ("memory=1e6", "memory", 1e6, None),
    (" Memory = 2.5e3 kB ", "memory", 2.5e6, None),
    ("latency=5ms", "latency", 5000, 1),
    ("latency=4500us", "latency", 4500, 1),
    ("latency=4500µs", "latency", 4500, 1),
    ("latency=4500μs", "latency", 4500, 1),
    ("latency=0.005s", "latency", 5000, 1),
    ("latency=200tps", "latency", 5000, 1),
    ("latency=200tps@8", "latency", 40000, 8),
    ("latency=5ms @ 16", "latency", 5000, 16),
])  # fmt: skip
def test_units(text: str, resource: str, cap: float, batch: int | None) -> None:
    budget = parse_budget(text)
    assert (budget.resource, budget.batch_size, budget.text) == (resource, batch, text)
    assert budget.cap == pytest.approx(cap, rel=1e-15)
    assert budget.resolve(10) == budget


def test_bits_per_weight_need_the_weights() -> None:
    budget = parse_budget("memory=3.25bpw")
    assert budget.cap is None
    assert budget.resolve(800).cap == 325
    with pytest.raises(PlanError, match="has no cap yet"):
        budget.in_unit(1.0)


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a budget such as"),
    ("memory", "expected a budget such as"),
    ("memory=", "expected a budget such as"),
    ("memmory=3bpw", 'unknown resource "memmory"; did you mean "memory"'),
    ("power=3W", "budgets are on memory or latency"),
    ("memory=much", 'expected a number and a unit .*got "much"'),
    ("memory=3,5GiB", "expected a number and a unit"),
    ("memory=1_000B", "expected a number and a unit"),
    ("memory=3bits", 'unknown unit "bits"; memory is given in bpw, GiB'),
    ("memory=5ms", 'unknown unit "ms"; memory is given in'),
    ("memory=3bpw@8", 'does not depend on the batch size; leave out "@8"'),
    ("memory=0", "should be positive and finite; got 0"),
    ("memory=-1GiB", "should be positive and finite; got -1"),
    ("memory=nan", "should be positive and finite; got nan"),
    ("memory=inf", "should be positive and finite; got inf"),
    ("memory=1e999", "should be positive and finite"),
    ("memory=1e305GiB", "out of range"),
    ("latency=5", "the unit is missing; latency is given in ms, us, s or tps"),
    ("latency=5bpw", 'unknown unit "bpw"'),
    ("latency=0tps", "should be positive"),
    ("latency=1e-310tps", "out of range"),
    ("latency=5ms@", 'batch size after @ should be .* got ""'),
    ("latency=5ms@0", 'got "0"'),
    ("latency=5ms@1.5", 'got "1.5"'),
    ("latency=5ms@²", 'got "²"'),
    ("latency=5ms@8@8", 'got "8@8"'),
])  # fmt: skip
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_budget(text)


def test_several() -> None:
    names = [b.name for b in parse_budgets(["memory=3bpw", "latency=5ms", "latency=9ms@8"])]
    assert names == ["memory", "latency@1", "latency@8"]
    with pytest.raises(PlanError, match="at least one budget"):
        parse_budgets([])
    with pytest.raises(PlanError, match='"latency=5ms" and "latency=200tps@1" both cap latency@1'):
        parse_budgets(["latency=5ms", "latency=200tps@1"])
    with pytest.raises(PlanError, match="both cap memory"):
        parse_budgets(["memory=3bpw", "memory=1GiB"])


@pytest.mark.parametrize("text", ["memory=2.37bpw", "memory=1GiB", "memory=777kB", "memory=4096", "latency=3ms",
                                  "latency=1s", "latency=8us", "latency=333tps@8"])  # fmt: skip
@pytest.mark.parametrize("amount", [1.0, 3.7, 1234.5678, 98765.4321, 2611090961.0])
def test_reported_values_are_wide_enough(text: str, amount: float) -> None:
    """A budget written with the reported number admits the amount, and is at most 0.1% wider (or 1 byte)."""
    budget = parse_budget(text).resolve(1000)
    resource, batch = text.split("=", maxsplit=1)[0], text.partition("@")[2]
    again = parse_budget(f"{resource}={budget.in_unit(amount)}{'@' + batch if batch else ''}").resolve(1000)
    assert again.cap is not None
    assert again.cap >= amount * (1 - 1e-12)
    assert again.cap <= max(amount * 1.0011, math.ceil(amount) * (1 + 1e-12))
