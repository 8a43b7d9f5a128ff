"""Side constraints as users write them, applied to a built problem.

    pin:REGEX=QUANTIZERS      layers whose path matches take one of these quantizers (globs)
    ban:REGEX=QUANTIZERS      ... take none of these
    min-bits:REGEX=BITS       ... take at least this many bits per weight
    max-bits:REGEX=BITS       ... at most
    same:REGEX                ... all take the same quantizer
    distinct=N                the plan uses at most N different quantizers
    device:REGEX=AMOUNT       ... take at most this much memory together (``80GiB``, ``3bpw`` of their own weights)

A regular expression has to match somewhere in the layer's module path (`re.search`). The first four only leave out
columns, so every solver can handle them; a device's memory is one more resource. `same` and `distinct` tie choices
together and need a solver whose ability `side_constraints` says so. Columns that fuse layers of a device with
others are left out too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..kernels.errors import QuantizerError
from ..kernels.specs import match_labels
from ..profiles.tables import Profile
from ..solvers.problem import Problem
from ..solvers.solution import Solution
from .budget import parse_budget
from .errors import PlanError
from .plan import Plan
from .problem_builder import BuiltProblem

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

Kind = Literal["pin", "ban", "min-bits", "max-bits", "same", "distinct", "device"]
_FORMS: dict[str, str] = {
    "pin": "pin:REGEX=QUANTIZERS",
    "ban": "ban:REGEX=QUANTIZERS",
    "min-bits": "min-bits:REGEX=BITS",
    "max-bits": "max-bits:REGEX=BITS",
    "same": "same:REGEX",
    "distinct": "distinct=N",
    "device": "device:REGEX=AMOUNT",
}


@dataclass(frozen=True)
class Constraint:
    """One side constraint.

    Attributes:
        kind: see the module.
        text: as the user wrote it.
        layers: regular expression on layer paths; "" for `distinct`.
        value: what stands after the equals sign; "" for `same`.
    """

    kind: Kind
    text: str
    layers: str
    value: str


@dataclass(frozen=True, eq=False)
class Constrained:
    """A built problem under side constraints.

    Attributes:
        built: the problem without them.
        problem: what to solve.
        columns: (problem.columns,) the column of `built.problem` that each column is.
        constraints: what was applied.
    """

    built: BuiltProblem
    problem: Problem
    columns: Integers
    constraints: tuple[Constraint, ...] = ()

    def restore(self, solution: Solution) -> Solution:
        """A solution of `problem` in the columns of `built.problem`, for `plan_of(built, ...)`.

        Its bound holds under the constraints only. Shadow prices of devices are dropped, and all of them where choices
        are tied to each other, which prices know nothing of.
        """
        resources = self.built.problem.resources
        multipliers = None if self.problem.has_side_constraints else solution.multipliers
        return dataclasses.replace(
            solution,
            columns=None if solution.columns is None else self.columns[solution.columns],
            multipliers=None if multipliers is None else multipliers[:resources],
        )


def parse_constraint(text: str) -> Constraint:
    """One side constraint.

    Raises:
        PlanError: not of a known form, or the regular expression or the number isn't one.
    """
    head, equals, value = (part.strip() for part in text.rpartition("=")) if "=" in text else (text.strip(), "", "")
    kind, colon, layers = (part.strip() for part in head.partition(":"))
    if kind == "same":
        # a regular expression may hold an equals sign, and nothing follows it
        kind, colon, layers, equals, value = "same", ":", text.partition(":")[2].strip(), "", ""
    form = _FORMS.get(kind)
    if form is None:
        raise PlanError(f'"{text}": expected a constraint such as {", ".join(_FORMS.values())}.')
    if (":" in form) != bool(colon and layers) or ("=" in form) != bool(equals and value):
        raise PlanError(f'"{text}": expected {form}.')
    try:
        re.compile(layers)
    except re.error as cause:
        raise PlanError(f'"{text}": "{layers}" is not a regular expression ({cause}).') from cause
    if kind in ("min-bits", "max-bits"):
        _number(text, value)
    if kind == "distinct" and not re.fullmatch(r"0*[1-9][0-9]*", value):
        raise PlanError(f'"{text}": expected a whole number of at least 1 after the equals sign; got "{value}".')
    return Constraint(kind, text, layers, value)  # type: ignore[arg-type]


def parse_constraints(texts: Iterable[str]) -> tuple[Constraint, ...]:
    """Several side constraints; see `parse_constraint`."""
    return tuple(parse_constraint(text) for text in texts)


def constrain(built: BuiltProblem, constraints: Sequence[Constraint]) -> Constrained:
    """Apply side constraints.

    Raises:
        PlanError: a constraint selects no layer or no quantizer, or leaves a layer without a candidate.
    """
    if not constraints:
        return Constrained(built, built.problem, np.arange(built.problem.columns))
    names = built.profile.layer_names
    cover = _Cover(built)
    kept = np.ones(built.problem.columns, dtype=bool)
    same = np.full(len(names), -1, dtype=np.int64)
    distinct: list[int] = []
    devices: dict[str, tuple[float, Booleans]] = {}
    for constraint in constraints:
        if constraint.kind == "distinct":
            distinct.append(int(constraint.value))
            continue
        layers = _matched(constraint, names)
        if constraint.kind == "same":
            if np.count_nonzero(layers) < 2:
                raise PlanError(f'"{constraint.text}": only one layer matches "{constraint.layers}"; expected several.')
            _join(same, layers)
        elif constraint.kind == "device":
            kept &= cover.any(layers) == cover.all(layers)
            _check_cover(built, kept, constraint)
            cap = _device_cap(constraint, built, layers)
            known = devices.get(constraint.layers)
            devices[constraint.layers] = (cap if known is None else min(cap, known[0]), layers)
        else:
            kept &= ~cover.any(layers) | _allowed(constraint, built)[built.problem.choice]
            _check_cover(built, kept, constraint)
    columns = np.flatnonzero(kept)
    caps = [(f"memory of {layers}", cap, covered) for layers, (cap, covered) in devices.items()]
    problem = _problem(built, columns, cover, caps, same, min(distinct, default=None))
    return Constrained(built, problem, columns, tuple(constraints))


def broken_by(plan: Plan, profile: Profile, constraints: Iterable[Constraint]) -> list[Constraint]:
    """The constraints on quantizers that a plan made before breaks: pin, ban, min-bits and max-bits.

    Args:
        profile: its labels are those that globs select; quantizers that it lacks go by the plan's own.
    """
    known = {profile.spec(label): label for label in profile.labels}
    label_of = {label: known.get(plan.spec(label), label) for label in plan.quantizers}
    return [constraint for constraint in constraints if not _kept(plan, label_of, profile.labels, constraint)]


def _kept(plan: Plan, label_of: Mapping[str, str], labels: Sequence[str], constraint: Constraint) -> bool:
    """Whether the quantizers of all layers that a constraint on quantizers selects are within it."""
    used = {entry.quantizer for entry in plan.layers if re.search(constraint.layers, entry.layer)}
    if constraint.kind in ("pin", "ban"):
        listed = match_labels([*labels, *label_of.values()], constraint.value)
        return all((label_of[label] in listed) == (constraint.kind == "pin") for label in used)
    limit, bits = _number(constraint.text, constraint.value), [plan.spec(label).bits for label in used]
    return all(b >= limit if constraint.kind == "min-bits" else b <= limit for b in bits)


class _Cover:
    """Which columns cover which layers of the profile."""

    def __init__(self, built: BuiltProblem) -> None:
        problem = built.problem
        self.column, self.layer = problem.covers(np.arange(problem.columns))
        self.columns = problem.columns
        self.built = built

    def any(self, layers: Booleans) -> Booleans:
        """(columns,) whether a column covers one of `layers` (layers,)."""
        return np.asarray(np.bincount(self.column, layers[self.layer], self.columns) > 0)

    def all(self, layers: Booleans) -> Booleans:
        """(columns,) whether a column covers nothing but `layers`."""
        return np.asarray(np.bincount(self.column, ~layers[self.layer], self.columns) == 0)

    def memory(self, layers: Booleans) -> Floats:
        """(columns,) bytes that a column takes for `layers`."""
        labels = np.array([self.built.profile.labels.index(label) for label in self.built.labels])
        size = self.built.profile.size_matrix[self.layer, labels[self.built.problem.choice[self.column]]]
        return np.bincount(self.column, size * layers[self.layer], self.columns).astype(np.float64)


def _matched(constraint: Constraint, names: Sequence[str]) -> Booleans:
    pattern = re.compile(constraint.layers)
    layers = np.array([pattern.search(name) is not None for name in names])
    if not layers.any():
        raise PlanError(f'"{constraint.text}": no layer matches "{constraint.layers}"; paths look like {names[0]}.')
    return layers


def _allowed(constraint: Constraint, built: BuiltProblem) -> Booleans:
    """(choices,) which quantizers the constraint's layers may take."""
    if constraint.kind in ("pin", "ban"):
        try:
            listed = match_labels(built.labels, constraint.value)
        except QuantizerError as cause:
            raise PlanError(f'"{constraint.text}": {cause}') from cause
        found = np.isin(built.labels, listed)
        return np.asarray(found if constraint.kind == "pin" else ~found)
    frame = built.profile.quantizers.set_index("quantizer")["bits_per_weight"]
    bits = frame.loc[list(built.labels)].to_numpy(np.float64)
    limit = _number(constraint.text, constraint.value)
    return np.asarray(bits >= limit if constraint.kind == "min-bits" else bits <= limit)


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not 0 < number < np.inf:
        raise PlanError(f'"{text}": expected a positive number of bits after the equals sign; got "{value}".')
    return number


def _join(same: Integers, layers: Booleans) -> None:
    """Give the layers one number, together with all that already share one with any of them."""
    known = np.unique(same[layers])
    joined = layers | np.isin(same, known[known >= 0])
    same[joined] = same.max(initial=-1) + 1


def _device_cap(constraint: Constraint, built: BuiltProblem, layers: Booleans) -> float:
    """Bytes."""
    try:
        budget = parse_budget(f"memory={constraint.value}")
    except PlanError as cause:
        raise PlanError(f'"{constraint.text}": {cause}') from cause
    cap = budget.resolve(int(built.profile.layer_weights[layers].sum())).cap
    if cap is None:
        raise PlanError(f'"{constraint.text}": expected an amount of memory; got "{constraint.value}".')
    return cap


def _check_cover(built: BuiltProblem, kept: Booleans, constraint: Constraint) -> None:
    """Names a layer that is left without a candidate."""
    bad = built.problem.uncovered_groups(np.flatnonzero(kept))
    if bad.size:
        layer = built.profile.layer_names[int(built.group_start[bad[0]])]
        raise PlanError(
            f'"{constraint.text}" leaves the group of {layer} without a candidate ({bad.size} such groups); allow '
            "more quantizers or drop a constraint."
        )


def _problem(
    built: BuiltProblem,
    columns: Integers,
    cover: _Cover,
    caps: Sequence[tuple[str, float, Booleans]],
    same: Integers,
    distinct: int | None,
) -> Problem:
    """The problem with some of its columns, a resource for each device, and ties between choices."""
    old = built.problem
    usage = [old.usage, *(cover.memory(layers)[None, :] for _, _, layers in caps)]
    names = [name for name, _, _ in caps]
    labels, counts = np.unique(same[same >= 0], return_counts=True)
    same = np.where(np.isin(same, labels[counts > 1]), same, -1)
    return old.with_columns(
        columns,
        usage=np.vstack(usage)[:, columns],
        caps=np.concatenate((old.caps, [cap for _, cap, _ in caps])),
        base=np.concatenate((old.base, np.zeros(len(caps)))),
        resource_names=(*old.resource_names, *names),
        same_choice=same if (same >= 0).any() else None,
        max_choices=distinct,
    )
