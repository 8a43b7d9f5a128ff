"""Overheads put right by measured runs: what a decoding step took, less what the tables say of its kernels.

`msq benchmark --json` measures the step of a plan as it runs. The difference to the sum of its kernels is the overhead
of a step on this machine, gaps between launches and overlaps included; over several runs it is the mean, and how far
the runs then are from their promises tells how well one number does for all plans.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..profiles.files import read_bytes, validation_sentence
from ..profiles.tables import Profile, save_profile
from .errors import PlanError
from .plan import BatchSize, Plan
from .solve import promise


class Step(BaseModel):
    """One measured batch size; what else a benchmark says of it is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    batch_size: BatchSize
    step_us: float = Field(gt=0)


class Run(BaseModel):
    """What is read of the JSON object that `msq benchmark --json` prints.

    Attributes:
        device: name of the GPU.
        context: tokens in the cache.
        plan: that ran.
        steps: a measurement for each batch size.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    device: str
    context: int = Field(ge=1)
    plan: Plan
    steps: tuple[Step, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Calibrated:
    """A measured step beside its promises.

    Attributes:
        run: number of the run, from 0.
        batch_size: of the step.
        measured_us: what it took.
        promised_us: by the profile as it was.
        calibrated_us: by the calibrated profile.
    """

    run: int
    batch_size: int
    measured_us: float
    promised_us: float
    calibrated_us: float

    @property
    def error(self) -> float:
        """Of the calibrated promise, relative to what was measured."""
        return self.calibrated_us / self.measured_us - 1


def load_run(path: Path) -> Run:
    """A benchmark's JSON file.

    Raises:
        PlanError: no such file, not JSON, or a field that is needed is missing or wrong.
    """
    try:
        value: Any = json.loads(read_bytes(path, "benchmark", PlanError))
    except ValueError as cause:
        if isinstance(cause, PlanError):
            raise
        raise PlanError(f"{path} is not JSON ({cause}); give what `msq benchmark --json` printed.") from cause
    try:
        return Run.model_validate(value)
    except ValidationError as cause:
        raise PlanError(validation_sentence(cause, str(path))) from cause


def calibrate(profile: Profile, directory: Path, runs: Sequence[Run]) -> tuple[Profile, list[Calibrated]]:
    """Replace the overheads of a profile by those of measured runs; batch sizes that no run measured keep theirs.

    Args:
        profile: what is in `directory`, with latencies.
        directory: of the profile; only its manifest changes.
        runs: of plans for this model, on the profile's device.

    Returns:
        The calibrated profile, and every measured step.

    Raises:
        PlanError: a run of another device, context or model, of kernels that were not measured, or in less time than
            they take by themselves.
    """
    part = profile.manifest.latency
    if part is None or profile.latency is None:
        raise PlanError("the profile has no latencies to calibrate; measure them with `msq profile` on the target GPU.")
    found = [_kernels(profile, number, run, step) for number, run in enumerate(runs) for step in run.steps]
    overhead = dict(part.overhead_us)
    for batch in sorted({step.batch_size for _, step, _ in found}):
        gaps = [step.step_us - kernels for _, step, kernels in found if step.batch_size == batch]
        overhead[batch] = math.fsum(gaps) / len(gaps)
        if overhead[batch] < 0:
            raise PlanError(
                f"at batch size {batch} a step took {-overhead[batch]:.1f} us less than its kernels do by themselves; "
                "profile and benchmark are of different kernels: measure the latencies again."
            )
    steps = [
        Calibrated(number, step.batch_size, step.step_us, kernels + part.overhead_us[step.batch_size],
                   kernels + overhead[step.batch_size])
        for number, step, kernels in found
    ]  # fmt: skip
    contexts = {run.context for run in runs}
    if len(contexts) > 1:
        raise PlanError(f"the runs are of different contexts ({sorted(contexts)}); calibrate with runs of one.")
    changed = part.model_copy(
        update={
            "overhead_us": overhead,
            "overhead_method": f"calibrated by {len(runs)} measured run{'s' if len(runs) > 1 else ''}",
            "context": contexts.pop(),
        }
    )
    saved = save_profile(
        directory,
        profile.manifest.model_copy(update={"latency": changed}),
        profile.layers,
        profile.quantizers,
        errors=profile.errors,
        latency=profile.latency,
    )
    return saved, steps


def _kernels(profile: Profile, number: int, run: Run, step: Step) -> tuple[int, Step, float]:
    """The run's number, the step, and µs of its kernels by the tables."""
    device = profile.manifest.device.name
    if run.device != device:
        raise PlanError(f"the run was measured on {run.device}, the profile on {device}; they can't be mixed.")
    part = profile.manifest.latency
    assert part is not None
    if step.batch_size not in part.overhead_us:
        measured = ", ".join(map(str, profile.batch_sizes))
        raise PlanError(f"a run is of batch size {step.batch_size}; the profile has latencies for {measured}.")
    total = promise(profile, run.plan.layers).latency_us[step.batch_size]
    if total is None:
        raise PlanError("a run's plan has kernels that the profile has no latency of; plan with this profile.")
    return number, step, total - part.overhead_us[step.batch_size]
