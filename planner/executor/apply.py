"""Build what a plan promised: quantize every layer, write the checkpoint, compare its bytes with the promise.

Weights are read in pieces from the model's safetensors files and packed tensors go to their places in the checkpoint as
they come, so neither the whole model nor the whole checkpoint is ever in memory. Every layer is a job of its own. Its
result is kept in a working directory beside the target, with the Hessians, until the checkpoint is there: a call that
was interrupted goes on from them. The checkpoint is built in there too and renamed in the end: it is there whole or not
at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ... import __version__
from ...kernels.quantize import tensor_shapes
from ...kernels.specs import QuantizerSpec
from ...profiles.calibration import Calibration
from ...profiles.engines import IN_PROCESS, Engine, run_jobs
from ...profiles.errors import CorruptModelError
from ...profiles.files import JOB_FILE, claim_directory, dump_yaml, try_lock
from ...profiles.hessians import collect_hessians
from ...profiles.inventory import ModelInventory, inventory, outside_blocks, weight_files
from ...profiles.job import model_digest
from ...profiles.jobs import JobList
from ...profiles.model_config import is_derived
from ...profiles.models import choose_device, load_tokenizer
from ...profiles.quantize_jobs import QuantizeTask, WeightResult, read_weight_result
from ...profiles.schema import EMBED, HEAD
from ..errors import PlanError
from ..plan import Plan, save_plan
from .errors import CheckpointError
from .manifest import (
    PLAN_FILE,
    CalibrationPart,
    CheckpointManifest,
    QuantizationConfig,
    QuantizedLayer,
    is_checkpoint,
    read_manifest,
    write_manifest,
)
from .model_card import model_card
from .shards import ShardWriter, TensorSlot, stored_pieces, stored_tensors
from .tuning import Tuner, Tuning

_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")
_STORED_AS = {torch.uint8: "U8", torch.float16: "F16"}
_LOCK, _HESSIANS, _RESULTS, _TUNED, _DRAFT = ".lock", "hessians", "results", "tuned", "checkpoint"
"""What a working directory holds beside its job file."""


@dataclass(frozen=True)
class Applied:
    """A finished checkpoint.

    Attributes:
        manifest: its ``msq.yaml``.
    """

    manifest: CheckpointManifest

    @property
    def memory_bytes(self) -> int:
        """Packed bytes of the planned layers on disk."""
        return self.manifest.memory_bytes

    @property
    def errors(self) -> dict[str, float]:
        """Measured normalised error of each layer, the proxy error where there are Hessians."""
        return self.manifest.errors


def work_directory(out: Path) -> Path:
    """Where the Hessians and finished layers of a checkpoint are kept until it is whole."""
    return out.absolute().with_name(f"{out.absolute().name}.work")


def apply_plan(
    model_dir: Path,
    plan: Plan,
    out: Path,
    *,
    device: str = "cpu",
    hessian: Calibration | None = None,
    tuning: Tuning | None = None,
    engine: Engine = IN_PROCESS,
) -> Applied:
    """Quantize a model as planned; what an interrupted call has finished is not done again.

    Args:
        model_dir: the model that was profiled.
        out: the checkpoint's directory; must not exist, or be empty.
        device: where to encode.
        hessian: tokens to collect Hessians on, for error feedback; None quantizes without.
        tuning: what to tune after encoding, and on what; None leaves everything as encoded.
        engine: who encodes; the checkpoint is the same whoever does.

    Raises:
        PlanError: the plan is for another model, or promises Hessians and there are none.
        ProfileError: the tokenizer is damaged, a weight can't be read, or workers are killed again and again.
        CorruptModelError: a weight can't be quantized; what was made of others is removed.
        CheckpointError: `out` is taken, can't be written, or its bytes are not the promised ones; or
            `work_directory(out)` holds another job's files.
    """
    where = choose_device(device)
    planned = outside_blocks(entry.layer for entry in plan.layers)
    info = inventory(model_dir, name=plan.model.name, **planned)
    _check_layers(plan, info, model_dir)
    if plan.profile.error == "proxy" and hessian is None:
        raise PlanError(
            "the plan's errors are those of quantization under Hessians, which data-free quantization can't keep; add "
            "--hessian, or plan with a profile of --error weights."
        )
    if (model_dir / "tokenizer.json").is_file():
        load_tokenizer(model_dir)  # it is copied: whoever runs the checkpoint would find that it is damaged
    out, work = out.absolute(), work_directory(out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not work.is_dir():
        raise CheckpointError(f"{out} exists already; choose another --out, or remove it.")
    digest = _check_digest(plan, model_dir)
    _check_bytes(plan, info)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / _LOCK).open("ab") as lock:
            if not try_lock(lock):
                raise CheckpointError(f"another msq apply is writing {out}; wait for it, or stop it.")
            if taken:
                return _finished(plan, out, work, hessian, tuning)
            job = {"model": digest, "plan": hashlib.sha256(dump_yaml(plan).encode()).hexdigest()}
            job |= {"tokens": "" if hessian is None else hessian.digest, "device": where.type}
            job |= {"tuning": "" if tuning is None else tuning.key}
            job |= {"msq": __version__, "torch": torch.__version__}
            claim_directory(work, job, "an unfinished checkpoint", CheckpointError)
            directory = None
            try:
                if hessian is not None:
                    directory = work / _HESSIANS
                    seed = plan.profile.seed
                    collect_hessians(model_dir, info, hessian, directory, digest=digest, seed=seed, device=where)
                task = QuantizeTask(model_dir.absolute(), plan.profile.seed, directory, keep_weights=True)
                tuner = None if tuning is None else Tuner(tuning, work / _TUNED, where)
                manifest = _build(plan, info, task, work, device, engine, hessian, tuner)
            except CorruptModelError:
                shutil.rmtree(work)
                raise
            if out.exists():
                out.rmdir()
            (work / _DRAFT).rename(out)
            shutil.rmtree(work)
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(
            f"can't write the checkpoint {out}: {getattr(cause, 'strerror', None) or cause}."
        ) from cause
    return Applied(manifest)


def _finished(plan: Plan, out: Path, work: Path, hessian: Calibration | None, tuning: Tuning | None) -> Applied:
    """The checkpoint that is there, if it is this plan's and only the working directory was still to be removed."""
    if is_checkpoint(out) and {path.name for path in work.iterdir()} <= {_LOCK, JOB_FILE, _HESSIANS, _RESULTS, _TUNED}:
        manifest = read_manifest(out)
        same_plan = (out / PLAN_FILE).read_text(encoding="utf-8") == dump_yaml(plan)
        found = manifest.tuning and (manifest.tuning.method, manifest.tuning.tokens)
        wanted = tuning and (tuning.method, CalibrationPart.of(tuning.tokens))
        if same_plan and manifest.hessian == CalibrationPart.of(hessian) and found == wanted:
            shutil.rmtree(work)
            return Applied(manifest)
    raise CheckpointError(f"{out} exists already; choose another --out, or remove it and {work}.")


def _check_layers(plan: Plan, info: ModelInventory, model_dir: Path) -> None:
    planned, present = {entry.layer for entry in plan.layers}, {layer.name for layer in info.layers}
    if planned != present:
        odd = sorted(planned ^ present)[0]
        state = "is planned but not in the model" if odd in planned else "is in the model but not planned"
        raise PlanError(f"the plan for {plan.model.name} doesn't fit {model_dir}: {odd} {state}; plan this model.")


def _check_digest(plan: Plan, model_dir: Path) -> str:
    found = model_digest(model_dir)
    if plan.model.digest is not None and found != plan.model.digest:
        raise PlanError(
            f"the plan was made for weights with digest {plan.model.digest[:12]}…, {model_dir} has {found[:12]}…; "
            "profile and plan this model, or give the one that was measured."
        )
    return found


def _check_bytes(plan: Plan, info: ModelInventory) -> None:
    """Compare the bytes that will be written with the promised ones before anything is done."""
    specs = _specs(plan)
    size = sum(specs[layer.name].size_bytes(layer.out_features, layer.in_features) for layer in info.layers)
    if size != plan.promised.memory_bytes:
        raise CheckpointError(
            f"the plan promised {plan.promised.memory_bytes} bytes, the checkpoint would have {size}; the profile was "
            "not measured with this version of msq: profile again."
        )


def _specs(plan: Plan) -> dict[str, QuantizerSpec]:
    return {entry.layer: plan.spec(entry.quantizer) for entry in plan.layers}


def _build(
    plan: Plan,
    info: ModelInventory,
    task: QuantizeTask,
    work: Path,
    device: str,
    engine: Engine,
    tokens: Calibration | None,
    tuner: Tuner | None,
) -> CheckpointManifest:
    """Do all jobs and write the checkpoint to the working directory."""
    draft = work / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    specs = _specs(plan)
    jobs = JobList.open(work / _RESULTS, [(layer, specs[layer.name]) for layer in info.layers])
    tuned: dict[str, Tensor] = {}
    tuning = None
    if tuner is not None:
        for _ in run_jobs(task, jobs, device=device, engine=engine, what="quantizing"):
            pass  # results stay on disk
        patterns = {entry.layer: entry.pattern for entry in plan.layers}
        tuned, tuning = tuner.run(task, jobs, patterns)
    results = _write_weights(info, specs, task, jobs, draft, device, engine, tuned)
    _write_config(plan, info, results, task.model_dir, draft)
    for pattern in _COPIED:
        for path in sorted(task.model_dir.glob(pattern)):
            shutil.copyfile(path, draft / path.name)
    save_plan(plan, draft / PLAN_FILE)
    (draft / "README.md").write_text(model_card(plan), encoding="utf-8")
    fields = {"msq_version": __version__, "model": plan.model.name, "memory_bytes": plan.promised.memory_bytes}
    fields |= {"hessian": CalibrationPart.of(tokens), "tuning": tuning}
    return write_manifest(draft, fields | {"errors": {name: result.error for name, result in results.items()}})


def _write_weights(
    info: ModelInventory,
    specs: Mapping[str, QuantizerSpec],
    task: QuantizeTask,
    jobs: JobList,
    draft: Path,
    device: str,
    engine: Engine,
    tuned: Mapping[str, Tensor],
) -> dict[str, WeightResult]:
    """Fill the weights files as jobs get done; returns the results without their tensors.

    Args:
        tuned: tensors that take the place of encoded or untouched ones, by name.
    """
    untouched = [
        (path, tensor)
        for path in weight_files(task.model_dir)
        for tensor in stored_tensors(path)
        if tensor.name not in info.replaced_tensors and not is_derived(tensor.name)
    ]
    packed = [
        TensorSlot(f"{layer.name}.{name}", _STORED_AS[dtype], shape)
        for layer in info.layers
        for name, (shape, dtype) in tensor_shapes(specs[layer.name], layer.out_features, layer.in_features).items()
    ]
    results = {}
    with ShardWriter(draft, [*(tensor for _, tensor in untouched), *packed]) as writer:
        for path, tensor in untouched:
            changed = tuned.get(tensor.name)
            writer.write(tensor.name, stored_pieces(path, tensor) if changed is None else [changed])
        for job in run_jobs(task, jobs, device=device, engine=engine, what="quantizing"):
            result = read_weight_result(jobs.path(job))
            for name, values in result.tensors.items():
                stored = f"{job.layer.name}.{name}"
                writer.write(stored, [tuned.get(stored, values)])
            results[job.layer.name] = replace(result, tensors={})
        writer.finish()
    return results


def _write_config(
    plan: Plan, info: ModelInventory, results: Mapping[str, WeightResult], model_dir: Path, draft: Path
) -> None:
    entries = {entry.layer: entry for entry in plan.layers}
    layers = {
        layer.name: QuantizedLayer(
            quantizer=entries[layer.name].quantizer,
            out_features=layer.out_features,
            in_features=layer.in_features,
            rotation_seed=results[layer.name].rotation_seed,
            pattern=entries[layer.name].pattern,
            implementation=entries[layer.name].implementation,
        )
        for layer in info.layers
    }
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig(quantizers=plan.quantizers, layers=layers)
    config["quantization_config"] = quantization.model_dump(mode="json")
    if HEAD in layers:
        config["tie_word_embeddings"] = False  # the head has codes of its own, whatever the embedding is
    elif EMBED in layers and info.tied_embeddings:
        config["tie_word_embeddings"] = True  # as a loader must know, also where the model did not say it
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
