"""Rules between the tables of a profile, and the canonical order of their rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..kernels.errors import QuantizerError
from ..kernels.specs import DEFAULT_STATE_BITS, Family, QuantizerSpec, TrellisCode, table_bits_of
from .errors import ProfileError
from .schema import (
    ARCHITECTURES,
    EMBEDDING_ROLES,
    ERRORS,
    HEAD,
    LATENCY,
    LAYERS,
    MANIFEST_FILE,
    QUANTIZERS,
    ROLES,
    TABLES,
    ProfileManifest,
)

MAX_GROUP_LAYERS = 62
"""Layers of a fusion group are bits of a signed 64-bit mask."""


def near(name: str, known: tuple[str, ...] | list[str]) -> str:
    """Up to three of `known` that resemble `name`, else the first few, for a message."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5])


def check_loss(manifest: ProfileManifest, layers: pd.DataFrame, errors: pd.DataFrame | None, where: str) -> None:
    """Losses are there altogether or not at all."""
    if manifest.loss is None:
        if "sensitivity" in layers or errors is not None:
            found = ERRORS.file if errors is not None else f"a column sensitivity in {LAYERS.file}"
            raise ProfileError(f"{where} has no loss part, yet there is {found}; keep both or neither.")
        if manifest.latency is None:
            raise ProfileError(f"{where} has neither a loss nor a latency part; expected one at least.")
        return
    if "sensitivity" not in layers:
        raise ProfileError(f"{where} has a loss part, yet {LAYERS.file} lacks the column sensitivity; add it.")
    if (manifest.loss.error != "gaussian") and errors is None:
        raise ProfileError(f"{where} says loss.error is {manifest.loss.error}, yet {ERRORS.file} is missing.")


def check_digests(manifest: ProfileManifest, digests: Mapping[str, str], where: str) -> None:
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


def sorted_layers(layers: pd.DataFrame, manifest: ProfileManifest, where: str) -> pd.DataFrame:
    blocks = manifest.model.blocks
    is_head = layers["role"] == HEAD
    outside = (layers["block"] >= blocks) != is_head
    outside |= is_head & (layers["block"] > blocks)
    if outside.any():
        row = layers[outside].iloc[0]
        expected = f"the head's is {blocks}" if row["role"] == HEAD else f"the manifest counts {blocks} blocks from 0"
        raise ProfileError(f"{where}: {row['layer']} is in block {row['block']}, {expected}.")
    embeddings = layers[layers["role"].isin(EMBEDDING_ROLES)]
    if len(embeddings) > 1 or (embeddings["block"] > 0).any():
        row = embeddings.iloc[-1]
        raise ProfileError(
            f"{where}: {row['layer']} is an embedding in block {row['block']}; expected one at most, in block 0."
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
    empty = np.bincount(layers["block"], minlength=blocks)[:blocks] == 0
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


def sorted_quantizers(quantizers: pd.DataFrame, where: str) -> pd.DataFrame:
    specs = pd.Series(quantizer_specs(quantizers, where))
    repeated = specs.duplicated()
    if repeated.any():
        raise ProfileError(f"{where}: {specs.index[repeated][0]} has the fields of another quantizer; keep one.")
    families = list(Family)
    keys = [(families.index(s.family), s.bits, s.state_bits, s.code, s.table_bits) for s in specs]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return quantizers.iloc[order].reset_index(drop=True)


def quantizer_specs(quantizers: pd.DataFrame, where: str) -> dict[str, QuantizerSpec]:
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


def sorted_errors(errors: pd.DataFrame, layers: pd.DataFrame, quantizers: pd.DataFrame, where: str) -> pd.DataFrame:
    rows = _known(errors["layer"], layers["layer"], "layer", LAYERS.file, where)
    columns = _known(errors["quantizer"], quantizers["quantizer"], "quantizer", QUANTIZERS.file, where)
    return errors.iloc[np.lexsort((columns, rows))].reset_index(drop=True)


def sorted_latency(
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
    """Position in `ROLES`; embeddings come before, other roles outside it last."""
    rank = {role: i for i, role in enumerate(ROLES)} | dict.fromkeys(EMBEDDING_ROLES, -1)
    return roles.map(rank).fillna(len(ROLES)).astype(int)
