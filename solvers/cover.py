"""The rows that say that every layer is covered once, for backends that take a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from .problem import Problem
from .structure import Integers, offsets


def cover_entries(problem: Problem, columns: Integers) -> tuple[Integers, Integers]:
    """(layer, position in `columns`) of every non-zero; layers are numbered group by group."""
    first = offsets(problem.group_sizes.astype(np.int64))
    rows, members = [], []
    for layer in range(int(problem.group_sizes.max())):
        covering = np.flatnonzero(problem.mask[columns] >> layer & 1)
        rows.append(first[problem.group[columns[covering]]] + layer)
        members.append(covering)
    return np.concatenate(rows), np.concatenate(members)


def cover_rows(problem: Problem, columns: Integers) -> tuple[Any, int]:
    """A scipy.sparse matrix (layers, len(columns)) of zeros and ones, and the number of layers."""
    from scipy import sparse

    row, column = cover_entries(problem, columns)
    layers = int(problem.group_sizes.sum())
    return sparse.csr_matrix((np.ones(row.size), (row, column)), shape=(layers, columns.size)), layers
