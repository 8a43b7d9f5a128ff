"""One profile from two: losses measured on any machine, latencies measured on the GPU that is to run the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..kernels.specs import Family
from .errors import ProfileError
from .schema import EMBED_ROLE, EMBEDDING_ROLES, HEAD, HEAD_ROLES, TIED_ROLE, LatencyPart
from .tables import Profile, save_profile


def combine(loss: Profile, latency: Profile, out: Path, *, sensitivities: Mapping[str, float] | None = None) -> Profile:
    """Write the profile of a model with the losses of one profile and the latencies of another.

    Layers are matched by block and role. A head or embedding that only the latency profile plans stays in the model's
    own dtype; its time goes to the overhead. Quantizers are matched by their fields; those without a latency stay, for
    memory budgets. Where the losses rest on errors on N(0,1) alone, the palette is that of the latency profile without
    `int`, whose weights are not rotated: N(0,1) says nothing of them.

    Args:
        out: the new profile's directory.
        sensitivities: by layer, for layers that only the latency profile has.

    Raises:
        ProfileError: the profiles are of different shapes, hold nothing in common, or one lacks what it is for.
    """
    described = loss.loss
    part = latency.manifest.latency
    if part is None or latency.latency is None:
        raise ProfileError(
            f"the profile of {latency.manifest.model.name} on {latency.manifest.device.name} has no latencies to join; "
            "measure them with `msq profile --latency-only` on the target GPU."
        )
    layers = _layers(loss, latency, sensitivities or {})
    for role in _OUTSIDE:
        if role not in set(layers["role"]) and role in set(latency.layers["role"]):
            part = _with_plain(part, role)
    gaussian = described.error == "gaussian"
    base = latency if gaussian else loss
    kept = [label for label in base.labels if not (gaussian and base.spec(label).family is Family.INT)]
    quantizers = base.quantizers[base.quantizers["quantizer"].isin(kept)].reset_index(drop=True)
    labels = {there: label for there, label in _matching_labels(latency, base).items() if label in kept}
    rows = latency.latency[latency.latency["quantizer"].isin(list(labels))]
    rows = rows[[set(pattern.split("+")) <= set(layers["role"]) for pattern in rows["pattern"]]]
    if rows.empty:
        raise ProfileError("the two profiles have no quantizer in common; measure latencies of the same palette.")
    rows = rows.assign(quantizer=rows["quantizer"].map(labels))
    errors = _errors(loss, base, layers, kept, sizes_of_all=gaussian)
    there = latency.manifest.model
    known = ["model_type", "hidden_size", "total_parameters"]
    if set(layers["role"]) == set(latency.layers["role"]):  # else what stays as it is differs
        known.append("unplanned_bytes")
    model = loss.manifest.model
    missing = {name: getattr(there, name) for name in known if getattr(model, name) is None}
    model = model.model_copy(update=missing)
    manifest = loss.manifest.model_copy(
        update={
            "model": model,
            "device": latency.manifest.device,
            "latency": part,
            "software": loss.manifest.software | {f"latency_{k}": v for k, v in latency.manifest.software.items()},
            "source": _source(loss, latency, sensitivities or {}),
        }
    )
    return save_profile(out, manifest, layers, quantizers, errors=errors, latency=rows)


def _layers(loss: Profile, latency: Profile, sensitivities: Mapping[str, float]) -> pd.DataFrame:
    """The layers of the loss profile, and those that `sensitivities` adds."""
    keys = ["block", "role"]
    sizes = ["out_features", "in_features"]
    for name in sensitivities:
        if name not in set(latency.layers["layer"]) or name in set(loss.layers["layer"]):
            raise ProfileError(
                f"a sensitivity is given for {name}; expected a layer of the latency profile that the loss profile "
                "lacks."
            )
    both = loss.layers.merge(latency.layers, on=keys, how="outer", suffixes=("", "_there"), indicator=True)
    missing = both[both["_merge"] == "left_only"]
    if len(missing):
        row = missing.iloc[0]
        hint = "measured with --embedding" if row["role"] in EMBEDDING_ROLES else "of the same shapes"
        raise ProfileError(
            f"{row['layer']} of {loss.manifest.model.name} has no counterpart in the latency profile of "
            f"{latency.manifest.model.name}; take one {hint}."
        )
    shared = both[both["_merge"] == "both"]
    for size in sizes:
        differs = shared[size] != shared[f"{size}_there"]
        if differs.any():
            row = shared[differs].iloc[0]
            raise ProfileError(
                f"{row['layer']} has {row[size]:.0f} {size} in the loss profile and {row[f'{size}_there']:.0f} in the "
                "latency profile; take one of the same shapes."
            )
    extra = latency.layers[latency.layers["layer"].isin(both["layer_there"][both["_merge"] == "right_only"])]
    odd = extra[~extra["layer"].isin(list(sensitivities)) & ~extra["role"].isin(_OUTSIDE)]
    if len(odd):
        raise ProfileError(
            f"the latency profile has {odd['layer'].iloc[0]}, the loss profile doesn't; take one of the same shapes."
        )
    added = extra[extra["layer"].isin(list(sensitivities))].drop(columns=["sensitivity"], errors="ignore")
    added = added.assign(sensitivity=added["layer"].map(dict(sensitivities)))
    if "standard_error" in loss.layers:
        added = added.assign(standard_error=0.0)
    return pd.concat([loss.layers, added[list(loss.layers.columns)]], ignore_index=True)


_OUTSIDE = (EMBED_ROLE, TIED_ROLE, HEAD)
"""Roles of layers outside the blocks, which a plan may leave out."""


def _with_plain(part: LatencyPart, role: str) -> LatencyPart:
    """With the time of the unquantized layers of a role in the overhead."""
    names = [*(["head_us"] if role in HEAD_ROLES else []), *(["embedding_us"] if role in EMBEDDING_ROLES else [])]
    for name in names:
        plain = getattr(part, name)
        if plain is None:
            raise ProfileError(
                f"the latency profile plans {role}, the loss profile doesn't, and the time of an unquantized one was "
                "not measured; give a sensitivity for it, or measure latencies again."
            )
        overhead = {batch: us + plain[batch] for batch, us in part.overhead_us.items()}
        calibrated = None
        if part.calibrated is not None:
            calibrated = {
                batch: step.model_copy(update={"overhead_us": step.overhead_us + plain[batch]})
                for batch, step in part.calibrated.items()
            }
        part = part.model_copy(update={"overhead_us": overhead, name: None, "calibrated": calibrated})
    return part


def _matching_labels(latency: Profile, base: Profile) -> dict[str, str]:
    """From labels of the latency profile to those of the base that are the same quantizer."""
    own = {base.spec(label): label for label in base.labels}
    return {label: own[latency.spec(label)] for label in latency.labels if latency.spec(label) in own}


def _errors(
    loss: Profile, base: Profile, layers: pd.DataFrame, labels: Sequence[str], *, sizes_of_all: bool
) -> pd.DataFrame:
    """errors.csv of the joined profile: exact sizes of every pair whose error is that on N(0,1)."""
    gaussian = dict(zip(base.labels, base.quantizers["gaussian_error"].to_numpy(np.float64).tolist(), strict=True))
    own = layers if sizes_of_all else layers[~layers["layer"].isin(loss.layers["layer"])]
    rows = [
        (layer, label, gaussian[label], base.spec(label).size_bytes(int(out_features), int(in_features)))
        for layer, out_features, in_features in own[["layer", "out_features", "in_features"]].itertuples(index=False)
        for label in labels
    ]
    made = pd.DataFrame(rows, columns=["layer", "quantizer", "error", "size_bytes"])
    if sizes_of_all or loss.errors is None:
        return made
    return pd.concat([loss.errors, made], ignore_index=True) if rows else loss.errors


def _source(loss: Profile, latency: Profile, sensitivities: Mapping[str, float]) -> str:
    text = (
        f"losses of {loss.manifest.model.name} (profile {loss.digest[:12]}), latencies of "
        f"{latency.manifest.model.name} shapes on {latency.manifest.device.name} (profile {latency.digest[:12]})"
    )
    if sensitivities:
        text += "; assumed sensitivities: " + ", ".join(f"{name} {value:g}" for name, value in sensitivities.items())
    return text if loss.manifest.source is None else f"{text}; losses: {loss.manifest.source}"
