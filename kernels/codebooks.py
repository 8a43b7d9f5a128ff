"""The shipped codebooks: fp16 tables for Gaussian weights of unit variance, one per family and rate.

``data/codebooks.safetensors`` is written by ``experiments/train_codebooks.py``: Lloyd iterations on N(0,1) samples,
for the trellis codes on their own Viterbi assignments. `gaussian_errors.csv` beside it holds the normalised error of
every quantizer on N(0,1), measured by the same script.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .errors import QuantizerError
from .specs import BYTE_LEVEL_BITS, Family, QuantizerSpec, TrellisCode

_DATA = Path(__file__).parent / "data"


def codebook_key(spec: QuantizerSpec) -> str:
    """The name of a quantizer's table in the data file; trellis lengths share one, and so do the same two rates."""
    if not spec.has_trellis:
        return f"{spec.family}.{spec.bits:g}"
    code = "" if spec.code is TrellisCode.HYB else f".{spec.code}"
    return f"{spec.family}.{sum(spec.rates) / len(spec.rates):g}{code}.{spec.table_bits}"


@cache
def _tables() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(_DATA / "codebooks.safetensors")


def codebook(spec: QuantizerSpec) -> Tensor:
    """The fp16 table of a quantizer, ``spec.codebook_shape``; empty where it has none. The caller's own copy.

    Raises:
        QuantizerError: the data file lacks it or holds another shape, or none ships.
    """
    if not spec.table_bytes:
        return torch.empty(spec.codebook_shape, dtype=torch.float16)
    if spec.code is TrellisCode.LUT:
        raise QuantizerError(
            f"{spec.label} ships no table: train one (experiments/train_codebooks.py --lookup-tables) and pass it as "
            "codebook."
        )
    table = _tables().get(codebook_key(spec))
    if table is None or tuple(table.shape) != spec.codebook_shape:
        found = "none" if table is None else f"shape {tuple(table.shape)}"
        raise QuantizerError(
            f"{spec.label} needs a codebook of shape {spec.codebook_shape}, found {found} in {_DATA}; reinstall msq."
        )
    return table.clone()


def rounded(spec: QuantizerSpec, table: Tensor) -> Tensor:
    """A trained or fitted table as it is stored, fp16: of a quantizer with byte levels, at the nearest of these.

    That costs the error of `nuq` and `vq` on N(0,1) less than 0.1%.
    """
    if spec.has_byte_levels:
        steps = 1 << BYTE_LEVEL_BITS
        table = (table * steps).round().clamp(-127, 127) / steps
    return table.half()


def check_levels(spec: QuantizerSpec, table: Tensor) -> None:
    """Check that a table of a quantizer with byte levels is one that `rounded` gives; any other table passes.

    Raises:
        QuantizerError: it isn't.
    """
    if not spec.has_byte_levels or table.is_meta:
        return
    fits = tuple(table.shape) == spec.codebook_shape and table.dtype == torch.float16
    if not fits or not torch.equal(rounded(spec, table.float()), table):
        found = f"{tuple(table.shape)} {table.dtype}{' of other numbers' if fits else ''}"
        raise QuantizerError(
            f"expected a codebook {spec.codebook_shape} float16 of multiples of 1/{1 << BYTE_LEVEL_BITS} below 4 for "
            f"{spec.label}; got {found}: quantize the model anew with this version of msq, or pass a table of your own "
            "through codebooks.rounded()."
        )


@cache
def _measured_errors() -> dict[QuantizerSpec, float]:
    with (_DATA / "gaussian_errors.csv").open(newline="") as file:
        return {row_spec(row): float(row["gaussian_error"]) for row in csv.DictReader(file)}


def row_spec(row: Mapping[str, str]) -> QuantizerSpec:
    """The quantizer of a row of ``gaussian_errors.csv``."""
    numbers = float(row["bits"]), int(row["state_bits"]), int(row["table_bits"])
    return QuantizerSpec(Family(row["family"]), *numbers, TrellisCode(row["code"]))


def gaussian_error(spec: QuantizerSpec) -> float | None:
    """Normalised error of a quantizer on N(0,1) as measured for the shipped tables; None where it was not measured."""
    return _measured_errors().get(spec)
