"""From a profile's tables and budgets to a `Problem`, and from a plan's columns back to layers.

Columns are made per *signature*: groups with the same roles and shapes share one template of (mask,
quantizer, implementation, latency), which is repeated for every such group with that group's losses. Nothing
loops over columns, so a mixture-of-experts model with a million of them is built in seconds.

Budgets on memory alone need no kernel: fusion changes neither bytes nor loss, so every column is a single
layer and the implementation is chosen afterwards (`solve`). With a latency budget every column is a
measured kernel; what was not measured at every budgeted batch size is no candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..kernels.errors import QuantizerError
from ..kernels.specs import match_labels
from ..profiles.rules import near
from ..profiles.schema import LATENCY
from ..profiles.tables import Profile
from ..solvers.partitions import has_partition
from ..solvers.problem import Problem, column_order
from .budget import Budget, check_distinct
from .errors import PlanError

_DTYPES = {"text": "str", "integer": "int64", "real": "float64"}

REFERENCE = "reference"
"""The implementation that runs every quantizer, without a measured latency unless the profile has one."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BuiltProblem:
    """A problem, and what its indices stand for.

    Attributes:
        problem: layers in the order of `profile.layers`, groups in the order of `groups`.
        profile: the tables.
        budgets: with caps resolved, one per resource of the problem, in the same order.
        labels: quantizer of each choice.
        groups: name of each fusion group.
        group_start: (groups + 1,) rows of `profile.layers` of each group: bit i of a mask in group g is the
            layer ``group_start[g] + i``.
        implementations: names that `implementation` indexes.
        implementation: (columns,) index into `implementations`; -1 where the column leaves it open.
        kernels: rows of latency.csv that the selection allows.
        reference_allowed: layers without a measured kernel may run on `REFERENCE` when latency isn't budgeted.
    """

    problem: Problem
    profile: Profile
    budgets: tuple[Budget, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    group_start: Integers
    implementations: tuple[str, ...]
    implementation: Integers
    kernels: pd.DataFrame
    reference_allowed: bool

    def covered(self, column: int) -> list[int]:
        """Rows of `profile.layers` that a column covers, ascending."""
        start, mask = int(self.group_start[self.problem.group[column]]), int(self.problem.mask[column])
        return [start + bit for bit in range(mask.bit_length()) if mask >> bit & 1]


_NO_KERNELS = pd.DataFrame(
    {column.name: pd.Series(dtype=_DTYPES[column.kind]) for column in LATENCY.columns if column.required}
)

Signature = tuple[tuple[str, int, int], ...]
"""(role, out_features, in_features) of the layers of a group, in the order of its mask bits."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """The columns of one group of a signature.

    Attributes:
        mask: (columns,) layers that each covers.
        choice: (columns,) index into the labels.
        implementation: (columns,) index into the implementations, -1 where open.
        latency: (latency budgets, columns) µs.
    """

    mask: Integers
    choice: Integers
    implementation: Integers
    latency: Floats


def build_problem(
    profile: Profile,
    budgets: Sequence[Budget],
    *,
    quantizers: str | None = None,
    implementations: Sequence[str] | None = None,
    fusion: bool = True,
) -> BuiltProblem:
    """The problem of meeting `budgets` at least loss.

    Args:
        profile: measured tables.
        budgets: at most one per resource and batch size.
        quantizers: comma-separated globs on labels; None for all.
        implementations: kernels to consider; None for all. Named ones that weren't measured for a layer and
            quantizer take that pair out of the choice, `REFERENCE` excepted when latency isn't budgeted.
        fusion: whether layers of a group may run as one kernel.

    Raises:
        PlanError: a budget, quantizer or implementation that the profile doesn't know, or a layer is left
            without a candidate.
    """
    check_distinct(tuple(budgets))
    resolved = tuple(budget.resolve(int(profile.layer_weights.sum())) for budget in budgets)
    batches = _latency_batches(profile, resolved)
    labels = _labels(profile, quantizers)
    reference = not batches and (implementations is None or REFERENCE in implementations)
    kernels = _kernels(profile, labels, implementations, fusion=fusion)
    names = tuple(sorted(kernels["implementation"].unique()))

    layers = profile.layers
    first = ~layers["fusion_group"].duplicated().to_numpy()
    start = np.append(np.flatnonzero(first), len(layers)).astype(np.int64)
    chosen = np.array([profile.labels.index(label) for label in labels])
    sensitivity = profile.sensitivities
    losses = sensitivity[:, None] * profile.error_matrix[:, chosen]
    sizes = profile.size_matrix[:, chosen]

    parts = []
    for signature, members in signatures(layers, start).items():
        matched = match_patterns(kernels, signature)
        if batches:
            template = _kernel_columns(matched, labels, names, batches)
        else:
            template = _single_columns(matched, labels, len(signature), profile.batch_sizes, reference=reference)
        _check_coverage(template, layers.iloc[start[members[0]] : start[members[0] + 1]], batches)
        parts.append(_repeat(template, members, start, losses, sizes))

    column = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    order = column_order(column["group"], column["mask"])
    column = {name: values[..., order] for name, values in column.items()}
    use = {"memory": column["memory"]}
    use |= {f"latency@{batch}": row for batch, row in zip(batches, column["latency"], strict=True)}
    overhead = {"memory": 0.0}
    if profile.manifest.latency is not None:
        overhead |= {f"latency@{batch}": us for batch, us in profile.manifest.latency.step_overhead_us.items()}
    bits = profile.quantizers["bits_per_weight"].to_numpy(np.float64)[chosen]
    problem = Problem(
        group=column["group"].astype(np.int32),
        mask=column["mask"].astype(np.int64),
        choice=column["choice"].astype(np.int32),
        loss=column["loss"],
        usage=np.stack([use[budget.name] for budget in resolved]),
        caps=np.array([budget.cap for budget in resolved], dtype=np.float64),
        base=np.array([overhead[budget.name] for budget in resolved]),
        group_sizes=np.diff(start).astype(np.int32),
        resource_names=tuple(budget.name for budget in resolved),
        choice_names=labels,
        layer_sensitivity=sensitivity,
        layer_weights=profile.layer_weights.astype(np.float64),
        column_bits=bits[column["choice"].astype(np.int64)],
    )
    return BuiltProblem(
        problem=problem,
        profile=profile,
        budgets=resolved,
        labels=labels,
        groups=tuple(layers["fusion_group"][first]),
        group_start=start,
        implementations=names,
        implementation=column["implementation"].astype(np.int64),
        kernels=kernels,
        reference_allowed=reference,
    )


def signatures(layers: pd.DataFrame, start: Integers) -> dict[Signature, Integers]:
    """Groups by signature: the same roles and shapes, so the same kernels; positions of groups ascending."""
    rows = list(zip(layers["role"], layers["out_features"], layers["in_features"], strict=True))
    members: dict[Signature, list[int]] = {}
    for group, (low, high) in enumerate(zip(start[:-1].tolist(), start[1:].tolist(), strict=True)):
        members.setdefault(tuple(rows[low:high]), []).append(group)
    return {signature: np.array(groups, dtype=np.int64) for signature, groups in members.items()}


def match_patterns(kernels: pd.DataFrame, signature: Signature) -> pd.DataFrame:
    """The kernels that can run in groups of a signature, with the `mask` of the layers that each covers.

    A pattern fits when the group has all its roles, their rows add up to the kernel's out_features and the
    input is as wide.
    """
    bits = {role: bit for bit, (role, _, _) in enumerate(signature)}
    keys = ["pattern", "out_features", "in_features"]
    patterns = kernels[keys].drop_duplicates()
    masks = []
    for pattern, rows, width in patterns.itertuples(index=False):
        covered = [bits[role] for role in pattern.split("+") if role in bits]
        fits = len(covered) == pattern.count("+") + 1
        fits = fits and sum(signature[bit][1] for bit in covered) == rows
        fits = fits and all(signature[bit][2] == width for bit in covered)
        masks.append(sum(1 << bit for bit in covered) if fits else 0)
    patterns = patterns.assign(mask=np.array(masks, dtype=np.int64))
    return kernels.merge(patterns[patterns["mask"] > 0], on=keys)


def _latency_batches(profile: Profile, budgets: Sequence[Budget]) -> tuple[int, ...]:
    """Budgeted batch sizes in the order of the budgets; each must have been measured."""
    batches = tuple(budget.batch_size for budget in budgets if budget.batch_size is not None)
    for budget in budgets:
        if budget.batch_size is None:
            continue
        if profile.latency is None:
            raise PlanError(
                f'"{budget.text}" can\'t be planned: the profile of {profile.manifest.model.name} has no latency; '
                "measure it with `msq profile` on the target device, or leave the budget out."
            )
        if budget.batch_size not in profile.batch_sizes:
            measured = ", ".join(map(str, profile.batch_sizes))
            raise PlanError(
                f'"{budget.text}": latency was not measured at batch size {budget.batch_size}; measured: {measured}.'
            )
    return batches


def _labels(profile: Profile, quantizers: str | None) -> tuple[str, ...]:
    if quantizers is None:
        return profile.labels
    try:
        return tuple(match_labels(profile.labels, quantizers))
    except QuantizerError as cause:
        raise PlanError(str(cause)) from cause


def _kernels(
    profile: Profile, labels: tuple[str, ...], implementations: Sequence[str] | None, *, fusion: bool
) -> pd.DataFrame:
    """Rows of latency.csv that the selection allows; none without latency."""
    kernels = _NO_KERNELS if profile.step_latency is None else profile.step_latency[list(_NO_KERNELS)]
    if implementations is not None:
        known = sorted({*kernels["implementation"], REFERENCE})
        for name in implementations:
            if name not in known:
                raise PlanError(f"the profile has no implementation '{name}'; near matches: {near(name, known)}.")
        if not implementations:
            raise PlanError(f"expected at least one implementation; the profile has {', '.join(known)}.")
        kernels = kernels[kernels["implementation"].isin(implementations)]
    kernels = kernels[kernels["quantizer"].isin(labels)]
    return kernels if fusion else kernels[~kernels["pattern"].str.contains("+", regex=False)]


def _kernel_columns(
    matched: pd.DataFrame, labels: tuple[str, ...], names: tuple[str, ...], batches: tuple[int, ...]
) -> _Columns:
    """A column per kernel that was measured at every budgeted batch size."""
    keys = ["mask", "quantizer", "implementation"]
    # Not pivot_table, which would average a kernel that is there twice.
    wide = matched.pivot(index=keys, columns="batch_size", values="latency_us")  # noqa: PD010
    wide = wide.reindex(columns=list(batches)).dropna().reset_index()
    return _Columns(
        mask=wide["mask"].to_numpy(np.int64),
        choice=pd.Index(labels).get_indexer(pd.Index(wide["quantizer"])).astype(np.int64),
        implementation=pd.Index(names).get_indexer(pd.Index(wide["implementation"])).astype(np.int64),
        latency=wide[list(batches)].to_numpy(np.float64).T,
    )


def _single_columns(
    matched: pd.DataFrame,
    labels: tuple[str, ...],
    size: int,
    batch_sizes: tuple[int, ...],
    *,
    reference: bool,
) -> _Columns:
    """A column per layer and quantizer; without the reference, only where a kernel runs the layer alone."""
    mask = np.repeat(np.int64(1) << np.arange(size, dtype=np.int64), len(labels))
    choice = np.tile(np.arange(len(labels), dtype=np.int64), size)
    if not reference:
        measured = matched[matched["batch_size"] == min(batch_sizes, default=0)]
        runs = pd.MultiIndex.from_arrays([measured["mask"], measured["quantizer"]])
        keep = pd.MultiIndex.from_arrays([mask, np.array(labels, dtype=object)[choice]]).isin(runs)
        mask, choice = mask[keep], choice[keep]
    return _Columns(mask, choice, np.full(mask.size, -1, dtype=np.int64), np.empty((0, mask.size)))


def _check_coverage(template: _Columns, group: pd.DataFrame, batches: tuple[int, ...]) -> None:
    """Names a layer of a group that no combination of columns covers."""
    masks = np.unique(template.mask).tolist()
    if has_partition(masks, (1 << len(group)) - 1):
        return
    bare = [bit for bit in range(len(group)) if not any(mask >> bit & 1 for mask in masks)]
    row = group.iloc[bare[0] if bare else 0]
    sizes = f" at batch size {' and '.join(map(str, batches))}" if batches else ""
    raise PlanError(
        f"no candidate is left for {row['layer']} ({row['out_features']} x {row['in_features']}): no kernel of the "
        f"chosen quantizers and implementations was measured for it{sizes}; choose more, or measure them."
    )


def _repeat(
    template: _Columns, members: Integers, start: Integers, losses: Floats, sizes: Floats
) -> dict[str, npt.NDArray[np.int64 | np.float64]]:
    """The template's columns for every member group, with that group's loss and memory."""
    shape = (members.size, template.mask.size)
    loss, memory = np.zeros(shape), np.zeros(shape)
    for bit in range(int(template.mask.max()).bit_length()):
        covers = np.flatnonzero(template.mask >> bit & 1)
        cells = np.ix_(start[members] + bit, template.choice[covers])
        loss[:, covers] += losses[cells]
        memory[:, covers] += sizes[cells]
    return {
        "group": np.repeat(members, shape[1]),
        "mask": np.tile(template.mask, shape[0]),
        "choice": np.tile(template.choice, shape[0]),
        "implementation": np.tile(template.implementation, shape[0]),
        "latency": np.tile(template.latency, shape[0]),
        "loss": loss.reshape(-1),
        "memory": memory.reshape(-1),
    }
