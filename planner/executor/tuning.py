"""Tuning after encoding: what is not codes (row scales, codebooks, norms, biases) is fitted while the codes stay.

Three ways, none of which changes the number of bytes that were promised:

- layers: scales and codebook of each layer by least squares under the Hessian of its inputs (`kernels.refit`).
- blocks: on top of that, each decoder block by gradient descent, as QuIP# (arXiv 2402.04396, section 5) and QTIP do:
  fed with what leaves the quantized blocks before it, it shall give what the original block gives in the original
  model, so a block makes up for those before it, too.
- model: on top of that, all blocks together, against the original's distribution of the next token (`model_tuning`).

An embedding that is planned, and a head that is one with it, stay as encoded; blocks are fed with what it gives.

Blocks are done in order, one in memory at a time. What a block was tuned to goes to a file of its own, from which the
rest goes on after an interruption, with the same result as without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...kernels.quantize import QuantizedWeight, dequantize, from_tensors
from ...kernels.refit import FittedLayer, refit
from ...profiles.calibration import Calibration
from ...profiles.files import sweep_temporaries, write_atomic
from ...profiles.hessians import HessianFiles
from ...profiles.jobs import Job, JobList
from ...profiles.progress import progress
from ...profiles.quantize_jobs import QuantizeTask, read_rows, read_weight_result
from ...profiles.streaming import StreamedModel
from .block_tuning import Change, quantized_copy, stored_tensors, tune_block
from .errors import CheckpointError
from .manifest import CalibrationPart, TuneMethod, TuningPart
from .model_tuning import tune_model


def parse_tune(text: str) -> TuneMethod | None:
    """``none``, ``layers``, ``blocks`` or ``model``.

    Raises:
        CheckpointError: none of them.
    """
    if text not in ("none", *TuneMethod):
        raise CheckpointError(f"--tune is one of none, {', '.join(TuneMethod)}; got '{text}'.")
    return None if text == "none" else TuneMethod(text)


@dataclass(frozen=True)
class Tuning:
    """How to tune.

    Attributes:
        method: what is fitted, and to what.
        tokens: that blocks and model are tuned on; `LAYERS` takes none.
    """

    method: TuneMethod
    tokens: Calibration | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.method is TuneMethod.LAYERS):
            raise CheckpointError(f"tuning by '{self.method}' {'needs' if self.tokens is None else 'takes no'} tokens.")

    @property
    def key(self) -> str:
        """What a job's files depend on."""
        return f"{self.method} {'' if self.tokens is None else self.tokens.digest}".strip()


@dataclass(frozen=True)
class TuneTask:
    """What all blocks have in common.

    Attributes:
        quantized: model, rotations and Hessians of the quantization.
        jobs: all done.
        patterns: by layer, the layers that it shares a kernel with, and so a codebook.
        directory: of the files of tuned blocks.
        device: where to compute.
    """

    quantized: QuantizeTask
    jobs: JobList
    patterns: Mapping[str, tuple[str, ...]]
    directory: Path
    device: torch.device

    @property
    def blocks(self) -> list[int]:
        """Numbers of the decoder blocks, ascending."""
        return sorted({job.layer.block for job in self.jobs.jobs if _in_a_block(job)})

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.directory / f"tuned-{block:05d}.safetensors"

    @property
    def model_path(self) -> Path:
        """The file of the whole model."""
        return self.directory / "tuned-model.safetensors"

    def groups(self, block: int | None = None) -> list[list[Job]]:
        """The layers of a block, or all of the model, those together that share a codebook."""
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs.jobs:
            if block is None or (job.layer.block == block and _in_a_block(job)):
                groups.setdefault(self.patterns[job.layer.name], []).append(job)
        return list(groups.values())

    def packed(self, job: Job) -> QuantizedWeight:
        """A layer as encoded."""
        result, layer = read_weight_result(self.jobs.path(job)), job.layer
        size = layer.out_features, layer.in_features
        return from_tensors(job.spec, *size, result.rotation_seed, result.tensors).to(self.device)


@dataclass(frozen=True)
class Tuned:
    """What a block, or the whole model, was tuned to.

    Attributes:
        tensors: by name as in the checkpoint: scales and codebooks of its layers, norms and biases that changed.
        loss: of its output before and after, of the whole model its KL; None where layers were fitted alone.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Change | None = None


@dataclass(frozen=True)
class Tuner:
    """Tuning with a place for its files.

    Attributes:
        tuning: what is tuned, and on what.
        directory: of the files; made if missing. What an interrupted job left there is used.
        device: where to compute.
    """

    tuning: Tuning
    directory: Path
    device: torch.device

    def run(
        self, quantized: QuantizeTask, jobs: JobList, patterns: Mapping[str, tuple[str, ...]]
    ) -> tuple[dict[str, Tensor], TuningPart]:
        """Tune every decoder block whose file is not there yet.

        Args:
            quantized, jobs, patterns: as of `TuneTask`.

        Returns:
            The tensors that change, by name as in the checkpoint, and what the checkpoint says of it.

        Raises:
            ProfileError: a tensor of the model is missing or damaged, or an activation is not finite.
            CheckpointError: a file can't be read or written.
        """
        task = TuneTask(quantized, jobs, patterns, self.directory, self.device)
        self.directory.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(self.directory)
        missing = [block for block in task.blocks if not task.path(block).exists()]
        with progress("tuning", len(task.blocks), done=len(task.blocks) - len(missing)) as advance:
            for _ in _fit_layers(task, missing) if self.tuning.tokens is None else self._tune_blocks(task, missing):
                advance()
        tuned = [_read(task.path(block)) for block in task.blocks]
        tensors = {name: tensor for block in tuned for name, tensor in block.tensors.items()}
        losses = tuple((block.loss.before, block.loss.after) for block in tuned if block.loss is not None)
        part = TuningPart(method=self.tuning.method, tokens=CalibrationPart.of(self.tuning.tokens), losses=losses)
        if self.tuning.method is not TuneMethod.MODEL:
            return tensors, part
        whole = self._tune_model(task, tensors)
        assert whole.loss is not None
        return tensors | dict(whole.tensors), part.model_copy(update={"kl": (whole.loss.before, whole.loss.after)})

    def _tune_model(self, task: TuneTask, tensors: Mapping[str, Tensor]) -> Tuned:
        assert self.tuning.tokens is not None
        if not task.model_path.exists():
            groups = task.groups()
            weights = {job.layer.name: task.packed(job) for group in groups for job in group}
            shared = [[job.layer.name for job in group] for group in groups]
            found = tune_model(
                task.quantized.model_dir,
                weights,
                tensors,
                shared,
                self.tuning.tokens.windows,
                state=self.directory / "epochs.safetensors",
                device=self.device,
            )
            _write(task.model_path, Tuned(*found))
        return _read(task.model_path)

    def _tune_blocks(self, task: TuneTask, missing: Sequence[int]) -> Iterator[int]:
        assert self.tuning.tokens is not None
        if not missing:
            return
        directory, windows = task.quantized.model_dir, self.tuning.tokens.windows
        model = StreamedModel(directory, windows, self.device, dtype=torch.float32)
        changed = _embedded(task, model, windows)
        while model.block <= missing[-1]:
            block = model.block
            _next_block(task, model, changed)
            if block in missing:
                yield block


def _fit_layers(task: TuneTask, missing: Sequence[int]) -> Iterator[int]:
    for block in missing:
        _write(task.path(block), Tuned(stored_tensors(_fitted(task, block))))
        yield block


def _in_a_block(job: Job) -> bool:
    return not (job.layer.is_embedding or job.layer.is_head)


def _embedded(task: TuneTask, model: StreamedModel, windows: Tensor) -> list[Tensor]:
    """What enters the first block in the quantized model, as `StreamedModel.hidden`."""
    embedding = next((job for job in task.jobs.jobs if job.layer.is_embedding), None)
    if embedding is None:
        return list(model.hidden)
    rows = dequantize(task.packed(embedding)).cpu()
    return [F.embedding(batch, rows) for batch in windows.split([len(batch) for batch in model.hidden])]


def _next_block(task: TuneTask, model: StreamedModel, changed: list[Tensor]) -> None:
    """Tune a block unless its file is there; move the original and the quantized model's activations over it.

    Args:
        model: the original, before this block.
        changed: what enters the block in the quantized model, as `StreamedModel.hidden`; replaced by what leaves it.
    """
    block, groups = model.block, task.groups(model.block)
    module = model.load_block()
    target = list(model.run(module, model.hidden))
    if not task.path(block).exists():
        shared = [[job.layer.name for job in group] for group in groups]
        _write(task.path(block), Tuned(*tune_block(model, module, _fitted(task, block), shared, changed, target)))
    encoded = {job.layer.name: task.packed(job) for group in groups for job in group}
    quantized = quantized_copy(module, model.prefix, encoded, _read(task.path(block)).tensors)
    for number, left in enumerate(model.run(quantized, changed)):
        changed[number] = left
    model.hidden = target
    model.leave_block()


def _fitted(task: TuneTask, block: int) -> dict[str, QuantizedWeight]:
    """Layers of a block with scales and codebooks of least squares."""
    directory = task.quantized.hessians
    hessians = None if directory is None else HessianFiles(directory, task.quantized.seed)
    found: dict[str, QuantizedWeight] = {}
    for group in task.groups(block):
        parts = []
        for job in group:
            original = read_rows(task.quantized.model_dir, job.layer, slice(None)).to(task.device)
            weight = task.packed(job)
            hessian = None if hessians is None else hessians.load(job.layer, task.device)
            if hessian is not None and weight.rotation_seed is None:
                hessian = hessian.unrotated()
            parts.append(FittedLayer(original, weight, hessian))
        found |= dict(zip((job.layer.name for job in group), refit(parts), strict=True))
    return found


def _write(path: Path, tuned: Tuned) -> None:
    loss = None if tuned.loss is None else [tuned.loss.before, tuned.loss.after]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tuned.tensors.items()}
    write_atomic(path, save(tensors, metadata={"loss": json.dumps(loss)}), CheckpointError)


def _read(path: Path) -> Tuned:
    try:
        with safe_open(path, framework="pt") as file:
            loss = json.loads(file.metadata()["loss"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"can't read {path} ({cause}); remove it and repeat the command.") from cause
    return Tuned(tensors, None if loss is None else Change(*loss))
