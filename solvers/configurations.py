"""Whole-group alternatives that are nearly as good as the best one at given prices.

A *configuration* of a group is a partition with one column for each of its segments. Its *deviation* is its
reduced cost: its priced cost minus the least of its group. A plan's loss is at least the dual value plus the
sum of its groups' deviations, so with a gap of delta between a plan and the dual only configurations of
deviation up to delta can appear in a better plan. They are few, and small enough a set to search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Problem
from .structure import Floats, Integers, Structure, distinct, offsets, ranges


@dataclass(frozen=True, eq=False)
class Configurations:
    """A list of configurations, sorted by (group, deviation).

    Attributes:
        group: (configurations,) group of each.
        deviation: (configurations,) >= 0.
        loss: (configurations,) sum over its columns.
        usage: (resources, configurations) sum over its columns.
        column_start: (configurations + 1,) CSR offsets into `columns`.
        columns: columns of each configuration.
        complete: every configuration of deviation <= the asked delta is here.
    """

    group: Integers
    deviation: Floats
    loss: Floats
    usage: Floats
    column_start: Integers
    columns: Integers
    complete: bool

    @property
    def count(self) -> int:
        """Number of configurations."""
        return int(self.group.size)

    def columns_of(self, chosen: Integers) -> Integers:
        """Columns of the configurations `chosen`, ascending."""
        lengths = np.diff(self.column_start)[chosen]
        return np.sort(self.columns[ranges(self.column_start[chosen], lengths)])

    def with_resource(self, usage: Floats, deviation: Floats) -> Configurations:
        """With the use of one more resource, and other deviations (configurations,), sorted by these."""
        order = np.lexsort((deviation, self.group))
        lengths = np.diff(self.column_start)[order]
        return Configurations(
            self.group,
            deviation[order],
            self.loss[order],
            np.vstack((self.usage, usage))[:, order],
            offsets(lengths),
            self.columns[ranges(self.column_start[order], lengths)],
            self.complete,
        )


@dataclass(frozen=True, eq=False)
class Penalties:
    """Reduced costs at some prices, split by what causes them.

    Attributes:
        column: (columns,) cost above the least of the segment.
        partition: (partitions,) least cost above the least of the group.
        total: (columns,) least deviation of any configuration with this column, inf if there is none. Columns above
            the gap between a plan and the dual can be left out (reduced cost fixing).
    """

    column: Floats
    partition: Floats
    total: Floats

    @classmethod
    def build(cls, structure: Structure, cost: Floats) -> Penalties:
        """Work them out from the priced `cost` (columns,)."""
        minima = structure.segment_minima(cost)
        values = structure.partition_values(minima)
        best = np.minimum.reduceat(values, structure.group_start[:-1])
        partition = values - best[structure.partition_group]
        segment = np.full(minima.size, np.inf)
        spread = np.repeat(partition, np.diff(structure.partition_start))
        np.minimum.at(segment, structure.partition_segments, spread)
        owner = structure.segments.of_column
        column = cost - minima[owner]
        return cls(column, partition, column + segment[owner])


def enumerate_configurations(problem: Problem, penalties: Penalties, delta: float, *, limit: int) -> Configurations:
    """List the configurations whose deviation is at most `delta`.

    Args:
        problem: supplies columns and structure.
        penalties: at the prices that the deviations belong to.
        delta: most deviation, >= 0; may be inf.
        limit: most configurations to list. When there are more, those of least deviation stay and the list is
            not `complete`.
    """
    structure = problem.structure
    candidates = np.flatnonzero(penalties.total <= delta)
    complete = True
    if candidates.size > limit:
        delta = float(np.partition(penalties.total, limit)[limit])
        candidates = np.flatnonzero(penalties.total <= delta)
        complete = False
    first = np.searchsorted(candidates, structure.segments.start)
    lengths = np.diff(structure.partition_start)
    slack = delta * (1 + 1e-12)
    rows = _Rows.of_partitions(penalties.partition, slack)
    finished: list[_Rows] = []
    depth = 0
    while rows.partition.size:
        done = lengths[rows.partition] == depth
        finished.append(rows.take(np.flatnonzero(done)))
        rows = rows.take(np.flatnonzero(~done))
        segment = structure.partition_segments[structure.partition_start[rows.partition] + depth]
        rows = rows.extend(candidates, first[segment], first[segment + 1], penalties.column)
        rows = rows.take(np.flatnonzero(rows.deviation <= slack))
        if rows.partition.size > 2 * limit:
            rows = rows.take(np.sort(_least(structure.partition_group[rows.partition], rows.deviation, 2 * limit)))
            complete = False
        depth += 1
    return _collect(problem, finished, limit, complete)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Partial configurations: the columns of the first segments of a partition."""

    partition: Integers
    deviation: Floats
    columns: Integers

    @classmethod
    def of_partitions(cls, penalty: Floats, slack: float) -> _Rows:
        partition = np.flatnonzero(penalty <= slack)
        return cls(partition, penalty[partition], np.empty((partition.size, 0), np.int64))

    def take(self, rows: Integers) -> _Rows:
        return _Rows(self.partition[rows], self.deviation[rows], self.columns[rows])

    def extend(self, candidates: Integers, first: Integers, last: Integers, penalty: Floats) -> _Rows:
        """Append every candidate of the ranges [first, last) to its row."""
        lengths = last - first
        row = np.repeat(np.arange(self.partition.size), lengths)
        added = candidates[ranges(first, lengths)]
        return _Rows(
            self.partition[row],
            self.deviation[row] + penalty[added],
            np.column_stack((self.columns[row], added)),
        )


def _least(group: Integers, deviation: Floats, limit: int) -> Integers:
    """The `limit` rows of least deviation, by rising deviation, and the first of every group whatever its place."""
    order = np.argsort(deviation, kind="stable")
    _, first = np.unique(group[order], return_index=True)
    return order[distinct(np.concatenate((np.arange(min(limit, order.size)), first)))]


def _collect(problem: Problem, finished: list[_Rows], limit: int, complete: bool) -> Configurations:
    """Join the lists of every depth, keep the `limit` least, sort by (group, deviation)."""
    partition = np.concatenate([rows.partition for rows in finished])
    deviation = np.concatenate([rows.deviation for rows in finished])
    width = np.concatenate([np.full(rows.partition.size, rows.columns.shape[1]) for rows in finished])
    flat = np.concatenate([rows.columns.ravel() for rows in finished])
    start = offsets(width)
    group = problem.structure.partition_group[partition]
    kept = np.arange(group.size)
    if group.size > limit:
        kept = np.sort(_least(group, deviation, limit))
        complete = complete and kept.size == group.size
    kept = kept[np.lexsort((deviation[kept], group[kept]))]
    columns = flat[ranges(start[kept], width[kept])]
    column_start = offsets(width[kept])
    return Configurations(
        group[kept],
        deviation[kept],
        np.add.reduceat(problem.loss[columns], column_start[:-1]),
        np.add.reduceat(problem.usage[:, columns], column_start[:-1], axis=1),
        column_start,
        columns,
        complete,
    )
