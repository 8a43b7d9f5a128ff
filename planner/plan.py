"""plan.yaml: which quantizer and kernel every layer gets, and what that promises.

A plan stands on its own: quantizers are stored as fields (the label is only the key), a pattern as the names
of the layers that run as one kernel. Numbers that aren't known (a bound nobody proved, a latency nobody
measured) are null, never infinite, so that the same content is valid JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..kernels.errors import QuantizerError
from ..kernels.specs import DEFAULT_TABLE, Family, QuantizerSpec, TrellisCode, names_another
from ..profiles.files import dump_yaml, read_yaml, validation_sentence, write_atomic
from ..profiles.schema import Digest, ErrorKind, Name, check_schema_version
from .errors import PlanError

SCHEMA_VERSION = 1

Amount = Annotated[float, Field(ge=0)]
BatchSize = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PlanModel(_Part):
    """The model that the plan is for.

    Attributes:
        digest: of the measured weights, null where the profile has none.
        unplanned_bytes: of what the plan leaves as it is (norms, biases, an unplanned embedding or head), null where
            the profile doesn't tell; with the promised bytes, the whole model.
    """

    name: Name
    architecture: Name
    blocks: int = Field(ge=1)
    digest: Digest | None = None
    unplanned_bytes: int | None = Field(default=None, ge=0)


class PlanProfile(_Part):
    """The profile that the promises come from.

    Attributes:
        digest: of the profile's files.
        device: that it was measured on.
        seed: of the rotations that its errors were measured with.
        error: what its errors are; a plan from "proxy" errors promises quantization under a Hessian.
    """

    digest: Digest
    device: Name
    seed: int = 0
    error: ErrorKind = "measured"


class PlanBudget(_Part):
    """A budget as written and as resolved: `cap` in bytes, or in µs at `batch_size`."""

    text: Name
    resource: Literal["memory", "latency"]
    cap: float = Field(gt=0)
    batch_size: BatchSize | None = None


class PlanQuantizer(_Part):
    """The fields of a `QuantizerSpec`."""

    family: Family
    bits: float
    state_bits: int = 0
    table_bits: int = DEFAULT_TABLE
    code: TrellisCode = TrellisCode.HYB

    @model_validator(mode="after")
    def _exists(self) -> PlanQuantizer:
        try:
            self.spec()
        except QuantizerError as cause:
            raise ValueError(str(cause)) from cause
        return self

    def spec(self) -> QuantizerSpec:
        return QuantizerSpec(self.family, self.bits, self.state_bits, self.table_bits, self.code)


class PlannedLayer(_Part):
    """One layer's assignment.

    Attributes:
        layer: module path.
        quantizer: label, a key of `Plan.quantizers`.
        implementation: the kernel.
        pattern: layers that run as one kernel, this one among them, in the order their rows are stacked.
    """

    layer: Name
    quantizer: Name
    implementation: Name
    pattern: tuple[Name, ...] = Field(min_length=1)


class Promise(_Part):
    """What the tables say about the plan.

    Attributes:
        loss: predicted loss, sum of sensitivity times error.
        memory_bytes: bytes of the planned layers, codebooks and scales included.
        bits_per_weight: 8 * memory_bytes / planned weights.
        latency_us: by batch size, one decoding step with its overhead; null where a kernel was not measured.
    """

    loss: Amount
    memory_bytes: int = Field(ge=0)
    bits_per_weight: Amount
    latency_us: dict[BatchSize, Amount | None] = Field(default_factory=dict)


class SolverReport(_Part):
    """How the plan was found, and how good it is known to be.

    Attributes:
        lower_bound: no plan within the budgets has less loss; null if nothing was proven.
        gap: (objective - lower_bound) / objective; null without a bound.
        shadow_prices: loss saved per extra byte or µs of each budget, at the dual optimum; null if not known.
        columns: candidates considered.
    """

    name: Name
    status: Literal["optimal", "feasible"]
    objective: Amount
    lower_bound: float | None
    gap: Amount | None
    shadow_prices: dict[str, Amount] | None
    seconds: Amount
    columns: int = Field(ge=1)


class Robustness(_Part):
    """What a plan made for noisy sensitivities minimises: a quantile of the loss over sensitivities drawn anew.

    Attributes:
        quantile: such as 0.95.
        samples: number of draws, none of which the plan was chosen by.
        quantile_loss: of this plan.
        ordinary_quantile_loss: of the plan that minimises the loss as measured.
    """

    quantile: float = Field(gt=0, lt=1)
    samples: int = Field(ge=1)
    quantile_loss: Amount
    ordinary_quantile_loss: Amount


class Plan(_Part):
    """plan.yaml. Every layer is there once; layers of a pattern share quantizer and kernel."""

    schema_version: Literal[1] = 1
    msq_version: Name
    model: PlanModel
    profile: PlanProfile
    budgets: tuple[PlanBudget, ...] = Field(min_length=1)
    constraints: tuple[Name, ...] = ()
    robustness: Robustness | None = None
    promised: Promise
    solver: SolverReport
    quantizers: dict[Name, PlanQuantizer] = Field(min_length=1)
    layers: tuple[PlannedLayer, ...] = Field(min_length=1)

    @field_validator("layers")
    @classmethod
    def _consistent(cls, layers: tuple[PlannedLayer, ...]) -> tuple[PlannedLayer, ...]:
        by_name = {entry.layer: entry for entry in layers}
        if len(by_name) != len(layers):
            seen: set[str] = set()
            twice = next(e.layer for e in layers if e.layer in seen or seen.add(e.layer))  # type: ignore[func-returns-value]
            raise ValueError(f"the layer {twice} is planned twice")
        for entry in layers:
            if entry.layer not in entry.pattern or len(set(entry.pattern)) != len(entry.pattern):
                raise ValueError(f"the pattern of {entry.layer} should name it and every other member once")
            for name in entry.pattern:
                member = by_name.get(name)
                if member is None:
                    raise ValueError(f"the pattern of {entry.layer} holds {name}, which is not planned")
                if member.pattern != entry.pattern:
                    raise ValueError(f"{name} is in the pattern of {entry.layer} and in another one")
                if (member.quantizer, member.implementation) != (entry.quantizer, entry.implementation):
                    raise ValueError(
                        f"{name} and {entry.layer} run as one kernel, yet differ in quantizer or implementation"
                    )
        return layers

    @model_validator(mode="after")
    def _known_quantizers(self) -> Plan:
        for entry in self.layers:
            if entry.quantizer not in self.quantizers:
                raise ValueError(
                    f"{entry.layer} has the quantizer '{entry.quantizer}', which is not among the plan's "
                    f"quantizers ({', '.join(self.quantizers)})"
                )
        return self

    def spec(self, label: str) -> QuantizerSpec:
        """The quantizer that a label stands for.

        Raises:
            PlanError: the plan has no such quantizer.
        """
        if label not in self.quantizers:
            raise PlanError(f"the plan has no quantizer '{label}'; it has {', '.join(self.quantizers)}.")
        return self.quantizers[label].spec()


_FIELDS = tuple(
    name
    for part in (
        Plan,
        PlanModel,
        PlanProfile,
        PlanBudget,
        PlanQuantizer,
        PlannedLayer,
        Promise,
        Robustness,
        SolverReport,
    )
    for name in part.model_fields
)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as YAML, whole or not at all; floats read back exactly.

    Raises:
        PlanError: the file can't be written.
    """
    write_atomic(Path(path), dump_yaml(plan), PlanError)


def load_plan(path: str | Path) -> Plan:
    """Reads and checks a plan.

    Raises:
        PlanError: the file is missing, not YAML, of a newer schema, breaks a rule of `Plan`, or has a quantizer by the
            name of another one.
    """
    return parse_plan(read_yaml(Path(path), "plan", PlanError), str(path))


def parse_plan(value: dict[str, Any], where: str) -> Plan:
    """A plan from a mapping; `where` names its source in messages."""
    check_schema_version(value, where, SCHEMA_VERSION, PlanError)
    try:
        plan = Plan.model_validate(value)
    except ValidationError as cause:
        raise PlanError(validation_sentence(cause, where, _FIELDS)) from cause
    for label in plan.quantizers:
        spec = plan.spec(label)
        if names_another(label, spec):
            raise PlanError(
                f"{where}: the quantizer '{label}' has the fields of {spec.label}; restore them, or plan anew."
            )
    return plan
