"""Flat index arrays over the columns of a problem: segments and partitions, and the minimum over them.

A *segment* is the run of columns that cover the same layers of the same group; a *partition* of a group is a
set of its segments that covers every layer once. With additive costs the best plan takes, in every group,
the partition whose segment minima add up to least. `Structure.evaluate` computes that for all groups with a
handful of `reduceat` calls; nothing here makes a Python object per column.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .errors import SolverError
from .partitions import has_partition, partitions

_Scalar = TypeVar("_Scalar", bound=np.generic)
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MAX_PARTITIONS = 20_000
"""Most partitions that one group may have: all subsets of 8 layers give 4,140, of 9 give 21,147."""


def full_mask(size: int) -> int:
    """The mask that covers all layers of a group of `size` layers."""
    return (1 << size) - 1


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """Concatenate ``arange(start, start + length)`` over all pairs; (sum(lengths),)."""
    ends: Integers = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    shifts: Integers = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(total, dtype=np.int64) + shifts


def offsets(lengths: Integers) -> Integers:
    """CSR offsets of rows with the given lengths; (rows + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def distinct(values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """The different values, ascending. `np.unique` loads numpy.ma at its first call, longer than many a solve."""
    ordered = np.sort(values)
    new = np.ones(ordered.size, dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of equal (group, mask).

    Attributes:
        start: (segments + 1,) first column of each segment, and the number of columns.
        group: (segments,) group of each segment, ascending.
        mask: (segments,) layers that it covers.
        group_start: (groups + 1,) first segment of each group.
    """

    start: Integers
    group: Integers
    mask: Integers
    group_start: Integers

    @classmethod
    def build(cls, group: npt.NDArray[np.int32], mask: Integers, groups: int) -> Segments:
        """Find the runs; `group` (columns,) and `mask` (columns,) sorted by (group, mask)."""
        new = np.flatnonzero((np.diff(group) != 0) | (np.diff(mask) != 0)) + 1
        start = distinct(np.concatenate(([0], new, [group.size]))).astype(np.int64)
        segment_group = group[start[:-1]].astype(np.int64)
        group_start = np.searchsorted(segment_group, np.arange(groups + 1)).astype(np.int64)
        return cls(start, segment_group, mask[start[:-1]], group_start)

    def shapes(self, group_sizes: npt.NDArray[np.int32]) -> Iterator[tuple[Integers, int, list[int]]]:
        """Yield (groups, size, masks) for every distinct pair of group size and set of masks."""
        counts = np.diff(self.group_start)
        for count in distinct(counts):
            members = np.flatnonzero(counts == count)
            table = self.mask[self.group_start[members][:, None] + np.arange(count)]
            keys = np.column_stack((group_sizes[members].astype(np.int64), table))
            if (keys == keys[0]).all():  # most often, and quicker to see than to sort
                yield members, int(keys[0, 0]), keys[0, 1:].tolist()
                continue
            kinds, inverse = np.unique(keys, axis=0, return_inverse=True)
            inverse = inverse.reshape(-1)
            for row, key in enumerate(kinds.tolist()):
                yield members[inverse == row], key[0], key[1:]

    def uncoverable(self, group_sizes: npt.NDArray[np.int32]) -> Integers:
        """Groups that no set of disjoint segments covers, those without any among them; ascending."""
        bad = [
            members for members, size, masks in self.shapes(group_sizes) if not has_partition(masks, full_mask(size))
        ]
        return np.sort(np.concatenate(bad)) if bad else np.empty(0, np.int64)

    @cached_property
    def of_column(self) -> Integers:
        """The segment of each column; (columns,)."""
        return np.repeat(np.arange(self.mask.size), np.diff(self.start))


@dataclass(frozen=True, eq=False)
class Structure:
    """Segments and all partitions of every group.

    Attributes:
        segments: the runs of columns.
        partition_group: (partitions,) group of each partition, ascending.
        partition_start: (partitions + 1,) CSR offsets into `partition_segments`.
        partition_segments: segments of each partition, ascending inside it.
        group_start: (groups + 1,) first partition of each group.
    """

    segments: Segments
    partition_group: Integers
    partition_start: Integers
    partition_segments: Integers
    group_start: Integers

    @classmethod
    def build(cls, segments: Segments, group_sizes: npt.NDArray[np.int32]) -> Structure:
        """Enumerate the partitions, once per distinct set of masks.

        Raises:
            SolverError: a group can't be covered, or has more than `MAX_PARTITIONS` partitions.
        """
        owners, lengths, members_flat = [], [], []
        for members, size, masks in segments.shapes(group_sizes):
            found = list(itertools.islice(partitions(masks, full_mask(size)), MAX_PARTITIONS + 1))
            if not found:
                raise SolverError(
                    f"group {members[0]}: its columns can't be combined to cover each of its {size} layers "
                    "once; add columns that cover single layers"
                )
            if len(found) > MAX_PARTITIONS:
                raise SolverError(
                    f"group {members[0]} ({size} layers, {len(masks)} patterns) has more than "
                    f"{MAX_PARTITIONS} partitions; offer fewer fusion patterns, or split it into groups of "
                    "layers that never fuse with each other"
                )
            length = np.array([len(partition) for partition in found], dtype=np.int64)
            local = np.array([position for partition in found for position in partition], dtype=np.int64)
            owners.append(np.repeat(members, len(found)))
            lengths.append(np.tile(length, members.size))
            members_flat.append((segments.group_start[members][:, None] + local).ravel())
        owner, length = np.concatenate(owners), np.concatenate(lengths)
        flat = np.concatenate(members_flat)
        order = np.argsort(owner, kind="stable")
        start = offsets(length)
        flat = flat[ranges(start[:-1][order], length[order])]
        groups = group_sizes.size
        return cls(
            segments,
            owner[order],
            offsets(length[order]),
            flat,
            np.searchsorted(owner[order], np.arange(groups + 1)).astype(np.int64),
        )

    def segment_minima(self, cost: Floats) -> Floats:
        """Least cost (columns,) in each segment; (segments,)."""
        return np.minimum.reduceat(cost, self.segments.start[:-1])

    def partition_values(self, segment_values: Floats) -> Floats:
        """Sum of `segment_values` (segments,) over each partition; (partitions,)."""
        return np.add.reduceat(segment_values[self.partition_segments], self.partition_start[:-1])

    def evaluate(self, cost: Floats) -> tuple[float, Integers]:
        """Minimise an additive cost over all plans, ignoring every cap.

        Args:
            cost: (columns,) cost of each column, any sign.

        Returns:
            the least total cost, and the columns of a plan that has it, ascending. Ties go to the partition
            and then the column that comes first.
        """
        minima = self.segment_minima(cost)
        values = self.partition_values(minima)
        group_minima = np.minimum.reduceat(values, self.group_start[:-1])
        hits = np.flatnonzero(values == group_minima[self.partition_group])
        groups = np.arange(group_minima.size)
        chosen = hits[np.searchsorted(self.partition_group[hits], groups)]
        starts = self.partition_start[chosen]
        used = self.partition_segments[ranges(starts, self.partition_start[chosen + 1] - starts)]
        return float(group_minima.sum()), self.first_columns(cost, minima, used)

    def first_columns(self, cost: Floats, minima: Floats, used: Integers) -> Integers:
        """First column of each segment in `used` whose cost is the segment's minimum, ascending."""
        owner = self.segments.of_column
        hits = np.flatnonzero(cost == minima[owner])
        return hits[np.searchsorted(owner[hits], np.sort(used))]
