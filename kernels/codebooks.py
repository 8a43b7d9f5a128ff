"""The shipped codebooks: fp16 tables for Gaussian weights of unit variance, one per family and rate.

``data/codebooks.safetensors`` is written by ``experiments/train_codebooks.py``: Lloyd iterations on N(0,1) samples,
for the trellis codes on their own Viterbi assignments. `gaussian_errors.csv` beside it holds the normalised error of
every quantizer on N(0,1), measured by the same script.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from torch import Tensor

from .errors import QuantizerError
from .specs import Family, QuantizerSpec

_DATA = Path(__file__).parent / "data"


def codebook_key(spec: QuantizerSpec) -> str:
    """The name of a quantizer's table in the data file; trellis lengths share one."""
    return f"{spec.family}.{spec.bits:g}"


@cache
def _tables() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(_DATA / "codebooks.safetensors")


def codebook(spec: QuantizerSpec) -> Tensor:
    """The fp16 table of a quantizer, ``spec.codebook_shape``; empty for `int`. The caller's own copy.

    Raises:
        QuantizerError: the data file lacks it or holds another shape.
    """
    if spec.family is Family.INT:
        return Tensor().half()
    table = _tables().get(codebook_key(spec))
    if table is None or tuple(table.shape) != spec.codebook_shape:
        found = "none" if table is None else f"shape {tuple(table.shape)}"
        raise QuantizerError(
            f"{spec.label} needs a codebook of shape {spec.codebook_shape}, found {found} in {_DATA}; reinstall msq."
        )
    return table.clone()


@cache
def _measured_errors() -> dict[tuple[Family, float, int], float]:
    with (_DATA / "gaussian_errors.csv").open(newline="") as file:
        return {
            (Family(row["family"]), float(row["bits"]), int(row["state_bits"])): float(row["gaussian_error"])
            for row in csv.DictReader(file)
        }


def gaussian_error(spec: QuantizerSpec) -> float | None:
    """Normalised error of a quantizer on N(0,1) as measured for the shipped tables; None where it was not measured."""
    return _measured_errors().get((spec.family, spec.bits, spec.state_bits))
