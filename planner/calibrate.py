"""Promised latencies put right by measured runs: what a decoding step took, beside what the tables say of its kernels.

`msq benchmark --json` measures the step of a plan as it runs. A promise is ``overhead + sum of rows + products *
product_us``: the rows were measured back to back, in a step a product waits for what is before it. Runs tell both terms
by least squares of relative errors, and the profile's measured overhead, where it is the executor's own step without
products, counts as a run of none. Where all runs have one number of products, and there is no such overhead, the
terms can't be told apart: products then cost their rows. The terms stand beside the measured overhead and every fit
starts from that, so the same runs give the same terms however often.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..profiles.files import read_bytes, validation_sentence
from ..profiles.schema import WITHOUT_PRODUCTS, CalibratedStep, LatencyPart
from ..profiles.shipped import is_shipped, resolve_profile
from ..profiles.tables import Profile, save_profile
from .errors import PlanError
from .plan import BatchSize, Plan
from .promise import step_latencies


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
    """Put the latency part of a profile right, and write it.

    Args:
        profile: what is in `directory`, with latencies.
        directory: of the profile; only its manifest changes.
        runs: see `fit`.

    Returns:
        The calibrated profile, and every measured step.

    Raises:
        PlanError: `directory` ships with msq, or see `fit`.
    """
    if is_shipped(directory):
        raise PlanError(
            f"the profile {directory} ships with msq and is not written to; copy {resolve_profile(directory)} and "
            "calibrate the copy."
        )
    part, steps = fit(profile, runs)
    saved = save_profile(
        directory,
        profile.manifest.model_copy(update={"latency": part}),
        profile.layers,
        profile.quantizers,
        errors=profile.errors,
        latency=profile.latency,
    )
    return saved, steps


def fit(profile: Profile, runs: Sequence[Run]) -> tuple[LatencyPart, list[Calibrated]]:
    """Overheads and the cost of a product from measured runs, at the batch sizes that these measured; others stay.

    Args:
        profile: with latencies; losses are not needed.
        runs: of plans for this model, on the profile's device.

    Returns:
        The profile's latency part with the new terms, and every measured step.

    Raises:
        PlanError: a run of another device, context or model (weights may differ, times don't depend on them), of
            kernels that were not measured, or in less time than they take by themselves.
    """
    part = profile.manifest.latency
    if part is None or profile.latency is None:
        raise PlanError("the profile has no latencies to calibrate; measure them with `msq profile` on the target GPU.")
    contexts = {run.context for run in runs}
    if len(contexts) != 1:
        raise PlanError(f"the runs are of different contexts ({sorted(contexts)}); calibrate with runs of one.")
    for run in runs:
        _check_run(profile, part, run)
    manifest = profile.manifest.model_copy(update={"latency": part.model_copy(update={"calibrated": None})})
    bare = replace(profile, manifest=manifest)  # rows come from it, to the last bit whatever was calibrated before
    measured = [
        _measured(profile, bare, part, number, run, step) for number, run in enumerate(runs) for step in run.steps
    ]
    without_products = part.overhead_method == WITHOUT_PRODUCTS
    calibrated = dict(part.calibrated or {})
    for batch in sorted({one.batch_size for one in measured}):
        here = [one for one in measured if one.batch_size == batch]
        number = len({one.run for one in here})
        if without_products:
            here.append(_Measured(-1, batch, 0, 0.0, part.overhead_us[batch], part.overhead_us[batch]))
        overhead, product = _terms(here)
        if overhead < 0:
            raise PlanError(
                f"at batch size {batch} steps took {-overhead:.1f} us less than their kernels do by themselves; "
                "profile and benchmark are of different kernels: measure the latencies again."
            )
        calibrated[batch] = CalibratedStep(
            overhead_us=overhead, product_us=product, runs=number, context=next(iter(contexts))
        )
    steps = []
    for one in measured:
        terms = calibrated[one.batch_size]
        now = one.rows_us + terms.overhead_us + one.products * terms.product_us
        steps.append(Calibrated(one.run, one.batch_size, one.step_us, one.promised_us, now))
    return part.model_copy(update={"calibrated": dict(sorted(calibrated.items()))}), steps


@dataclass(frozen=True)
class _Measured:
    """A measured step: its products and the sum of their rows, beside what it took and what was promised."""

    run: int
    batch_size: int
    products: int
    rows_us: float
    step_us: float
    promised_us: float


def _terms(steps: Sequence[_Measured]) -> tuple[float, float]:
    """Overhead and cost of a product, of least squared relative error; no cost where it can't be told."""
    weight = np.array([1 / step.step_us for step in steps])
    products = np.array([step.products for step in steps], dtype=np.float64)
    beyond = np.array([step.step_us - step.rows_us for step in steps])
    if len(set(products.tolist())) > 1:
        terms = np.stack([weight, weight * products], axis=1)
        overhead, slope = np.linalg.lstsq(terms, weight * beyond)[0].tolist()
        if slope >= 0:
            return overhead, slope
    return float(np.average(beyond, weights=weight**2)), 0.0


def _check_run(profile: Profile, part: LatencyPart, run: Run) -> None:
    """Refuses a run of anything else than the profile's device, model and context."""
    device, model = profile.manifest.device.name, profile.manifest.model
    if run.device != device:
        raise PlanError(f"the run was measured on {run.device}, the profile on {device}; they can't be mixed.")
    ran = run.plan.model
    if (ran.name, ran.architecture, ran.blocks) != (model.name, model.architecture, model.blocks):
        raise PlanError(
            f"the run is of {ran.name} ({ran.architecture}, {ran.blocks} blocks), the profile of {model.name} "
            f"({model.architecture}, {model.blocks} blocks); calibrate with runs of the profile's model."
        )
    if part.context is not None and run.context != part.context:
        raise PlanError(
            f"the run has {run.context} tokens in the cache, the profile's step {part.context}; run `msq benchmark` "
            f"with --context {part.context}."
        )


def _measured(profile: Profile, bare: Profile, part: LatencyPart, number: int, run: Run, step: Step) -> _Measured:
    batch = step.batch_size
    if batch not in part.overhead_us:
        measured = ", ".join(map(str, profile.batch_sizes))
        raise PlanError(f"a run is of batch size {batch}; the profile has latencies for {measured}.")
    promised, total = (step_latencies(which, run.plan.layers)[batch] for which in (profile, bare))
    if promised is None or total is None:
        raise PlanError("a run's plan has kernels that the profile has no latency of; plan with this profile.")
    products = len({entry.pattern for entry in run.plan.layers})
    return _Measured(number, batch, products, total - part.overhead_us[batch], step.step_us, promised)
