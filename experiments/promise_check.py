"""Whether a checkpoint keeps its plan's promises, and what is done where it doesn't.

A checkpoint is held against three promises: its bytes are the promised ones; a decoding step takes the promised time,
up to `LATENCY_TOLERANCE`; and it is no further from the original than the best uniform scheme within the same budgets,
built in the same way and measured on the same tokens. The promised loss is reported beside the measured KL, never
refused by itself: it ranks plans, its scale is that of the tokens that the profile saw.

Repair solves again with measured values in place of those that were wrong: each layer's sensitivity from the KL that
its two quantizers cause alone (the plan's and the uniform scheme's), and the overhead of a step from the measured one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor, nn

from ..kernels.quantize import dequantize
from ..planner.budget import Budget, parse_budgets
from ..planner.calibrate import Run, Step, calibrate
from ..planner.constraints import parse_constraints
from ..planner.errors import InfeasibleBudgetError, PlanError
from ..planner.executor.load import load_checkpoint, quantized_weights, read_tensors
from ..planner.executor.manifest import parse_quantization_config, read_manifest
from ..planner.plan import Plan
from ..planner.solve import find_plan
from ..profiles.blockwise import BlockwiseModel
from ..profiles.inventory import inventory, outside_blocks
from ..profiles.models import load_config
from ..profiles.progress import progress
from ..profiles.schema import LossMethod
from ..profiles.tables import Profile, load_profile, save_profile
from .evaluate import evaluate

LATENCY_TOLERANCE = 0.05
"""How much longer a step may take than promised."""
ROUNDS = 2
"""Repairs tried before a plan is refused."""

Steps = Callable[[nn.Module, tuple[int, ...]], Mapping[int, float]]
"""Measures µs of a decoding step of a checkpoint's model at batch sizes."""


def check_places(out: Path, profile_out: Path) -> None:
    """Refuses what `PromiseCheck.repair` would, so that nothing is measured for nothing.

    Raises:
        PlanError: one of them exists.
    """
    for path in (out, profile_out):
        if path.exists():
            raise PlanError(f"{path} exists already; choose another place for the repaired checkpoint.")


@dataclass(frozen=True)
class PromiseReport:
    """What was promised and what was found.

    Attributes:
        promised_bytes, stored_bytes: of the planned layers.
        promised_loss: by the profile.
        kl, perplexity: measured, KL to the original in nats a token.
        steps_us: promised and measured µs of a decoding step, by batch size; empty where none was measured.
        uniform: quantizer of the best uniform scheme within the budgets; None where there is none.
        uniform_kl: its measured KL.
        broken: a sentence for every promise that doesn't hold.
    """

    promised_bytes: int
    stored_bytes: int
    promised_loss: float
    kl: float
    perplexity: float
    steps_us: Mapping[int, tuple[float, float]]
    uniform: str | None
    uniform_kl: float | None
    broken: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PromiseCheck:
    """What checkpoints of a model are checked with.

    Attributes:
        model_dir: the original.
        reference: the same, loaded.
        profile: that plans are made from.
        windows: ``(windows, length)`` int64, tokens to measure on.
        build: makes the checkpoint of a plan in a directory, as the one in question was made.
        scratch: a directory for checkpoints that are only measured.
        device: that checkpoints are loaded on.
        steps: measures steps on the profile's device; None leaves latencies unchecked.
        context: tokens in the cache of these steps.
    """

    model_dir: Path
    reference: nn.Module
    profile: Profile
    windows: Tensor
    build: Callable[[Plan, Path], object]
    scratch: Path
    device: str = "cpu"
    steps: Steps | None = None
    context: int = 256

    def check(self, plan: Plan, checkpoint: Path) -> PromiseReport:
        """Hold a checkpoint against its plan.

        Raises:
            PlanError: the plan is not for the profile's model.
            CheckpointError: the checkpoint is damaged.
        """
        manifest = read_manifest(checkpoint)
        model = load_checkpoint(checkpoint, device=self.device)
        measured = evaluate(model, self.windows, reference=self.reference)
        assert measured.kl is not None
        steps = self._steps(plan, model)
        uniform, uniform_kl = self._uniform(plan)
        stored = stored_bytes(checkpoint, {entry.layer for entry in plan.layers})
        broken = []
        if not stored == plan.promised.memory_bytes == manifest.memory_bytes:
            listed = "" if stored == manifest.memory_bytes else f", msq.yaml says {manifest.memory_bytes}"
            broken.append(f"{plan.promised.memory_bytes} bytes were promised, {stored} are stored{listed}")
        for batch, (promised, found) in steps.items():
            if found > promised * (1 + LATENCY_TOLERANCE):
                broken.append(f"a step at batch {batch} was promised in {promised:.1f} us and takes {found:.1f}")
        if uniform is not None and uniform_kl is not None and measured.kl > uniform_kl:
            broken.append(f"its KL is {measured.kl:.6g}, that of {uniform} for every layer {uniform_kl:.6g}")
        return PromiseReport(
            promised_bytes=plan.promised.memory_bytes,
            stored_bytes=stored,
            promised_loss=plan.promised.loss,
            kl=measured.kl,
            perplexity=measured.perplexity,
            steps_us=steps,
            uniform=uniform,
            uniform_kl=uniform_kl,
            broken=tuple(broken),
        )

    def repair(self, plan: Plan, checkpoint: Path, out: Path, profile_out: Path) -> tuple[Plan, PromiseReport]:
        """Solve again with measured values until the promises hold.

        Args:
            out: for the repaired checkpoint; must not exist.
            profile_out: for the profile with the measured values; must not exist.

        Returns:
            The plan of `out` and its report.

        Raises:
            PlanError: the promises don't hold after `ROUNDS` repairs; nothing is left at `out`.
        """
        check_places(out, profile_out)
        checker, report = self, self.check(plan, checkpoint)
        for number in range(ROUNDS):
            checker = checker.corrected(plan, checkpoint, report, profile_out)
            plan = _solve(checker.profile, plan)
            checkpoint = self.scratch / f"repaired-{number}"
            self.build(plan, checkpoint)
            report = checker.check(plan, checkpoint)
            if not report.broken:
                shutil.move(checkpoint, out)
                return plan, report
        shutil.rmtree(profile_out, ignore_errors=True)
        raise PlanError(
            f"the plan for {plan.model.name} is refused: after {ROUNDS} repairs {'; '.join(report.broken)}; take a "
            "uniform scheme (--solver uniform), or profile with more tokens."
        )

    def corrected(self, plan: Plan, checkpoint: Path, report: PromiseReport, profile_out: Path) -> PromiseCheck:
        """The same with a profile that holds what was measured, written to `profile_out`.

        Sensitivities change where the plan lost to the uniform scheme, overheads where a step took too long.
        """
        profile = self.profile
        part = profile.loss
        layers = profile.layers
        if report.uniform_kl is not None and report.kl > report.uniform_kl:
            values = self._measured_sensitivities([checkpoint, self._uniform_checkpoint(plan)])
            layers = layers.assign(sensitivity=[values[name] for name in profile.layer_names])
            layers = layers.drop(columns="standard_error", errors="ignore")
            tokens = {"tokens": self.windows.numel(), "sequences": self.windows.shape[0]}
            tokens["sequence_length"] = self.windows.shape[1]
            part = part.model_copy(update={"method": LossMethod.DIRECT, "noise": None, **tokens})
        saved = save_profile(
            profile_out,
            profile.manifest.model_copy(update={"loss": part}),
            layers,
            profile.quantizers,
            errors=profile.errors,
            latency=profile.latency,
        )
        if any(found > promised * (1 + LATENCY_TOLERANCE) for promised, found in report.steps_us.values()):
            steps = tuple(Step(batch_size=b, step_us=found) for b, (_, found) in report.steps_us.items())
            run = Run(device=profile.manifest.device.name, context=self.context, plan=plan, steps=steps)
            saved, _ = calibrate(saved, profile_out, [run])
        return replace(self, profile=saved)

    def _steps(self, plan: Plan, model: nn.Module) -> dict[int, tuple[float, float]]:
        promised = {batch: us for batch, us in plan.promised.latency_us.items() if us is not None}
        if self.steps is None or not promised:
            return {}
        measured = self.steps(model, tuple(promised))
        return {batch: (promised[batch], float(measured[batch])) for batch in promised}

    def _uniform(self, plan: Plan) -> tuple[str | None, float | None]:
        """Label and KL of the best uniform scheme within the plan's budgets; nothing where none fits."""
        try:
            label = _solve(self.profile, plan, solver="uniform").layers[0].quantizer
        except InfeasibleBudgetError:
            return None, None
        measured = evaluate(
            load_checkpoint(self._uniform_checkpoint(plan), device=self.device), self.windows, reference=self.reference
        )
        return label, measured.kl

    def _uniform_checkpoint(self, plan: Plan) -> Path:
        found = _solve(self.profile, plan, solver="uniform")
        place = self.scratch / f"uniform-{found.layers[0].quantizer}"
        if not place.exists():
            self.build(found, place)
        return place

    def _measured_sensitivities(self, checkpoints: list[Path]) -> dict[str, float]:
        """KL per unit of error of every layer, swapped alone into the original; the mean over the checkpoints."""
        blockwise = BlockwiseModel(self.reference)
        device = next(self.reference.parameters()).device
        recording = blockwise.record(self.windows.to(device))
        info = inventory(self.model_dir, **outside_blocks(self.profile.layer_names))
        by_name = {layer.name: layer for layer in info.layers}
        layers = [by_name[name] for name in self.profile.layer_names]
        values: dict[str, list[float]] = {layer.name: [] for layer in layers}
        with progress("measuring layers", len(layers) * len(checkpoints)) as advance:
            for checkpoint in checkpoints:
                where = f"{checkpoint}/config.json"
                config = parse_quantization_config(load_config(checkpoint).quantization_config, where)
                packed = quantized_weights(config, read_tensors(sorted(checkpoint.glob("*.safetensors"))))
                for row, layer in enumerate(layers):
                    label = config.layers[layer.name].quantizer
                    error = float(self.profile.error_matrix[row, self.profile.labels.index(label)])
                    changed = dequantize(packed[layer.name]).to(device)
                    kl = float(blockwise.kl_of_change(recording, layer, changed).mean())
                    if error:  # a layer that the quantizer reproduces exactly tells nothing
                        values[layer.name].append(max(0.0, kl) / error)
                    advance()
        return {name: float(np.mean(found)) if found else 0.0 for name, found in values.items()}


def stored_bytes(checkpoint: Path, layers: set[str]) -> int:
    """Bytes of the packed tensors of layers, as the checkpoint's files hold them."""
    total = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                layer, _, part = name.rpartition(".")
                if layer in layers and part != "bias":
                    tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def _solve(profile: Profile, plan: Plan, *, solver: str | None = None) -> Plan:
    """The best plan of a profile within the budgets and side constraints of another plan."""
    budgets: tuple[Budget, ...] = parse_budgets([budget.text for budget in plan.budgets])
    constraints = () if solver == "uniform" else parse_constraints(plan.constraints)
    return find_plan(profile, budgets, constraints=constraints, solver=solver).plan


def check_profile(directory: Path, plan: Plan) -> Profile:
    """The profile that a plan was made from.

    Raises:
        PlanError: another model's.
    """
    profile = load_profile(directory)
    if {entry.layer for entry in plan.layers} != set(profile.layer_names):
        raise PlanError(
            f"{directory} is not the profile of the plan's model {plan.model.name}; give the one it was made from."
        )
    return profile
