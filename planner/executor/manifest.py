"""What a checkpoint directory holds, and its own description of it.

A checkpoint is a Hugging Face directory: ``config.json`` with a ``quantization_config`` of method ``msq``, the packed
tensors of every planned layer beside the untouched rest in safetensors, the tokenizer, the plan, and ``msq.yaml`` with
a SHA-256 of every file. Tensors of a layer are named ``<layer>.packed`` (or ``packed_low`` and ``packed_high``),
``<layer>.scales`` and ``<layer>.codebook``, per original projection, so that a checkpoint can be fused in another way
when it is loaded.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...kernels.errors import QuantizerError
from ...kernels.specs import QuantizerSpec
from ...profiles.calibration import Calibration
from ...profiles.errors import ProfileError
from ...profiles.files import dump_yaml, read_yaml, sha256_file, validation_sentence, write_atomic
from ...profiles.schema import Digest, Name, TokenSource, check_schema_version
from ..plan import PlanQuantizer
from .errors import CheckpointError

MANIFEST_FILE = "msq.yaml"
PLAN_FILE = "plan.yaml"
METHOD = "msq"
SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class QuantizedLayer(_Part):
    """One planned layer of a checkpoint.

    Attributes:
        quantizer: a key of `QuantizationConfig.quantizers`.
        out_features, in_features: shape of the weight.
        rotation_seed: seed of its input rotation, null where the input is not rotated.
        pattern: layers that the plan runs as one kernel, this one among them.
        implementation: the kernel that the plan names.
    """

    quantizer: Name
    out_features: Annotated[int, Field(ge=1)]
    in_features: Annotated[int, Field(ge=1)]
    rotation_seed: Annotated[int, Field(ge=0, lt=2**63)] | None
    pattern: tuple[Name, ...] = Field(min_length=1)
    implementation: Name = "reference"


class QuantizationConfig(_Part):
    """``quantization_config`` in config.json."""

    quant_method: Literal["msq"] = "msq"
    schema_version: Literal[1] = 1
    quantizers: dict[Name, PlanQuantizer]
    layers: dict[Name, QuantizedLayer]

    def spec(self, layer: str) -> QuantizerSpec:
        """The quantizer of a layer."""
        return self.quantizers[self.layers[layer].quantizer].spec()

    def patterns(self) -> list[tuple[str, ...]]:
        """Every pattern once, in layer order."""
        return list(dict.fromkeys(layer.pattern for layer in self.layers.values()))


class CalibrationPart(_Part):
    """The tokens that a checkpoint was calibrated on.

    Attributes:
        tokens: how many.
        source: where they come from; null in checkpoints that don't tell.
        text: name of the text; null for other sources.
        digest: SHA-256 of the tokens.
    """

    tokens: Annotated[int, Field(ge=1)]
    source: TokenSource | None = None
    text: Name | None
    digest: Digest

    @classmethod
    def of(cls, calibration: Calibration | None) -> CalibrationPart | None:
        """The description of some tokens; None of none."""
        if calibration is None:
            return None
        return cls(
            tokens=calibration.windows.numel(),
            source=calibration.source,
            text=calibration.text,
            digest=calibration.digest,
        )


class TuneMethod(StrEnum):
    """What is fitted after encoding; see `tuning`."""

    LAYERS = "layers"
    BLOCKS = "blocks"
    MODEL = "model"


class TuningPart(_Part):
    """What was tuned after encoding.

    Attributes:
        method: how.
        tokens: that blocks and model were tuned on; null for `LAYERS`, which takes the Hessians of the quantization.
        losses: of each tuned block, before and after: squared error of its output, relative to its power.
        kl: of the whole model to the original on these tokens, nats a token, before and after it was tuned as a whole.
    """

    method: TuneMethod
    tokens: CalibrationPart | None = None
    losses: tuple[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], ...] = ()
    kl: tuple[float, float] | None = None


class CheckpointManifest(_Part):
    """``msq.yaml``.

    Attributes:
        memory_bytes: packed bytes of the planned layers, as promised and as stored.
        hessian: what the weights were quantized under; null for data-free quantization.
        tuning: what was tuned after encoding; null for nothing.
        errors: measured normalised error of each planned layer as encoded, the proxy error where there is `hessian`.
        files: SHA-256 of every other file of the checkpoint.
    """

    schema_version: Literal[1] = 1
    msq_version: Name
    model: Name
    memory_bytes: Annotated[int, Field(ge=1)]
    hessian: CalibrationPart | None = None
    tuning: TuningPart | None = None
    errors: dict[Name, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    files: dict[Name, Digest] = Field(min_length=1)


def parse_quantization_config(value: object, where: str) -> QuantizationConfig:
    """``quantization_config`` of a config, checked.

    Raises:
        CheckpointError: not by msq, a newer schema, an unknown field, or a layer that refers to nothing.
    """
    if not isinstance(value, dict) or value.get("quant_method") != METHOD:
        method = value.get("quant_method") if isinstance(value, dict) else value
        raise CheckpointError(f"{where}: expected a checkpoint that `msq apply` wrote; its quant_method is {method!r}.")
    check_schema_version(value, where, SCHEMA_VERSION, CheckpointError)
    try:
        config = QuantizationConfig.model_validate(value)
    except (ValidationError, QuantizerError) as cause:
        sentence = validation_sentence(cause, where) if isinstance(cause, ValidationError) else f"{where}: {cause}"
        raise CheckpointError(sentence) from cause
    for name, layer in config.layers.items():
        if layer.quantizer not in config.quantizers:
            raise CheckpointError(
                f"{where}: {name} has the unknown quantizer '{layer.quantizer}'; apply the plan again."
            )
        for member in layer.pattern:
            if member not in config.layers or config.layers[member].pattern != layer.pattern:
                raise CheckpointError(
                    f"{where}: the pattern of {name} and that of {member} disagree; apply the plan again."
                )
    return config


def write_manifest(directory: Path, manifest_fields: dict[str, Any]) -> CheckpointManifest:
    """Digest every file of a finished checkpoint and write ``msq.yaml``, last."""
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST_FILE)
    with ThreadPoolExecutor() as threads:
        files = dict(zip((path.name for path in paths), threads.map(sha256_file, paths), strict=True))
    manifest = CheckpointManifest(**manifest_fields, files=files)
    write_atomic(directory / MANIFEST_FILE, dump_yaml(manifest), CheckpointError)
    return manifest


def read_manifest(directory: Path) -> CheckpointManifest:
    """Read ``msq.yaml`` and check the digest of every file it lists.

    Raises:
        CheckpointError: no checkpoint there, or a file is missing, changed or cut short.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"expected a checkpoint directory at {directory}; there is none: make one with `msq apply`."
        )
    where = str(directory / MANIFEST_FILE)
    value = read_yaml(directory / MANIFEST_FILE, "checkpoint manifest", CheckpointError)
    check_schema_version(value, where, SCHEMA_VERSION, CheckpointError)
    try:
        manifest = CheckpointManifest.model_validate(value)
    except ValidationError as cause:
        raise CheckpointError(validation_sentence(cause, where)) from cause
    loose = {path.name for path in directory.glob("*.safetensors")} | {"config.json"}
    if extra := sorted(loose - manifest.files.keys()):
        raise CheckpointError(
            f"{directory / extra[0]} is not listed in {MANIFEST_FILE}; remove it or apply the plan again."
        )
    for name, digest in manifest.files.items():
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}, which its {MANIFEST_FILE} lists; apply the plan again.")
        try:
            found = sha256_file(directory / name)
        except ProfileError as cause:
            raise CheckpointError(str(cause)) from cause
        if found != digest:
            raise CheckpointError(
                f"{directory / name} has digest {found[:12]}…, {MANIFEST_FILE} says {digest[:12]}…; "
                "the file was changed or cut short: apply the plan again."
            )
    return manifest


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory says that it is an msq checkpoint."""
    return (directory / MANIFEST_FILE).is_file()
