"""What a profile's files hold: the manifest's fields and the columns of each table.

`profile.yaml` is a `ProfileManifest`. The tables are CSV with the columns declared below; units are in
the names, a column not declared is refused. Checks across tables are in `tables`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ProfileError
from .files import parse_csv, validation_sentence

SCHEMA_VERSION = 1
MANIFEST_FILE = "profile.yaml"

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a dense decoder block, in the order that tables and plans list them."""
HEAD = "lm_head"
"""Module path and role of the output layer. It is planned like the others; in tables its block is the number of blocks,
one after the last."""
EMBED = "model.embed_tokens"
"""Module path of the input embedding, a planned layer on request: ``(vocabulary, hidden)``, one row a token. In tables
its block is 0 and it comes before the others."""
EMBED_ROLE, TIED_ROLE = "embed_tokens", "tied_embedding"
"""Role of the embedding: alone, and where its weight is the head's too, in which case the two are one layer."""
EMBEDDING_ROLES, HEAD_ROLES = (EMBED_ROLE, TIED_ROLE), (HEAD, TIED_ROLE)
"""Roles of layers that look rows up, and of those that make logits."""
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Supported architectures; each block of them holds exactly one layer of every role; embedding and head stand around
them."""

STOCK_METHODS = {"cpu": "stock model", "cuda": "stock model in a CUDA graph"}
"""What a profile calls an overhead measured on the stock model, by kind of device; an executor's own is another."""

WITHOUT_PRODUCTS = "decoding step without products"
"""What one calls an overhead measured on its own step with all products left out."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1)]
Scalar = str | int | float | bool | None


class LossMethod(StrEnum):
    """How sensitivities were estimated: arXiv 2509.20214, section 3; see `sensitivity` and `fisher`."""

    DATA_FREE_KL = "data_free_kl"
    CALIBRATION_KL = "calibration_kl"
    CALIBRATION_LOSS = "calibration_loss"
    FISHER = "fisher"
    DIRECT = "direct"


class TokenSource(StrEnum):
    """Where calibration tokens come from; all but `TEXT` need no data."""

    RANDOM = "random"
    SELF = "self"  # drawn from the model
    TEXT = "text"


ErrorKind = Literal["gaussian", "measured", "proxy"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelPart(_Part):
    """Which model was measured. Bytes are as stored in its safetensors files."""

    name: Name
    architecture: Name
    blocks: int = Field(ge=1)
    model_type: Name | None = None
    hidden_size: int | None = Field(default=None, ge=1)
    total_parameters: int | None = Field(default=None, ge=1)
    unplanned_bytes: int | None = Field(default=None, ge=0)
    digest: Digest | None = None


class DevicePart(_Part):
    """Where latency was measured."""

    name: Name
    kind: Literal["cpu", "cuda"] | None = None
    details: dict[str, Scalar] = Field(default_factory=dict)


class LossPart(_Part):
    """How loss was measured.

    Attributes:
        method: how sensitivities were estimated.
        error: "gaussian" uses each quantizer's error on N(0,1) for every layer, and errors.csv, if there, only for
            sizes; of errors.csv, "measured" is the error of the weights, "proxy" that of the outputs when quantized
            under a Hessian.
        tokens: tokens that the estimate saw.
        noise: relative size of the perturbation, ‖δW‖/‖W‖, where the method perturbs.
        source: where the tokens come from; null in profiles that don't tell.
        text: the calibration text, where the method reads one.
        quantizer: that the layers were swapped for, where the method is direct.
    """

    method: LossMethod
    error: ErrorKind
    tokens: int = Field(ge=1)
    noise: float | None = Field(default=None, gt=0)
    seed: int | None = None
    sequences: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=1)
    source: TokenSource | None = None
    text: Name | None = None
    quantizer: Name | None = None


class CalibratedStep(_Part):
    """What a decoding step costs beside the rows of latency.csv, fitted to runs of plans (`planner.calibrate`).

    Attributes:
        overhead_us: microseconds per step beside the rows of its layers.
        product_us: microseconds that each product takes beyond its row, which was measured back to back with others.
        runs: how many runs were fitted.
        context: tokens in the cache of these runs.
    """

    overhead_us: float = Field(ge=0)
    product_us: float = Field(ge=0)
    runs: int = Field(ge=1)
    context: int = Field(ge=1)


class LatencyPart(_Part):
    """Batch sizes that latency.csv covers, and what a decoding step costs beside the planned layers.

    Attributes:
        batch_sizes: tokens decoded together.
        overhead_us: microseconds that a step takes beside the rows of its layers as measured, one for each batch size.
        overhead_method: how it was measured: `STOCK_METHODS`, or an executor's own.
        context: tokens in the cache of that step.
        head_us, embedding_us: microseconds of the head and of the embedding's lookup in the model's own dtype, where
            they are planned layers; added to the overhead of a profile without them.
        calibrated: what stands in for the measured overhead, for batch sizes at which plans have run.
    """

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    overhead_us: dict[int, Annotated[float, Field(ge=0)]]
    overhead_method: Name | None = None
    context: int | None = Field(default=None, ge=1)
    head_us: dict[int, Annotated[float, Field(ge=0)]] | None = None
    embedding_us: dict[int, Annotated[float, Field(ge=0)]] | None = None
    calibrated: dict[int, CalibratedStep] | None = None

    @model_validator(mode="after")
    def _same_batches(self) -> LatencyPart:
        if len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError("batch_sizes names a batch size twice")
        for name in ("overhead_us", "head_us", "embedding_us"):
            values = getattr(self, name)
            if values is not None and set(values) != set(self.batch_sizes):
                raise ValueError(
                    f"{name} should have one entry for each of the batch sizes {sorted(self.batch_sizes)}, "
                    f"it has {sorted(values)}"
                )
        unknown = set(self.calibrated or ()) - set(self.batch_sizes)
        if unknown:
            raise ValueError(
                f"calibrated should have batch sizes among {sorted(self.batch_sizes)}, it has {sorted(unknown)}"
            )
        return self

    @property
    def step_overhead_us(self) -> dict[int, float]:
        """µs per step beside the rows of its layers by batch size: calibrated where it is, else as measured."""
        return self.overhead_us | {batch: step.overhead_us for batch, step in (self.calibrated or {}).items()}

    @property
    def step_product_us(self) -> dict[int, float]:
        """µs of each product in a step beyond its row, by batch size; 0 where nothing is calibrated."""
        return dict.fromkeys(self.batch_sizes, 0.0) | {
            batch: step.product_us for batch, step in (self.calibrated or {}).items()
        }


class ProfileManifest(_Part):
    """profile.yaml. `files` maps each table to its SHA-256; a profile made by hand may leave it out.

    A latency profile (see `latency_job`) has no `loss`, and its layers no sensitivities.
    """

    schema_version: Literal[1] = 1
    model: ModelPart
    device: DevicePart
    loss: LossPart | None = None
    latency: LatencyPart | None = None
    software: dict[str, Scalar] = Field(default_factory=dict)
    source: str | None = None
    files: dict[str, Digest] | None = None


_MANIFEST_FIELDS = tuple(
    name
    for part in (ProfileManifest, ModelPart, DevicePart, LossPart, LatencyPart, CalibratedStep)
    for name in part.model_fields
)


def parse_manifest(value: dict[str, Any], where: str) -> ProfileManifest:
    """The manifest in a mapping read from YAML.

    Raises:
        ProfileError: a newer schema, an unknown or missing field, or a value of the wrong kind.
    """
    check_schema_version(value, where, SCHEMA_VERSION, ProfileError)
    try:
        return ProfileManifest.model_validate(value)
    except ValidationError as cause:
        raise ProfileError(validation_sentence(cause, where, _MANIFEST_FIELDS)) from cause


def check_schema_version(value: dict[str, Any], where: str, known: int, error: type[ValueError]) -> None:
    """Refuses a file of another schema before its unknown fields confuse the reader."""
    version = value.get("schema_version")
    if version is None:
        raise error(f"{where}: the field 'schema_version' is missing; this msq reads version {known}.")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise error(f"{where}: schema_version should be {known}; got {version!r}.")
    if version > known:
        raise error(f"{where} has schema_version {version}, this msq reads {known}; upgrade msq to read it.")


@dataclass(frozen=True)
class Column:
    """A column: text is never empty unless it may be `blank`, numbers are finite and at least `minimum`."""

    name: str
    kind: Literal["text", "integer", "real"]
    required: bool = True
    minimum: float = 0.0
    above_minimum: bool = False
    blank: bool = False


@dataclass(frozen=True)
class Table:
    """A table: its file, columns, and the columns that together name a row once."""

    file: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]


def _size(name: str) -> Column:
    return Column(name, "integer", minimum=1)


LAYERS = Table(
    "layers.csv",
    (
        Column("layer", "text"),
        Column("block", "integer"),
        Column("role", "text"),
        _size("out_features"),
        _size("in_features"),
        Column("fusion_group", "text"),
        Column("sensitivity", "real", required=False),
        Column("standard_error", "real", required=False),
    ),
    key=("layer",),
)
QUANTIZERS = Table(
    "quantizers.csv",
    (
        Column("quantizer", "text"),
        Column("family", "text"),
        Column("bits_per_weight", "real", above_minimum=True),
        Column("table_bytes", "integer"),
        Column("gaussian_error", "real"),
        Column("state_bits", "integer", required=False),
        Column("code", "text", required=False),
        Column("source_name", "text", required=False, blank=True),
    ),
    key=("quantizer",),
)
ERRORS = Table(
    "errors.csv",
    (
        Column("layer", "text"),
        Column("quantizer", "text"),
        Column("error", "real"),
        Column("size_bytes", "integer", required=False, minimum=1),
    ),
    key=("layer", "quantizer"),
)
LATENCY = Table(
    "latency.csv",
    (
        Column("pattern", "text"),
        _size("out_features"),
        _size("in_features"),
        Column("quantizer", "text"),
        Column("implementation", "text"),
        Column("batch_size", "integer", minimum=1),
        Column("latency_us", "real", above_minimum=True),
        Column("spread", "real", required=False),
        Column("throttled", "integer", required=False),
    ),
    key=("pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size"),
)
TABLES = (LAYERS, QUANTIZERS, ERRORS, LATENCY)


def parse_table(table: Table, content: bytes, where: str) -> pd.DataFrame:
    """A table's rows in the order of the file: text as str, integers as int64, reals as float64.

    Raises:
        ProfileError: an unknown or missing column, a cell of the wrong kind or range, or a row named twice.
    """
    cells = parse_csv(content, where)
    names = [column.name for column in table.columns]
    for name in cells:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected {', '.join(names)}."
            raise ProfileError(f"{where}: unknown column '{name}'; {hint}")
    missing = [column.name for column in table.columns if column.required and column.name not in cells]
    if missing:
        raise ProfileError(f"{where}: the column {', '.join(missing)} is missing; add it.")
    frame = pd.DataFrame({c.name: _values(c, cells[c.name], where) for c in table.columns if c.name in cells})
    repeated = frame.duplicated(list(table.key)).to_numpy()
    if repeated.any():
        row = frame.iloc[int(repeated.argmax())]
        key = ", ".join(str(row[name]) for name in table.key)
        raise ProfileError(f"{where}, row {int(repeated.argmax()) + 1}: {key} is given twice; keep one row.")
    return frame


def _values(column: Column, cells: list[str], where: str) -> pd.Series[Any] | np.ndarray[Any, Any]:
    """One column's values, checked; the row of the first bad cell is named."""
    if column.kind == "text":
        blank = np.array([not cell.strip() for cell in cells])
        if blank.any() and not column.blank:
            raise ProfileError(f"{where}, row {int(blank.argmax()) + 1}: {column.name} is blank; fill it in.")
        return pd.Series(cells, dtype="str")
    kind = np.int64 if column.kind == "integer" else np.float64
    expected = "a whole number" if column.kind == "integer" else "a finite number"
    expected += f" {'above' if column.above_minimum else 'of at least'} {column.minimum:g}"
    try:
        values = np.array(cells, dtype=object).astype(kind)
    except (ValueError, OverflowError):
        row = next(i for i, cell in enumerate(cells) if not _is_number(cell, kind))
    else:
        inside = values > column.minimum if column.above_minimum else values >= column.minimum
        bad = ~(np.isfinite(values) & inside)
        if not bad.any():
            return values
        row = int(bad.argmax())
    raise ProfileError(f"{where}, row {row + 1}: {column.name} should be {expected}; got '{cells[row]}'.")


def _is_number(cell: str, kind: type[np.number[Any]]) -> bool:
    try:
        np.array([cell], dtype=object).astype(kind)
    except (ValueError, OverflowError):
        return False
    return True
