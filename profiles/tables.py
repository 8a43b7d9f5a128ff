"""A profile in memory: loading, checking, saving.

A profile is a directory (see `schema` for the files). `load_profile` reads each file once, checks digests,
columns, values and references between tables, and sorts rows into one canonical order, so that two
profiles which differ in row order give the same plan. `save_profile` writes tables first and the manifest,
with their digests, last: a crash in between leaves a profile that says it is inconsistent.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..kernels.errors import QuantizerError
from ..kernels.specs import DEFAULT_STATE_BITS, Family, QuantizerSpec, TrellisCode, table_bits_of
from .errors import ProfileError
from .files import dump_yaml, parse_yaml, read_bytes, write_atomic
from .schema import (
    ARCHITECTURES,
    ERRORS,
    LATENCY,
    LAYERS,
    MANIFEST_FILE,
    QUANTIZERS,
    ROLES,
    TABLES,
    ProfileManifest,
    Table,
    parse_manifest,
    parse_table,
)

MAX_GROUP_LAYERS = 62
"""Layers of a fusion group are bits of a signed 64-bit mask."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Profile:
    """Checked tables, rows in canonical order (columns in `schema`). Treat the frames as read-only.

    Attributes:
        manifest: profile.yaml.
        layers: one row per layer, by block, then fusion group, then role: layers of a group are neighbours.
        quantizers: one row per quantizer, by family, bits, state.
        errors: measured normalised errors and sizes, or None; pairs may be absent.
        latency: kernel latencies, pattern roles in canonical order, or None.
        digest: SHA-256 over the names and contents of the files.
    """

    manifest: ProfileManifest
    layers: pd.DataFrame
    quantizers: pd.DataFrame
    errors: pd.DataFrame | None
    latency: pd.DataFrame | None
    digest: str

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(self.layers["layer"])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Quantizer labels, in the order of `quantizers`."""
        return tuple(self.quantizers["quantizer"])

    @cached_property
    def layer_weights(self) -> npt.NDArray[np.int64]:
        """(layers,) number of weights, out_features * in_features."""
        return (self.layers["out_features"] * self.layers["in_features"]).to_numpy(np.int64)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with measured latency, ascending; empty without latency."""
        return tuple(sorted(self.manifest.latency.batch_sizes)) if self.manifest.latency else ()

    @cached_property
    def error_matrix(self) -> FloatArray:
        """(layers, quantizers) normalised error: measured where errors.csv has the pair, else on N(0,1)."""
        gaussian = self.quantizers["gaussian_error"].to_numpy(np.float64)
        return self._with_measured(np.tile(gaussian, (len(self.layers), 1)), "error")

    @cached_property
    def size_matrix(self) -> FloatArray:
        """(layers, quantizers) whole bytes: measured, else out*in*bits_per_weight/8 + table_bytes."""
        bits = self.quantizers["bits_per_weight"].to_numpy(np.float64)
        tables = self.quantizers["table_bytes"].to_numpy(np.float64)
        codes = np.ceil(self.layer_weights[:, None].astype(np.float64) * bits / 8)
        return self._with_measured(codes + tables, "size_bytes")

    @cached_property
    def _specs(self) -> dict[str, QuantizerSpec]:
        return _specs(self.quantizers, QUANTIZERS.file)

    def spec(self, label: str) -> QuantizerSpec:
        """The quantizer that a label stands for, from the table's fields.

        Raises:
            ProfileError: the profile has no such quantizer; near matches are named.
        """
        if label not in self._specs:
            raise ProfileError(f"the profile has no quantizer '{label}'; near matches: {near(label, self.labels)}.")
        return self._specs[label]

    def _with_measured(self, values: FloatArray, column: str) -> FloatArray:
        if self.errors is not None and column in self.errors:
            rows = pd.Index(self.layers["layer"]).get_indexer(pd.Index(self.errors["layer"]))
            columns = pd.Index(self.quantizers["quantizer"]).get_indexer(pd.Index(self.errors["quantizer"]))
            values[rows, columns] = self.errors[column].to_numpy(np.float64)
        values.flags.writeable = False
        return values


def near(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Up to three of `known` that resemble `name`, else the first few, for a message."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5])


def load_profile(path: str | Path) -> Profile:
    """Reads and checks the profile directory `path`.

    Raises:
        ProfileError: a file is missing, corrupt, altered since it was written, or tables disagree.
    """
    directory = Path(path)
    if not directory.is_dir():
        found = "it is a file" if directory.exists() else "there is none"
        raise ProfileError(f"expected a profile directory at {directory}; {found}; make one with `msq profile`.")
    contents = {MANIFEST_FILE: read_bytes(directory / MANIFEST_FILE, "profile manifest")}
    for table in TABLES:
        if table in (LAYERS, QUANTIZERS) or (directory / table.file).exists():
            contents[table.file] = read_bytes(directory / table.file, "profile table")
    return _assemble(contents, directory)


def save_profile(
    path: str | Path,
    manifest: ProfileManifest,
    layers: pd.DataFrame,
    quantizers: pd.DataFrame,
    *,
    errors: pd.DataFrame | None = None,
    latency: pd.DataFrame | None = None,
) -> Profile:
    """Writes a profile directory (made if missing) and returns it as `load_profile` would.

    Everything is checked before the first byte is written. `manifest.files` is replaced by the digests of
    what is written; a table that an earlier profile left there and this one lacks is removed. Floats are
    written in the shortest form that reads back exactly.

    Raises:
        ProfileError: the tables break a rule of `load_profile`, or the directory can't be written.
    """
    directory = Path(path)
    frames = {LAYERS.file: layers, QUANTIZERS.file: quantizers, ERRORS.file: errors, LATENCY.file: latency}
    contents = {
        name: frame.to_csv(index=False, lineterminator="\n").encode()
        for name, frame in frames.items()
        if frame is not None
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    written = manifest.model_copy(update={"files": digests})
    contents[MANIFEST_FILE] = dump_yaml(written, exclude_none=True).encode()
    profile = _assemble(contents, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():  # the manifest is the last
            if name == MANIFEST_FILE:
                for stale in frames.keys() - contents.keys():
                    (directory / stale).unlink(missing_ok=True)
            write_atomic(directory / name, content)
    except OSError as cause:
        raise ProfileError(f"can't write the profile {directory}: {cause.strerror or cause}.") from cause
    return profile


def _assemble(contents: Mapping[str, bytes], directory: Path) -> Profile:
    """A checked profile from the contents of its files."""
    where = str(directory / MANIFEST_FILE)
    manifest = parse_manifest(parse_yaml(contents[MANIFEST_FILE], where), where)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    _check_digests(manifest, digests, where)

    def table(kind: Table) -> pd.DataFrame | None:
        content = contents.get(kind.file)
        return None if content is None else parse_table(kind, content, str(directory / kind.file))

    layers, quantizers, errors, latency = (table(kind) for kind in TABLES)
    assert layers is not None and quantizers is not None
    layers = _sorted_layers(layers, manifest, str(directory / LAYERS.file))
    quantizers = _sorted_quantizers(quantizers, str(directory / QUANTIZERS.file))
    if (manifest.loss.error != "gaussian") != (errors is not None):
        found = "it is missing" if errors is None else "it is there"
        raise ProfileError(f"{where} says loss.error is {manifest.loss.error}, yet of {ERRORS.file} {found}.")
    if errors is not None:
        errors = _sorted_errors(errors, layers, quantizers, str(directory / ERRORS.file))
    if (manifest.latency is None) != (latency is None):
        part, file = ("no latency part", "there") if latency is not None else ("a latency part", "missing")
        raise ProfileError(f"{where} has {part}, yet {LATENCY.file} is {file}; keep both or neither.")
    if latency is not None:
        latency = _sorted_latency(latency, layers, quantizers, manifest, str(directory / LATENCY.file))
    digest = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())
    return Profile(manifest, layers, quantizers, errors, latency, digest.hexdigest())


def _check_digests(manifest: ProfileManifest, digests: Mapping[str, str], where: str) -> None:
    if manifest.files is None:
        return
    tables = digests.keys() - {MANIFEST_FILE}
    for name in sorted(manifest.files.keys() | tables):
        if name not in {table.file for table in TABLES}:
            raise ProfileError(f"{where} lists '{name}', which is not a table of a profile; remove it.")
        if name not in tables:
            raise ProfileError(f"{where} lists {name}, which is missing; restore it or measure again.")
        if name not in manifest.files:
            raise ProfileError(f"{where} does not list {name}, which lies beside it; remove or list the table.")
        if manifest.files[name] != digests[name]:
            raise ProfileError(
                f"{name} was changed after {where} was written (SHA-256 {digests[name][:12]}…, expected "
                f"{manifest.files[name][:12]}…); restore it, or measure again."
            )


def _sorted_layers(layers: pd.DataFrame, manifest: ProfileManifest, where: str) -> pd.DataFrame:
    blocks = manifest.model.blocks
    outside = layers["block"] >= blocks
    if outside.any():
        row = layers[outside].iloc[0]
        raise ProfileError(
            f"{where}: {row['layer']} is in block {row['block']}, the manifest counts {blocks} blocks from 0."
        )
    plus = layers["role"].str.contains("+", regex=False)
    if plus.any():
        raise ProfileError(f"{where}: a role can't hold '+'; got '{layers['role'][plus].iloc[0]}'.")
    for role in ROLES if manifest.model.architecture in ARCHITECTURES else ():
        counts = np.bincount(layers["block"][layers["role"] == role], minlength=blocks)
        if (counts != 1).any():
            block = int((counts != 1).argmax())
            raise ProfileError(
                f"{where}: expected one {role} in block {block} of a {manifest.model.architecture}, "
                f"got {counts[block]}."
            )
    empty = np.bincount(layers["block"], minlength=blocks) == 0
    if empty.any():
        raise ProfileError(f"{where}: block {int(empty.argmax())} of {blocks} has no layers; add them.")
    groups = layers.groupby("fusion_group")
    for column, rule in (("block", "are in different blocks"), ("in_features", "differ in in_features")):
        distinct = groups[column].nunique()
        if (distinct > 1).any():
            raise ProfileError(f"{where}: layers of the fusion group {distinct.idxmax()} {rule}.")
    repeated = layers.duplicated(["fusion_group", "role"])
    if repeated.any():
        row = layers[repeated].iloc[0]
        raise ProfileError(f"{where}: the fusion group {row['fusion_group']} has two layers of role {row['role']}.")
    if groups.size().max() > MAX_GROUP_LAYERS:
        raise ProfileError(
            f"{where}: the fusion group {groups.size().idxmax()} has {groups.size().max()} layers; "
            f"at most {MAX_GROUP_LAYERS} can share one."
        )
    rank = _role_rank(layers["role"])
    order = layers.assign(rank=rank, group_rank=rank.groupby(layers["fusion_group"]).transform("min"))
    order = order.sort_values(["block", "group_rank", "fusion_group", "rank", "role", "layer"])
    return order.drop(columns=["rank", "group_rank"]).reset_index(drop=True)


def _sorted_quantizers(quantizers: pd.DataFrame, where: str) -> pd.DataFrame:
    specs = pd.Series(_specs(quantizers, where))
    repeated = specs.duplicated()
    if repeated.any():
        raise ProfileError(f"{where}: {specs.index[repeated][0]} has the fields of another quantizer; keep one.")
    families = list(Family)
    keys = [(families.index(s.family), s.bits, s.state_bits, s.code, s.table_bits) for s in specs]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return quantizers.iloc[order].reset_index(drop=True)


def _specs(quantizers: pd.DataFrame, where: str) -> dict[str, QuantizerSpec]:
    specs = {}
    missing = [None] * len(quantizers)
    states, codes = quantizers.get("state_bits", missing), quantizers.get("code", missing)
    columns = (quantizers[name] for name in ("quantizer", "family", "bits_per_weight", "table_bytes"))
    for label, family, bits, table_bytes, state, code in zip(*columns, states, codes, strict=True):
        if family not in list(Family):
            raise ProfileError(f"{where}: {label} is of an unknown family '{family}'; known: {', '.join(Family)}.")
        if code not in (None, *TrellisCode):
            raise ProfileError(f"{where}: {label} has an unknown code '{code}'; known: {', '.join(TrellisCode)}.")
        trellis = family in (Family.TCQ, Family.HALF_TCQ)
        default = DEFAULT_STATE_BITS if trellis else 0
        try:
            chosen = TrellisCode.HYB if code is None else TrellisCode(code)
            table_bits = table_bits_of(int(table_bytes)) if trellis else 0
            state_bits = default if state is None else int(state)
            specs[label] = QuantizerSpec(Family(family), float(bits), state_bits, table_bits, chosen)
        except QuantizerError as cause:
            raise ProfileError(f"{where}: {label}: {cause}") from cause
    return specs


def _sorted_errors(errors: pd.DataFrame, layers: pd.DataFrame, quantizers: pd.DataFrame, where: str) -> pd.DataFrame:
    rows = _known(errors["layer"], layers["layer"], "layer", LAYERS.file, where)
    columns = _known(errors["quantizer"], quantizers["quantizer"], "quantizer", QUANTIZERS.file, where)
    return errors.iloc[np.lexsort((columns, rows))].reset_index(drop=True)


def _sorted_latency(
    latency: pd.DataFrame,
    layers: pd.DataFrame,
    quantizers: pd.DataFrame,
    manifest: ProfileManifest,
    where: str,
) -> pd.DataFrame:
    """Latency rows, checked, with the roles of each pattern in canonical order."""
    assert manifest.latency is not None
    listed, found = set(manifest.latency.batch_sizes), set(latency["batch_size"].tolist())
    if listed != found:
        raise ProfileError(f"{where} covers batch sizes {sorted(found)}, the manifest lists {sorted(listed)}.")
    rank = dict(zip(layers["role"], _role_rank(layers["role"]), strict=True))
    spelling = {}
    for pattern in latency["pattern"].unique():
        roles = pattern.split("+")
        unknown = [role for role in roles if role not in rank]
        if unknown or len(set(roles)) != len(roles):
            problem = f"no layer has the role '{unknown[0]}'" if unknown else "a role is there twice"
            raise ProfileError(f"{where}: the pattern '{pattern}' can't run: {problem}.")
        spelling[pattern] = "+".join(sorted(roles, key=lambda role: (rank[role], role)))
    latency = latency.assign(pattern=latency["pattern"].map(spelling))
    repeated = latency.duplicated(list(LATENCY.key))
    if repeated.any():
        raise ProfileError(
            f"{where}: the pattern {latency['pattern'][repeated].iloc[0]} is measured twice, its roles in "
            "another order; keep one row."
        )
    _known(latency["quantizer"], quantizers["quantizer"], "quantizer", QUANTIZERS.file, where)
    quantizer = pd.Categorical(latency["quantizer"], categories=quantizers["quantizer"]).codes
    order = latency.assign(order=quantizer).sort_values(
        ["pattern", "out_features", "in_features", "order", "implementation", "batch_size"]
    )
    return order.drop(columns="order").reset_index(drop=True)


def _known(values: pd.Series[Any], table: pd.Series[Any], kind: str, file: str, where: str) -> npt.NDArray[np.intp]:
    """The row in `table` of every value; each has to be there."""
    position: npt.NDArray[np.intp] = pd.Index(table).get_indexer(pd.Index(values))
    if (position < 0).any():
        name = str(values[position < 0].iloc[0])
        raise ProfileError(f"{where}: {file} has no {kind} '{name}'; near matches: {near(name, table.tolist())}.")
    return position


def _role_rank(roles: pd.Series[Any]) -> pd.Series[Any]:
    """Position in `ROLES`; roles outside it come last."""
    return roles.map({role: i for i, role in enumerate(ROLES)}).fillna(len(ROLES)).astype(int)
