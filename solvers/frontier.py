"""Every break point of the Lagrangian frontier of one resource, in one pass.

The lower hull of a sum of point sets has the edges of their hulls, sorted by slope. So: hull of each segment;
for each partition the merged edges of its segments; for each group the hull of the points of all its partitions;
and at last the merged edges of all groups. Point i is the plan after the first i edges, the best there is for
some price of the resource; every plan on the frontier is whole, no column is split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import SolverError
from .hulls import Hulls, lower_hulls
from .problem import Problem
from .structure import Floats, Integers, offsets, ranges


@dataclass(frozen=True, eq=False)
class _Merged:
    """Edges of the segments of each partition, steepest first, and the points between them.

    Attributes:
        edge_start: (partitions + 1,) CSR offsets of the edges.
        edge_segment: segment that each edge comes from.
        point_start: (partitions + 1,) CSR offsets of the points, one more than edges for each partition.
        usage, loss: (points,) of each partition after its first k edges.
    """

    edge_start: Integers
    edge_segment: Integers
    point_start: Integers
    usage: Floats
    loss: Floats


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points of rising use and falling loss; other resources and all caps are left aside.

    Attributes:
        usage: (points,) use of the resource, `base` included.
        loss: (points,).
        price: (points,) loss saved per unit of the resource on the way to the point, never rising; inf first.
    """

    usage: Floats
    loss: Floats
    price: Floats
    _problem: Problem
    _segments: Hulls
    _merged: _Merged
    _groups: Hulls
    _edge_group: Integers

    @property
    def points(self) -> int:
        """Number of points."""
        return int(self.usage.size)

    def columns(self, point: int) -> Integers:
        """The plan of a point, ascending column numbers.

        Raises:
            SolverError: there is no such point.
        """
        if not 0 <= point < self.points:
            raise SolverError(f"point: expected 0 to {self.points - 1}, got {point}")
        structure, merged = self._problem.structure, self._merged
        taken = np.bincount(self._edge_group[:point], minlength=self._problem.groups)
        corner = self._groups.point[self._groups.start[:-1] + taken]
        partition = np.searchsorted(merged.point_start, corner, side="right") - 1
        edges = ranges(merged.edge_start[partition], corner - merged.point_start[partition])
        steps = np.bincount(merged.edge_segment[edges], minlength=structure.segments.mask.size)
        start = structure.partition_start
        used = structure.partition_segments[ranges(start[partition], start[partition + 1] - start[partition])]
        return np.sort(self._segments.point[self._segments.start[used] + steps[used]])


def frontier(problem: Problem, resource: int) -> Frontier:
    """All break points of least loss against the use of `resource`, from the least use to the least loss.

    Raises:
        SolverError: there is no such resource.
    """
    if not 0 <= resource < problem.resources:
        raise SolverError(
            f"resource: expected 0 to {problem.resources - 1} ({', '.join(problem.resource_names)}), got {resource}"
        )
    structure, usage = problem.structure, problem.usage[resource]
    segments = lower_hulls(structure.segments.start, usage, problem.loss)
    merged = _merge(problem, segments, usage)
    group_points = merged.point_start[structure.group_start]
    groups = lower_hulls(group_points, merged.usage, merged.loss)
    edges = np.setdiff1d(np.arange(groups.point.size), groups.start[:-1])
    edges = edges[np.argsort(-groups.slope[edges], kind="stable")]
    first = groups.point[groups.start[:-1]]
    here, before = groups.point[edges], groups.point[edges - 1]
    run = np.concatenate(([merged.usage[first].sum()], merged.usage[here] - merged.usage[before]))
    drop = np.concatenate(([merged.loss[first].sum()], merged.loss[here] - merged.loss[before]))
    return Frontier(
        usage=problem.base[resource] + np.cumsum(run),
        loss=np.cumsum(drop),
        price=np.concatenate(([np.inf], groups.slope[edges])),
        _problem=problem,
        _segments=segments,
        _merged=merged,
        _groups=groups,
        _edge_group=np.searchsorted(groups.start, edges, side="right") - 1,
    )


def _merge(problem: Problem, segments: Hulls, usage: Floats) -> _Merged:
    """Sort the edges of each partition's segments by slope and add them up."""
    structure = problem.structure
    corners = np.diff(segments.start)
    members = structure.partition_segments
    owner = np.repeat(np.arange(structure.partition_group.size), np.diff(structure.partition_start))
    count = corners[members] - 1
    edge = ranges(segments.start[members] + 1, count)
    edge_owner, edge_segment = np.repeat(owner, count), np.repeat(members, count)
    order = np.lexsort((-segments.slope[edge], edge_owner))
    edge, edge_segment = edge[order], edge_segment[order]
    edge_start = np.searchsorted(edge_owner, np.arange(owner[-1] + 2)).astype(np.int64)
    lengths = np.diff(edge_start)
    point_start = offsets(lengths + 1)
    first = segments.point[segments.start[:-1]]
    sums = []
    for value in (usage, problem.loss):
        points = np.empty(int(point_start[-1]))
        points[point_start[:-1]] = structure.partition_values(value[first])
        points[ranges(point_start[:-1] + 1, lengths)] = value[segments.point[edge]] - value[segments.point[edge - 1]]
        _add_up(points, point_start)
        sums.append(points)
    return _Merged(edge_start, edge_segment, point_start, sums[0], sums[1])


def _add_up(values: Floats, start: Integers) -> None:
    """Running sums inside each row of a CSR array, in place; one row's sums don't round another's."""
    lengths = np.diff(start)
    rows = np.arange(lengths.size)
    for position in range(1, int(lengths.max(initial=0))):
        rows = rows[lengths[rows] > position]
        values[start[rows] + position] += values[start[rows] + position - 1]
