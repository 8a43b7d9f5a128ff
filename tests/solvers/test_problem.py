"""Problem refuses what makes no sense, in one clear sentence."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from msq.solvers.errors import SolverError
from msq.solvers.problem import Problem, column_order


@pytest.fixture
def good(make) -> Problem:
    return make([(0, 1, 0, 1.0, (2.0,)), (0, 2, 0, 1.0, (2.0,)), (1, 1, 1, 3.0, (3.0,))], [10.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": [1.0, np.nan, 1.0]}, r"loss\[1\]: expected a number that is 0 or between 1e-60 and 1e\+60, got nan"),
        ({"loss": [1.0, -1.0, 1.0]}, r"loss\[1\]: expected .* got -1.0"),
        ({"usage": [[1.0, 1.0, np.inf]]}, r"usage\[0, 2\]: expected .* got inf"),
        ({"usage": [1.0, 1.0, 1.0]}, r"usage: expected shape \(1, 3\)"),
        ({"caps": [np.inf]}, r"caps\[0\]: expected a number that is finite"),
        ({"caps": []}, "caps: expected one entry per resource and at least one"),
        ({"base": [1.0, 2.0]}, r"base: expected shape \(1,\)"),
        ({"loss": [1.0, 1.0]}, r"loss: expected shape \(3,\)"),
        ({"loss": ["a", "b", "c"]}, "loss: expected real numbers"),
        ({"group": [0.0, 0.0, 1.0]}, "group: expected integers, got float64"),
        ({"group": [0, 0, 2]}, "group: expected numbers from 0 to 1, got 0 to 2"),
        ({"choice": [0, 0, 2]}, "choice: expected numbers from 0 to 1, got 0 to 2"),
        ({"group_sizes": []}, "at least one group"),
        ({"group_sizes": [2, 63]}, r"layer_sensitivity: expected shape \(65,\)"),
        ({"mask": [1, 4, 1]}, r"mask\[1\]: expected a non-empty set of the 2 layers of group 0, got 0b100"),
        ({"mask": [0, 2, 1]}, r"mask\[0\]"),
        ({"mask": [2, 1, 1]}, r"sorted by \(group, mask\)"),
        ({"mask": [1, 1, 1]}, "group 0: expected columns that together cover each of its 2 layers once"),
        ({"mask": [1, 3, 1], "choice": [0, 0, 0]}, None),
        ({"resource_names": ("memory", "x")}, "resource_names: expected 1 different names"),
        ({"column_bits": [0.0, 1.0, 1.0]}, r"column_bits\[0\]: expected a number that is finite and positive"),
        ({"layer_weights": [1.0, 1.0]}, r"layer_weights: expected shape \(3,\)"),
        ({"layer_sensitivity": None, "layer_weights": None, "column_bits": None}, None),
    ],
)
def test_bad_input_is_explained(good, change, words) -> None:
    if words is None:
        dataclasses.replace(good, **change)
    else:
        with pytest.raises(SolverError, match=words):
            dataclasses.replace(good, **change)


def test_group_size_limit(make) -> None:
    with pytest.raises(SolverError, match="expected 1 to 62 layers per group, got 63"):
        make([(0, 1, 0, 1.0, (1.0,))], [1.0], sizes=[63])
    make([(0, (1 << 62) - 1, 0, 1.0, (1.0,))], [1.0], sizes=[62])


def test_arrays_are_read_only_and_the_callers_are_not(good) -> None:
    with pytest.raises(ValueError, match="read-only"):
        good.loss[0] = 5.0
    loss = np.ones(3)
    dataclasses.replace(good, loss=loss)
    loss[0] = 2.0


def test_empty_group_is_named(make) -> None:
    with pytest.raises(SolverError, match="group 1: expected columns that together cover"):
        make([(0, 1, 0, 1.0, (1.0,)), (2, 1, 0, 1.0, (1.0,))], [5.0], sizes=[1, 1, 1])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_column_order_sorts_stably(keys) -> None:
    group, mask = np.array(keys).T
    order = column_order(group, mask)
    expected = sorted(range(len(keys)), key=lambda i: keys[i])
    assert order.tolist() == expected
