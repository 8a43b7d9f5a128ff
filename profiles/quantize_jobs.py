"""What a process does for each job: read the weight in chunks of rows, quantize it, store error or packed tensors.

The rows of the next chunk are read, and the last result is written, while a chunk is encoded. No more than two chunks
of weights, one Hessian and two results are in memory, whatever the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..kernels.errors import QuantizerError
from ..kernels.quantize import QuantizedWeight, normalized_error, quantize
from ..kernels.rotation import input_seed
from ..kernels.row_chunks import join_errors, join_rows, row_chunks
from .errors import CorruptModelError, ProfileError
from .hessians import HessianFiles
from .inventory import LayerInfo
from .jobs import Job, JobList, Leases


@dataclass(frozen=True)
class QuantizeTask:
    """What all jobs of a list have in common.

    Attributes:
        model_dir: of the model whose weights are quantized.
        seed: of the rotations.
        hessians: directory of `HessianFiles` for the same seed; None for data-free quantization, which an embedding,
            tied or not, always gets.
        keep_weights: whether results hold the packed tensors; else only error and size.
    """

    model_dir: Path
    seed: int
    hessians: Path | None
    keep_weights: bool


def read_rows(directory: Path, layer: LayerInfo, rows: slice) -> Tensor:
    """Rows of a weight from its safetensors file, ``(rows, in_features)``, on the CPU.

    Raises:
        ProfileError: the file is damaged.
    """
    path = directory / layer.file
    try:
        with safe_open(path, framework="pt") as file:  # opened anew, so that what was read before is not kept mapped
            weight: Tensor = file.get_slice(layer.stored_as)[rows]
    except (SafetensorError, OSError) as cause:
        raise ProfileError(f"can't read '{layer.stored_as}' from {path} ({cause}); download it again.") from cause
    return weight


def error_result(error: float, size_bytes: int) -> bytes:
    """The result of a job that keeps no weights."""
    return json.dumps([error, size_bytes]).encode()


def read_error_result(content: bytes) -> tuple[float, int]:
    """(error, size_bytes) of `error_result`."""
    error, size_bytes = json.loads(content)
    return float(error), int(size_bytes)


@dataclass(frozen=True)
class WeightResult:
    """The result of a job that keeps weights.

    Attributes:
        error: normalised error.
        rotation_seed: of the weight; None where it is not rotated.
        tensors: those of `QuantizedWeight.tensors`.
    """

    error: float
    rotation_seed: int | None
    tensors: dict[str, Tensor]


def weight_result(error: float, weight: QuantizedWeight) -> bytes:
    """A safetensors file of the packed tensors, with the rest of a `WeightResult` as metadata."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weight.tensors()}
    return save(tensors, metadata={"result": json.dumps([error, weight.rotation_seed])})


def read_weight_result(path: Path) -> WeightResult:
    """What `weight_result` wrote."""
    with safe_open(path, framework="pt") as file:
        error, rotation_seed = json.loads(file.metadata()["result"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return WeightResult(error, rotation_seed, tensors)


@dataclass
class _Reader:
    """Chunks of weights on a device, each read in a thread while its predecessor is in use; keeps the last one."""

    directory: Path
    device: torch.device
    pool: ThreadPoolExecutor
    ahead: tuple[tuple[str, int], Future[Tensor]] | None = None
    last: tuple[tuple[str, int], Tensor] | None = None

    def get(self, layer: LayerInfo, rows: slice) -> Tensor:
        key = (layer.name, rows.start)
        if self.last is None or self.last[0] != key:
            self.last = None  # frees it
            if self.ahead is not None and self.ahead[0] == key:
                found, self.ahead = self.ahead[1].result(), None
            else:
                found = read_rows(self.directory, layer, rows)
            self.last = (key, found.to(self.device))
        return self.last[1]

    def prepare(self, layer: LayerInfo, rows: slice) -> None:
        """Begin to read what `get` will be asked for next."""
        key = (layer.name, rows.start)
        known = [entry[0] for entry in (self.ahead, self.last) if entry is not None]
        if key not in known:
            self.ahead = (key, self.pool.submit(read_rows, self.directory, layer, rows))


class _LayerQuantizer:
    """Turns jobs into results, one after the other."""

    def __init__(self, task: QuantizeTask, jobs: JobList, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._task = task
        self._jobs = jobs.jobs
        self._device = device
        self._reader = _Reader(task.model_dir, device, pool)
        self._hessians = None if task.hessians is None else HessianFiles(task.hessians, task.seed)

    def _chunks(self, job: Job) -> tuple[slice, ...]:
        return row_chunks(job.layer.out_features, job.layer.in_features, self._device.type)

    def result(self, job: Job) -> bytes:
        """The bytes to store for a job.

        Raises:
            ProfileError: the weight can't be read or quantized, or its Hessian can't be read.
        """
        layer = job.layer
        there = self._hessians is not None and not layer.is_embedding
        hessian = self._hessians.load(layer, self._device) if self._hessians is not None and there else None
        parts, errors, powers = [], [], []
        chunks = self._chunks(job)
        for number, rows in enumerate(chunks):
            weight = self._reader.get(layer, rows)
            if number + 1 < len(chunks):
                self._reader.prepare(layer, chunks[number + 1])
            elif job.index + 1 < len(self._jobs):
                following = self._jobs[job.index + 1]
                self._reader.prepare(following.layer, self._chunks(following)[0])
            try:
                part = quantize(
                    weight, job.spec, rotation_seed=input_seed(layer.fusion_group, self._task.seed), hessian=hessian
                )
            except QuantizerError as cause:
                raise CorruptModelError(f"{layer.name}: {cause}") from cause
            parts.append(part)
            errors.append(normalized_error(weight, part, hessian))
            powers.append(float(weight.double().square().sum()) if len(chunks) > 1 else 0.0)
        error = join_errors(errors, powers)
        if not self._task.keep_weights:
            return error_result(error, job.spec.size_bytes(layer.out_features, layer.in_features))
        return weight_result(error, join_rows(parts))


def work(
    task: QuantizeTask, jobs: JobList, device: torch.device, *, first: int = 0, wait: bool = True
) -> Iterator[Job]:
    """Do every job that is left, yielding each as soon as its result is on disk.

    On a CPU every job runs in one thread: float sums depend on the number of threads, and results must not.

    Args:
        first, wait: as of `Leases.each`.

    Raises:
        ProfileError: a job failed, or its result can't be written.
    """

    def finish(job: Job, content: bytes) -> Job:
        jobs.store(job, content)
        leases.release(job)
        return job

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, Leases(jobs) as leases:
        quantizer = _LayerQuantizer(task, jobs, device, reader)
        written: Future[Job] | None = None
        for job in leases.each(first, wait=wait):
            with _one_thread(device):
                content = quantizer.result(job)
            if written is not None:
                yield written.result()
            written = writer.submit(finish, job, content)
        if written is not None:
            yield written.result()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
