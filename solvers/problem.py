"""The problem every backend solves: choose columns that partition every group, within caps, at least loss.

    minimise    sum_c loss[c] x[c]
    subject to  sum_{c covers layer l} x[c] = 1          for every layer l
                base[r] + sum_c usage[r, c] x[c] <= caps[r]   for every resource r
                x[c] in {0, 1}

This is the multiple-choice knapsack of Q-Palette (arXiv 2509.20214, section 3), with fusion patterns as
columns and any number of resources. Nothing here knows what a quantizer or a microsecond is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import SolverError
from .structure import Floats, Integers, Segments, Structure, full_mask, offsets

_Scalar = TypeVar("_Scalar", bound=np.generic)

SMALLEST, LARGEST = 1e-60, 1e60
"""Of losses and uses: products and quotients of them stay numbers."""
MAX_GROUP_SIZE = 62
"""Layers that a mask of type int64 can name, with one bit to spare."""


def column_order(group: npt.ArrayLike, mask: npt.ArrayLike) -> Integers:
    """The permutation that sorts columns by (group, mask), keeping the order of equal ones; (columns,)."""
    return np.lexsort((np.asarray(mask), np.asarray(group))).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Problem:
    """Columns, groups, caps. Arrays are converted to the types below and become read-only.

    Attributes:
        group: (columns,) int32, the group that a column belongs to.
        mask: (columns,) int64, bit i set = the column covers layer i of its group.
        choice: (columns,) int32, which option (quantizer) the column uses; `uniform` uses one everywhere.
        loss: (columns,) 0, or between `SMALLEST` and `LARGEST`.
        usage: (resources, columns) likewise, in the resource's own unit.
        caps: (resources,) finite; may be below `base`, then the problem is infeasible.
        base: (resources,) finite, >= 0, use that no choice changes: ``base + sum(usage) <= caps``.
        group_sizes: (groups,) int32, number of layers of each group, 1 to 62.
        resource_names: one per resource, such as ``("memory", "latency@1")``; `water_filling` knows the name
            ``memory``, the others are for messages.
        choice_names: labels of the choices.
        layer_sensitivity: (layers,) a_l >= 0, layers in group-major order; only `water_filling` needs these.
        layer_weights: (layers,) d_l = out * in > 0.
        column_bits: (columns,) nominal bits per weight of the column's quantizer, > 0.
        same_choice: (layers,) int64, layers of equal number >= 0 must have the same choice; -1 for free ones. A side
            constraint, for solvers that say they can handle those.
        max_choices: most different choices that a plan may use, >= 1; None for any. A side constraint too.

    Columns are sorted by (group, mask); see `column_order`.

    Raises:
        SolverError: any of this doesn't hold, or a group can't be covered by its columns.
    """

    group: npt.NDArray[np.int32]
    mask: Integers
    choice: npt.NDArray[np.int32]
    loss: Floats
    usage: Floats
    caps: Floats
    base: Floats
    group_sizes: npt.NDArray[np.int32]
    resource_names: tuple[str, ...]
    choice_names: tuple[str, ...]
    layer_sensitivity: Floats | None = None
    layer_weights: Floats | None = None
    column_bits: Floats | None = None
    same_choice: Integers | None = None
    max_choices: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _INTEGER_FIELDS.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integers(name, getattr(self, name), kind))
        for field in fields(self):
            if field.name in _FLOAT_FIELDS and getattr(self, field.name) is not None:
                object.__setattr__(self, field.name, _floats(field.name, getattr(self, field.name)))
        object.__setattr__(self, "resource_names", tuple(self.resource_names))
        object.__setattr__(self, "choice_names", tuple(self.choice_names))
        self._check_shapes()
        self._check_values()
        self._check_columns()
        self._check_side_constraints()

    @property
    def columns(self) -> int:
        """Number of columns."""
        return int(self.group.size)

    @property
    def resources(self) -> int:
        """Number of resources."""
        return int(self.caps.size)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.group_sizes.size)

    @property
    def room(self) -> Floats:
        """What the choices may use of each resource, ``caps - base``; (resources,)."""
        return self.caps - self.base

    @property
    def has_side_constraints(self) -> bool:
        """Whether choices are tied to each other by more than the caps."""
        return self.same_choice is not None or self.max_choices is not None

    @cached_property
    def segments(self) -> Segments:
        """Runs of columns with equal (group, mask)."""
        return Segments.build(self.group, self.mask, self.groups)

    @cached_property
    def structure(self) -> Structure:
        """Segments with all partitions of every group, enumerated when first asked for.

        Raises:
            SolverError: a group has too many partitions.
        """
        return Structure.build(self.segments, self.group_sizes)

    def uncovered_groups(self, columns: Integers) -> Integers:
        """Groups that `columns` (ascending) don't cover; ascending."""
        return Segments.build(self.group[columns], self.mask[columns], self.groups).uncoverable(self.group_sizes)

    def with_columns(self, columns: Integers, **changes: Any) -> Problem:
        """The problem with some of its columns.

        Args:
            columns: ascending.
            changes: other fields, as for `dataclasses.replace`.

        Raises:
            SolverError: they don't cover a group.
        """
        kept = {name: getattr(self, name) for name in _COLUMN_FIELDS if getattr(self, name) is not None}
        return replace(self, **({name: array[..., columns] for name, array in kept.items()} | changes))

    def covers(self, columns: Integers) -> tuple[Integers, Integers]:
        """Every layer of every column: (position in `columns`, layer in group-major order), by position."""
        bits = np.arange(int(self.group_sizes.max()))
        position, bit = np.nonzero(self.mask[columns, None] >> bits & 1)
        return position, offsets(self.group_sizes.astype(np.int64))[self.group[columns[position]]] + bit

    def _check_shapes(self) -> None:
        if self.group_sizes.ndim != 1 or self.groups == 0:
            raise SolverError(
                f"group_sizes: expected one entry per group and at least one group, got shape "
                f"{self.group_sizes.shape}; give the number of layers of every group"
            )
        if self.caps.ndim != 1 or self.resources == 0:
            raise SolverError(
                f"caps: expected one entry per resource and at least one resource, got shape "
                f"{self.caps.shape}; a problem without budgets can be given a cap it never reaches"
            )
        if self.group.ndim != 1 or self.columns == 0:
            raise SolverError(f"group: expected (columns,) with at least one column, got {self.group.shape}")
        layers = int(self.group_sizes.sum())
        expected: dict[str, tuple[int, ...]] = {
            "mask": (self.columns,),
            "choice": (self.columns,),
            "loss": (self.columns,),
            "usage": (self.resources, self.columns),
            "base": (self.resources,),
            "layer_sensitivity": (layers,),
            "layer_weights": (layers,),
            "same_choice": (layers,),
            "column_bits": (self.columns,),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise SolverError(
                    f"{name}: expected shape {shape} ({self.columns} columns, {self.resources} resources, "
                    f"{layers} layers), got {array.shape}; make the arrays agree"
                )
        if len(self.resource_names) != self.resources or len(set(self.resource_names)) != self.resources:
            raise SolverError(f"resource_names: expected {self.resources} different names, got {self.resource_names!r}")

    def _check_values(self) -> None:
        for name in sorted(_FLOAT_FIELDS):
            array = getattr(self, name)
            if array is None:
                continue
            wrong = ~np.isfinite(array)
            if name != "caps":
                wrong |= array < 0
            if name in ("loss", "usage"):
                wrong |= (array > 0) & ((array < SMALLEST) | (array > LARGEST))
            if name in ("layer_weights", "column_bits"):
                wrong |= array == 0
            if wrong.any():
                where = tuple(int(i) for i in np.argwhere(wrong)[0])
                allowed = "finite" if name == "caps" else "finite and not negative"
                if name in ("loss", "usage"):
                    allowed = f"0 or between {SMALLEST:g} and {LARGEST:g}"
                if name in ("layer_weights", "column_bits"):
                    allowed = "finite and positive"
                raise SolverError(
                    f"{name}{list(where)}: expected a number that is {allowed}, got {array[where]}; "
                    "leave out columns that can't be used"
                )
        sizes = self.group_sizes
        if sizes.min() < 1 or sizes.max() > MAX_GROUP_SIZE:
            raise SolverError(
                f"group_sizes: expected 1 to {MAX_GROUP_SIZE} layers per group, got {sizes.min()} to "
                f"{sizes.max()}; split groups into layers that can fuse with each other"
            )

    def _check_columns(self) -> None:
        for name, limit in (("group", self.groups), ("choice", len(self.choice_names))):
            array = getattr(self, name)
            if array.min() < 0 or array.max() >= limit:
                raise SolverError(
                    f"{name}: expected numbers from 0 to {limit - 1}, got {array.min()} to {array.max()}; "
                    f"number the {'groups' if name == 'group' else 'choices'} from zero without gaps"
                )
        full = np.array([full_mask(size) for size in range(MAX_GROUP_SIZE + 1)], dtype=np.int64)
        outside = (self.mask <= 0) | (self.mask & ~full[self.group_sizes[self.group]] != 0)
        if outside.any():
            column = int(np.flatnonzero(outside)[0])
            raise SolverError(
                f"mask[{column}]: expected a non-empty set of the {self.group_sizes[self.group[column]]} "
                f"layers of group {self.group[column]}, got {self.mask[column]:#b}; bit i stands for layer i"
            )
        step = np.diff(self.group)
        if ((step < 0) | ((step == 0) & (np.diff(self.mask) < 0))).any():
            raise SolverError(
                "columns: expected them sorted by (group, mask), they aren't; apply "
                "column_order(group, mask) to every array over columns"
            )
        uncovered = self.segments.uncoverable(self.group_sizes)
        if uncovered.size:
            raise SolverError(
                f"group {uncovered[0]}: expected columns that together cover each of its "
                f"{self.group_sizes[uncovered[0]]} layers once, no combination does ({uncovered.size} such "
                "groups); offer at least one usable option for every layer"
            )

    def _check_side_constraints(self) -> None:
        if self.max_choices is not None and (self.max_choices != int(self.max_choices) or self.max_choices < 1):
            raise SolverError(f"max_choices: expected an integer >= 1 or None, got {self.max_choices}")
        if self.same_choice is not None:
            labels, counts = np.unique(self.same_choice[self.same_choice >= 0], return_counts=True)
            if not labels.size or counts.min() < 2:
                raise SolverError(
                    "same_choice: expected sets of at least two layers with equal numbers >= 0, got a set of fewer; "
                    "leave the field out or give -1 to layers that are free"
                )


_INTEGER_FIELDS: dict[str, type[np.signedinteger]] = {
    "group": np.int32,
    "mask": np.int64,
    "choice": np.int32,
    "group_sizes": np.int32,
    "same_choice": np.int64,
}
_COLUMN_FIELDS = ("group", "mask", "choice", "loss", "usage", "column_bits")
_FLOAT_FIELDS = frozenset(("loss", "usage", "caps", "base", "layer_sensitivity", "layer_weights", "column_bits"))


def _integers(name: str, value: npt.ArrayLike, kind: type[np.signedinteger]) -> npt.NDArray[np.signedinteger]:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise SolverError(f"{name}: expected integers, got {array.dtype}; convert them explicitly")
    limits = np.iinfo(kind)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise SolverError(f"{name}: expected numbers that fit {limits.dtype}, got up to {array.max()}")
    return _read_only(array.astype(kind, copy=False))


def _floats(name: str, value: npt.ArrayLike) -> Floats:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.size:
        raise SolverError(f"{name}: expected real numbers, got {array.dtype}; convert them explicitly")
    return _read_only(np.ascontiguousarray(array, dtype=np.float64))


def _read_only(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    view = array.view()
    view.flags.writeable = False
    return view
