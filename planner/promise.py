"""What a profile's tables say of an assignment: loss, bytes, and microseconds of a decoding step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..profiles.tables import Profile
from .errors import PlanError
from .plan import PlannedLayer, Promise


def promise(profile: Profile, layers: Sequence[PlannedLayer]) -> Promise:
    """What the profile's tables say about an assignment of all its layers.

    Latency at a batch size is null when any kernel was not measured there.

    Raises:
        PlanError: the layers are not those of the profile.
    """
    position = _positions(profile, layers)
    column = {label: i for i, label in enumerate(profile.labels)}
    cells = [(position[entry.layer], column[entry.quantizer]) for entry in layers]
    sensitivity = profile.sensitivities
    memory = math.fsum(profile.size_matrix[cell] for cell in cells)
    return Promise(
        loss=math.fsum(float(sensitivity[cell[0]]) * float(profile.error_matrix[cell]) for cell in cells),
        memory_bytes=int(memory),
        bits_per_weight=8 * memory / int(profile.layer_weights.sum()),
        latency_us=step_latencies(profile, layers),
    )


def _positions(profile: Profile, layers: Sequence[PlannedLayer]) -> dict[str, int]:
    """The profile's rows by layer, of an assignment of all of them."""
    position = {name: row for row, name in enumerate(profile.layer_names)}
    if {entry.layer for entry in layers} != position.keys() or len(layers) != len(position):
        raise PlanError(f"expected an assignment of the profile's {len(position)} layers; got {len(layers)}.")
    return position


def step_latencies(profile: Profile, layers: Sequence[PlannedLayer]) -> dict[int, float | None]:
    """µs of a decoding step by batch size, null where a kernel was not measured; needs no losses.

    Raises:
        PlanError: the layers are not those of the profile.
    """
    position = _positions(profile, layers)
    if profile.step_latency is None or profile.manifest.latency is None:
        return {}
    keys = ["pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size"]
    measured = profile.step_latency.set_index(keys)["latency_us"].to_dict()
    roles = profile.layers["role"].tolist()
    rows, width = profile.layers["out_features"].tolist(), profile.layers["in_features"].tolist()
    kernels = []
    for entry in layers:
        if entry.layer != entry.pattern[0]:
            continue
        members = [position[name] for name in entry.pattern]
        shape = (sum(rows[i] for i in members), width[members[0]])
        kernels.append(("+".join(roles[i] for i in members), *shape, entry.quantizer, entry.implementation))
    totals: dict[int, float | None] = {}
    for batch in profile.batch_sizes:
        times = [measured.get((*kernel, batch)) for kernel in kernels]
        known = [float(time) for time in times if time is not None]
        overhead = profile.manifest.latency.step_overhead_us[batch]
        totals[batch] = math.fsum([overhead, *known]) if len(known) == len(times) else None
    return totals
