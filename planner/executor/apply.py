"""Build what a plan promised: quantize every layer, write the checkpoint, compare its bytes with the promise.

Weights are read one at a time from the model's safetensors files and written in shards, so neither the whole model nor
the whole checkpoint is ever in memory. Everything goes to a temporary directory beside the target, which is renamed in
the end: a checkpoint is there whole or not at all. Hessians go to a work directory of their own, so that an interrupted
job finds them again; it is removed when the checkpoint is there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import __version__
from ...kernels.errors import QuantizerError
from ...kernels.quantize import normalized_error, quantize
from ...kernels.rotation import input_seed
from ...profiles.hessians import Calibration, HessianFiles, collect_hessians
from ...profiles.inventory import INDEX_FILE, WEIGHTS_FILE, ModelInventory, inventory, weight_files
from ...profiles.job import model_digest
from ...profiles.models import choose_device
from ...profiles.progress import progress
from ...profiles.quantizer_errors import read_weight
from ...profiles.schema import HEAD
from ..errors import PlanError
from ..plan import Plan, save_plan
from .errors import CheckpointError
from .manifest import PLAN_FILE, CheckpointManifest, HessianPart, QuantizationConfig, QuantizedLayer, write_manifest
from .model_card import model_card

SHARD_BYTES = 4 << 30
"""A weights file is closed when it holds this much."""
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json", "*.jinja")


@dataclass(frozen=True)
class Applied:
    """A finished checkpoint.

    Attributes:
        manifest: its ``msq.yaml``.
        memory_bytes: packed bytes of the planned layers on disk.
        errors: measured normalised error of each layer, the proxy error where there are Hessians.
    """

    manifest: CheckpointManifest
    memory_bytes: int
    errors: dict[str, float]


def work_directory(out: Path) -> Path:
    """Where the Hessians of a checkpoint are kept until it is finished."""
    return out.absolute().with_name(f"{out.absolute().name}.work")


def apply_plan(
    model_dir: Path, plan: Plan, out: Path, *, device: str = "cpu", hessian: Calibration | None = None
) -> Applied:
    """Quantize a model as planned.

    Args:
        model_dir: the model that was profiled.
        out: the checkpoint's directory; must not exist, or be empty.
        device: where to encode.
        hessian: tokens to collect Hessians on, for error feedback; None quantizes data-free.

    Raises:
        PlanError: the plan is for another model, or promises Hessians and there are none.
        ProfileError: `work_directory(out)` holds other Hessians.
        CheckpointError: `out` is taken, can't be written, or its bytes are not the promised ones.
    """
    where = choose_device(device)
    info = inventory(model_dir, name=plan.model.name, head=any(entry.layer == HEAD for entry in plan.layers))
    _check_model(plan, info, model_dir)
    if plan.profile.error == "proxy" and hessian is None:
        raise PlanError(
            "the plan's errors are those of quantization under Hessians, which data-free quantization can't keep; add "
            "--hessian, or plan with a profile of --error weights."
        )
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; choose another --out, or remove it.")
    hessians = None
    if hessian is not None:
        hessians = collect_hessians(
            model_dir,
            info,
            hessian,
            work_directory(out),
            digest=plan.model.digest or model_digest(model_dir),
            seed=plan.profile.seed,
            device=where,
        )
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        applied = _write(model_dir, plan, info, draft, where, hessian, hessians)
        if out.exists():
            out.rmdir()
        draft.rename(out)
        if hessians is not None:
            shutil.rmtree(hessians.directory)
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(
            f"can't write the checkpoint {out}: {getattr(cause, 'strerror', None) or cause}."
        ) from cause
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return applied


def _check_model(plan: Plan, info: ModelInventory, model_dir: Path) -> None:
    planned, present = {entry.layer for entry in plan.layers}, {layer.name for layer in info.layers}
    if planned != present:
        odd = sorted(planned ^ present)[0]
        state = "is planned but not in the model" if odd in planned else "is in the model but not planned"
        raise PlanError(f"the plan for {plan.model.name} doesn't fit {model_dir}: {odd} {state}; plan this model.")
    if plan.model.digest is not None and (found := model_digest(model_dir)) != plan.model.digest:
        raise PlanError(
            f"the plan was made for weights with digest {plan.model.digest[:12]}…, {model_dir} has {found[:12]}…; "
            "profile and plan this model, or give the one that was measured."
        )


def _write(
    model_dir: Path,
    plan: Plan,
    info: ModelInventory,
    draft: Path,
    device: torch.device,
    tokens: Calibration | None,
    hessians: HessianFiles | None,
) -> Applied:
    entries = {entry.layer: entry for entry in plan.layers}
    errors: dict[str, float] = {}
    described: dict[str, QuantizedLayer] = {}
    sizes = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal sizes
        yield from _unplanned(model_dir, info)
        with progress("quantizing", len(info.layers)) as advance:
            for layer in info.layers:
                spec = plan.spec(entries[layer.name].quantizer)
                weight = read_weight(model_dir, layer).to(device)
                moment = None if hessians is None else hessians.load(layer, device)
                seed = input_seed(layer.fusion_group, plan.profile.seed)
                try:
                    quantized = quantize(weight, spec, rotation_seed=seed, hessian=moment)
                except QuantizerError as cause:
                    raise CheckpointError(f"{layer.name}: {cause}") from cause
                errors[layer.name] = normalized_error(weight, quantized, moment)
                sizes += quantized.size_bytes
                described[layer.name] = QuantizedLayer(
                    quantizer=entries[layer.name].quantizer,
                    out_features=layer.out_features,
                    in_features=layer.in_features,
                    rotation_seed=quantized.rotation_seed,
                    pattern=entries[layer.name].pattern,
                    implementation=entries[layer.name].implementation,
                )
                for name, tensor in quantized.tensors():
                    yield f"{layer.name}.{name}", tensor.cpu()
                advance()

    write_shards(tensors(), draft, SHARD_BYTES)
    if sizes != plan.promised.memory_bytes:
        raise CheckpointError(
            f"the plan promised {plan.promised.memory_bytes} bytes, the checkpoint has {sizes}; the profile was not "
            "measured with this version of msq: profile again."
        )
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig(quantizers=plan.quantizers, layers=described)
    config["quantization_config"] = quantization.model_dump(mode="json")
    if HEAD in described:
        config["tie_word_embeddings"] = False  # the embedding stays, the head has codes of its own
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _COPIED:
        for path in sorted(model_dir.glob(pattern)):
            shutil.copyfile(path, draft / path.name)
    save_plan(plan, draft / PLAN_FILE)
    (draft / "README.md").write_text(model_card(plan), encoding="utf-8")
    part = (
        None if tokens is None else HessianPart(tokens=tokens.windows.numel(), text=tokens.text, digest=tokens.digest)
    )
    fields = {"msq_version": __version__, "model": plan.model.name, "memory_bytes": sizes, "hessian": part}
    return Applied(write_manifest(draft, fields), sizes, errors)


def _unplanned(model_dir: Path, info: ModelInventory) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor that the plan leaves as it is."""
    planned = {f"{layer.name}.weight" for layer in info.layers}
    # the embedding is written even where a planned head was tied to it
    for path in weight_files(model_dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name not in planned:
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise CheckpointError(
                            f"'{name}' in {path} holds NaN or infinite numbers; the model is corrupt."
                        )
                    yield name, tensor


def write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> None:
    """Write tensors to ``model.safetensors``, or to numbered shards with an index when they exceed `shard_bytes`."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        path = directory / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if pending and size + tensor_bytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        size += tensor_bytes
        total += tensor_bytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / WEIGHTS_FILE)
    else:
        where: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (directory / f"shard-{number}").rename(directory / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes its files private
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
