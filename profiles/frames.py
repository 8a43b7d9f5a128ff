"""From what was measured to the tables of a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from ..kernels.specs import QuantizerSpec
from .inventory import LayerInfo, ModelInventory
from .latency import KernelLatency
from .quantizer_errors import measured_gaussian_error
from .schema import ModelPart
from .sensitivity import Sensitivity


def model_part(info: ModelInventory, digest: str | None) -> ModelPart:
    """What the manifest says of a model; `digest` is None where its weights were not read."""
    return ModelPart(
        name=info.name,
        architecture=info.architecture,
        blocks=info.blocks,
        model_type=info.model_type,
        hidden_size=info.hidden_size,
        total_parameters=info.total_parameters,
        unplanned_bytes=info.unplanned_bytes,
        digest=digest,
    )


def layer_table(layers: Sequence[LayerInfo], sensitivities: Mapping[str, Sensitivity] | None) -> pd.DataFrame:
    """layers.csv; without the columns of the loss where `sensitivities` is None."""
    names = ("block", "role", "out_features", "in_features", "fusion_group")
    rows = []
    for layer in layers:
        row: dict[str, object] = {"layer": layer.name} | {name: getattr(layer, name) for name in names}
        if sensitivities is not None:
            found = sensitivities[layer.name]
            row |= {"sensitivity": found.value, "standard_error": found.standard_error}
        rows.append(row)
    return pd.DataFrame(rows)


def quantizer_table(specs: Sequence[QuantizerSpec], seed: int) -> pd.DataFrame:
    """quantizers.csv; `seed` is for errors on N(0,1) that were not measured beforehand."""
    rows = [
        {
            "quantizer": spec.label,
            "family": str(spec.family),
            "bits_per_weight": spec.bits,
            "table_bytes": spec.table_bytes,
            "gaussian_error": measured_gaussian_error(spec, seed),
            "state_bits": spec.state_bits,
            "code": str(spec.code),
        }
        for spec in specs
    ]
    return pd.DataFrame(rows)


def latency_table(latencies: Sequence[KernelLatency]) -> pd.DataFrame | None:
    """latency.csv, `throttled` only where a row is; None without rows."""
    rows = [
        asdict(row.shape)
        | {
            "quantizer": row.spec.label,
            "implementation": row.implementation,
            "batch_size": row.batch_size,
            "latency_us": round(row.latency_us, 3),
            "spread": round(row.spread_us, 3),
            "throttled": int(row.throttled),
        }
        for row in latencies
    ]
    if not rows:
        return None
    table = pd.DataFrame(rows)
    return table if table["throttled"].any() else table.drop(columns="throttled")
