"""A problem as a mixed-integer programme, for backends that take a matrix.

    minimise cost @ x   subject to   lower <= rows @ x <= upper,   x binary

Numerics. Solvers' tolerances are absolute for rows of order 1, so every resource row is divided by its room, and the
loss by its size in a known plan; in raw seconds a tolerance of 1e-7 let SCIP break caps.

Side constraints. A limit on the number of choices adds one variable y_q per choice and the rows
sum(columns of choice q that cover layer l) <= y_q; layers that share a choice have equal sums for every q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .problem import Problem
from .structure import Floats, Integers

LOSS_SIZE = 1e3
"""The loss is scaled to this: SCIP's 1e-7 on reduced costs is then worth 1e-10 of it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The programme.

    Attributes:
        cost: (variables,) the problem's columns first.
        matrix: scipy.sparse CSR (rows, variables).
        lower, upper: (rows,) -inf for none.
        unit: loss per unit of cost.
        columns: number of variables that are columns of the problem.
    """

    cost: Floats
    matrix: Any
    lower: Floats
    upper: Floats
    unit: float
    columns: int

    def completed(self, problem: Problem, plan: Integers) -> Floats:
        """The values of all variables in a plan; (variables,)."""
        values = np.zeros(self.cost.size)
        values[plan] = 1.0
        if self.cost.size > self.columns:
            values[self.columns + np.unique(problem.choice[plan])] = 1.0
        return values


def build_rows(problem: Problem, unit: float, tightening: float = 0.0) -> Rows:
    """The programme of a problem.

    Args:
        problem: see the module for how its rows are scaled.
        unit: loss per unit of cost, > 0.
        tightening: the caps are lowered by this, relative.
    """
    from scipy import sparse

    room = problem.room - tightening * np.abs(problem.caps)
    scale = np.where(room > 0, room, np.maximum(problem.usage.max(axis=1), np.abs(room)))
    scale[scale <= 0] = 1.0
    cover = cover_rows(problem, np.arange(problem.columns))
    blocks: list[list[Any]] = [[sparse.csr_matrix(problem.usage / scale[:, None])], [cover]]
    lower = [np.full(problem.resources, -math.inf), np.ones(cover.shape[0])]
    upper = [room / scale, np.ones(cover.shape[0])]
    cost = problem.loss / unit
    if problem.same_choice is not None:
        same = _same_rows(problem, problem.same_choice)
        blocks.append([same])
        lower.append(np.zeros(same.shape[0]))
        upper.append(np.zeros(same.shape[0]))
    if problem.max_choices is not None:
        choices = len(problem.choice_names)
        used = _choice_rows(problem)
        layer_choice = np.arange(used.shape[0])
        switch = sparse.csr_matrix(
            (-np.ones(used.shape[0]), (layer_choice, layer_choice % choices)), shape=(used.shape[0], choices)
        )
        blocks = [[*row, None] for row in blocks]
        blocks.append([used, switch])
        blocks.append([None, sparse.csr_matrix(np.ones((1, choices)))])
        lower.append(np.full(used.shape[0] + 1, -math.inf))
        upper.append(np.append(np.zeros(used.shape[0]), float(problem.max_choices)))
        cost = np.concatenate((cost, np.zeros(choices)))
    matrix = sparse.csr_matrix(sparse.bmat(blocks, format="csr", dtype=np.float64))
    return Rows(cost, matrix, np.concatenate(lower), np.concatenate(upper), unit, problem.columns)


def cover_rows(problem: Problem, columns: Integers) -> Any:
    """Which layers are covered by which of `columns`: scipy.sparse (layers, len(columns)), group-major layers."""
    from scipy import sparse

    column, row = problem.covers(columns)
    shape = (int(problem.group_sizes.sum()), columns.size)
    return sparse.csr_matrix((np.ones(row.size), (row, column)), shape=shape)


def loss_unit(problem: Problem, plan: Integers | None) -> float:
    """The loss of a plan near the optimum over `LOSS_SIZE`; where there is none, of the columns on average."""
    loss = float(problem.loss[plan].sum()) if plan is not None else 0.0
    if loss <= 0:
        loss = float(problem.loss.mean()) * problem.groups
    return loss / LOSS_SIZE if loss > 0 else 1.0


def _choice_rows(problem: Problem) -> Any:
    """Row ``layer * choices + q`` sums the columns of choice q that cover the layer."""
    from scipy import sparse

    column, layer = problem.covers(np.arange(problem.columns))
    choices = len(problem.choice_names)
    row = layer * choices + problem.choice[column]
    shape = (int(problem.group_sizes.sum()) * choices, problem.columns)
    return sparse.csr_matrix((np.ones(row.size), (row, column)), shape=shape)


def _same_rows(problem: Problem, same_choice: Integers) -> Any:
    """For every layer but the first of a set, and every choice: its sum less that of the first layer."""
    sums = _choice_rows(problem)
    choices = np.arange(len(problem.choice_names))
    ones, others = [], []
    for label in np.unique(same_choice[same_choice >= 0]):
        members = np.flatnonzero(same_choice == label)
        ones.append(np.repeat(members[0], members.size - 1))
        others.append(members[1:])
    one, other = np.concatenate(ones), np.concatenate(others)
    row_of_one = (one[:, None] * choices.size + choices).ravel()
    row_of_other = (other[:, None] * choices.size + choices).ravel()
    return sums[row_of_other] - sums[row_of_one]
