"""Normalised error and exact size of every (layer, quantizer), measured by encoding the rotated weight.

Without Hessians the error is ``|W - Q|^2 / |W|^2`` of data-free quantization. With them it is the proxy error of
quantization under the Hessian (see `kernels.hessian`), in the same units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.codebooks import gaussian_error
from ..kernels.quantize import normalized_error, quantize
from ..kernels.specs import QuantizerSpec
from .engines import Engine, run_jobs
from .hessians import HessianFiles
from .inventory import LayerInfo
from .jobs import JobList
from .quantize_jobs import QuantizeTask, read_error_result, read_rows

_SAMPLE = (256, 1024)
"""Shape of the N(0,1) sample for quantizers whose error was not measured beforehand."""


def read_weight(directory: Path, layer: LayerInfo) -> Tensor:
    """One weight from its safetensors file, ``(out_features, in_features)``, on the CPU."""
    return read_rows(directory, layer, slice(None))


def measure_errors(
    directory: Path,
    layers: Sequence[LayerInfo],
    specs: Sequence[QuantizerSpec],
    *,
    seed: int,
    device: str,
    work: Path,
    engine: Engine,
    hessians: HessianFiles | None = None,
) -> dict[tuple[str, str], tuple[float, int]]:
    """(error, size_bytes) by (layer, quantizer label), each a job of its own (see `jobs`).

    Args:
        device: where to encode.
        work: directory of the results, kept for a job that is interrupted; the caller removes it.
        engine: who does the jobs.
        hessians: of the layers' inputs, for the same `seed`; None for data-free quantization.

    Raises:
        ProfileError: a weight can't be quantized (NaN, infinite), a Hessian can't be read, or workers are killed.
    """
    jobs = JobList.open(work, [(layer, spec) for layer in layers for spec in specs])
    task = QuantizeTask(directory, seed, None if hessians is None else hessians.directory, keep_weights=False)
    done = run_jobs(task, jobs, device=device, engine=engine, what="quantizer errors")
    return {(job.layer.name, job.spec.label): read_error_result(jobs.load(job)) for job in done}


def measured_gaussian_error(spec: QuantizerSpec, seed: int) -> float:
    """The quantizer's error on N(0,1): from the shipped measurements, else from a seeded sample of 262,144 weights."""
    known = gaussian_error(spec)
    if known is not None:
        return known
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(seed))
    return normalized_error(sample, quantize(sample, spec, rotation_seed=seed))
