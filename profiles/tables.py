"""A profile in memory: loading, checking, saving.

A profile is a directory (see `schema` for the files). `load_profile` reads each file once, checks digests,
columns, values and references between tables, and sorts rows into one canonical order, so that two
profiles which differ in row order give the same plan. `save_profile` writes tables first and the manifest,
with their digests, last: a crash in between leaves a profile that says it is inconsistent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..kernels.specs import QuantizerSpec
from .errors import ProfileError
from .files import dump_yaml, parse_yaml, read_bytes, write_atomic
from .rules import (
    check_digests,
    check_loss,
    near,
    quantizer_specs,
    sorted_errors,
    sorted_latency,
    sorted_layers,
    sorted_quantizers,
)
from .schema import (
    ERRORS,
    LATENCY,
    LAYERS,
    MANIFEST_FILE,
    QUANTIZERS,
    TABLES,
    LossPart,
    ProfileManifest,
    Table,
    parse_manifest,
    parse_table,
)
from .shipped import profile_names, resolve_profile

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
    def loss(self) -> LossPart:
        """How the losses were measured.

        Raises:
            ProfileError: this is a latency profile, which has none.
        """
        if self.manifest.loss is None:
            raise self._no_losses()
        return self.manifest.loss

    @cached_property
    def sensitivities(self) -> FloatArray:
        """(layers,) loss per unit of normalised error; raises like `loss`."""
        if "sensitivity" not in self.layers:
            raise self._no_losses()
        return self.layers["sensitivity"].to_numpy(np.float64)

    def _no_losses(self) -> ProfileError:
        return ProfileError(
            f"the profile of {self.manifest.model.name} on {self.manifest.device.name} holds latencies and no losses, "
            "which a plan needs: join it with a loss profile of the model by `msq combine`."
        )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with measured latency, ascending; empty without latency."""
        return tuple(sorted(self.manifest.latency.batch_sizes)) if self.manifest.latency else ()

    @cached_property
    def step_latency(self) -> pd.DataFrame | None:
        """`latency` as kernels run within a decoding step: with what the manifest says each product takes beyond it."""
        part = self.manifest.latency
        if self.latency is None or part is None or not part.calibrated:
            return self.latency
        beyond = self.latency["batch_size"].map(part.step_product_us)
        return self.latency.assign(latency_us=self.latency["latency_us"] + beyond)

    @cached_property
    def error_matrix(self) -> FloatArray:
        """(layers, quantizers) normalised error: measured where errors.csv has the pair, else on N(0,1)."""
        gaussian = self.quantizers["gaussian_error"].to_numpy(np.float64)
        everywhere = np.tile(gaussian, (len(self.layers), 1))
        if self.loss.error == "gaussian":  # then errors.csv only tells sizes
            return everywhere
        return self._with_measured(everywhere, "error")

    @cached_property
    def size_matrix(self) -> FloatArray:
        """(layers, quantizers) whole bytes: measured, else out*in*bits_per_weight/8 + table_bytes."""
        bits = self.quantizers["bits_per_weight"].to_numpy(np.float64)
        tables = self.quantizers["table_bytes"].to_numpy(np.float64)
        codes = np.ceil(self.layer_weights[:, None].astype(np.float64) * bits / 8)
        return self._with_measured(codes + tables, "size_bytes")

    @cached_property
    def _specs(self) -> dict[str, QuantizerSpec]:
        return quantizer_specs(self.quantizers, QUANTIZERS.file)

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


def load_profile(path: str | Path) -> Profile:
    """Reads and checks the profile directory `path`, or the profile of that name that ships with msq.

    Raises:
        ProfileError: a file is missing, corrupt, altered since it was written, or tables disagree.
    """
    directory = resolve_profile(path)
    if not directory.is_dir():
        found = "it is a file" if directory.exists() else "there is none"
        known = f" (shipped: {', '.join(profile_names())})" if profile_names() else ""
        raise ProfileError(f"expected a profile directory at {directory}; {found}; make one with `msq profile`{known}.")
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
    check_digests(manifest, digests, where)

    def table(kind: Table) -> pd.DataFrame | None:
        content = contents.get(kind.file)
        return None if content is None else parse_table(kind, content, str(directory / kind.file))

    layers, quantizers, errors, latency = (table(kind) for kind in TABLES)
    assert layers is not None and quantizers is not None
    layers = sorted_layers(layers, manifest, str(directory / LAYERS.file))
    quantizers = sorted_quantizers(quantizers, str(directory / QUANTIZERS.file))
    check_loss(manifest, layers, errors, where)
    if errors is not None:
        errors = sorted_errors(errors, layers, quantizers, str(directory / ERRORS.file))
    if (manifest.latency is None) != (latency is None):
        part, file = ("no latency part", "there") if latency is not None else ("a latency part", "missing")
        raise ProfileError(f"{where} has {part}, yet {LATENCY.file} is {file}; keep both or neither.")
    if latency is not None:
        latency = sorted_latency(latency, layers, quantizers, manifest, str(directory / LATENCY.file))
    digest = hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())
    return Profile(manifest, layers, quantizers, errors, latency, digest.hexdigest())
