"""The profiling job: inventory, sensitivities, quantizer errors, latencies, then one profile directory.

Every finished row goes to a journal in the output directory at once, Hessians and errors to files beside it, so the job
can be interrupted at any moment and goes on from there when it is started again with the same settings. All of that is
removed when the profile is whole.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor, nn

from .. import __version__
from ..kernels.specs import QuantizerSpec
from .calibration import Calibration, calibration
from .device import describe_device
from .engines import IN_PROCESS, Engine
from .errors import ProfileError
from .files import sha256_file, sweep_temporaries
from .fisher import measure_fisher
from .frames import latency_table, layer_table, model_part, quantizer_table
from .hessians import collect_hessians
from .inventory import LayerInfo, ModelInventory, inventory
from .journal import JOURNAL_FILE, Journal, make_directory
from .latency import measure_latency, monitored
from .model_config import check_context, read_json
from .models import choose_device, load_model
from .overhead import StepOverhead, journaled_overhead, measure_plain, overhead_method, stock_overhead
from .quantizer_errors import measure_errors
from .schema import (
    EMBED,
    HEAD,
    MANIFEST_FILE,
    LatencyPart,
    LossMethod,
    LossPart,
    ProfileManifest,
    TokenSource,
)
from .sensitivity import Sensitivity, measure_direct, measure_sensitivities
from .tables import Profile, load_profile, save_profile
from .timing import Timer, timer_for

_BY_NOISE = (LossMethod.DATA_FREE_KL, LossMethod.CALIBRATION_KL)
HESSIANS_DIR = "hessians"
"""Inside the output directory while a job with proxy errors runs."""
RESULTS_DIR = "results"
"""Inside the output directory while a job runs: the errors measured so far."""


@dataclass(frozen=True)
class ProfileSettings:
    """What a profile depends on besides the model.

    Attributes:
        specs: the palette.
        method: KL under noise on tokens that need no data, or on a calibration text; Fisher and direct take either.
        text: the calibration text, UTF-8; None for data-free tokens.
        source: of tokens that are not a text's: random ones, or drawn from the model.
        batch_sizes: for latency; empty leaves latency out.
        tokens: about how many the sensitivities see; rounded down to whole windows, of which there are at least two.
        window: tokens of a window.
        windows_per_group: windows that share a noise draw.
        noise: relative size of the perturbation, |dW| / |W|.
        context: tokens in the cache while the overhead is measured.
        seed: of tokens, noise and rotations.
        device: cpu or cuda.
        head: whether lm_head is one of the layers; None for only where its weight is its own, not the embedding.
        embedding: whether the embedding is one of the layers; tied to the head, the two are one layer.
        error: "weights" measures |W - Q|^2 / |W|^2 of data-free quantization, "proxy" the Hessian-weighted error of
            quantization under the Hessian of the same tokens.
    """

    specs: tuple[QuantizerSpec, ...]
    method: LossMethod = LossMethod.DATA_FREE_KL
    text: Path | None = None
    source: TokenSource = TokenSource.RANDOM
    batch_sizes: tuple[int, ...] = (1,)
    tokens: int = 16384
    window: int = 256
    windows_per_group: int = 8
    noise: float = 0.1
    context: int = 64
    seed: int = 0
    device: str = "cpu"
    error: str = "weights"
    head: bool | None = None
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.method is LossMethod.CALIBRATION_LOSS:
            raise ProfileError(f"sensitivities are measured by KL, Fisher or direct swaps; got {self.method}.")
        if self.method in _BY_NOISE and (self.text is not None) != (self.method is LossMethod.CALIBRATION_KL):
            raise ProfileError(
                "calibration needs a text (--text FILE), and data-free sensitivities take none; "
                f"got method {self.method} and text {self.text}."
            )
        if self.error not in ("weights", "proxy"):
            raise ProfileError(f"errors are those of weights or proxy; got '{self.error}'.")
        if not self.specs:
            raise ProfileError("expected at least one quantizer to measure; got none.")
        if not 0 < self.noise < 1:
            raise ProfileError(f"expected a relative noise between 0 and 1; got {self.noise}.")
        for name in ("tokens", "window", "windows_per_group", "context"):
            if getattr(self, name) < 1:
                raise ProfileError(f"expected {name} of at least 1; got {getattr(self, name)}.")
        if self.tokens < 2 * self.window:
            raise ProfileError(f"expected tokens for at least two windows of {self.window}; got {self.tokens}.")
        if not 0 <= self.seed < 2**63:
            raise ProfileError(f"expected a seed from 0 to 2**63 - 1; got {self.seed}.")
        if len(set(self.batch_sizes)) != len(self.batch_sizes) or any(b < 1 for b in self.batch_sizes):
            raise ProfileError(f"expected distinct batch sizes of at least 1; got {self.batch_sizes}.")


def run_profile(
    model_dir: Path,
    out: Path,
    settings: ProfileSettings,
    *,
    name: str,
    overhead: StepOverhead | None = None,
    restart: bool = False,
    engine: Engine = IN_PROCESS,
) -> Profile:
    """Measure a model and write its profile; what an interrupted call has measured is not measured again.

    Args:
        model_dir: a Hugging Face directory with safetensors weights.
        out: the profile's directory; made if missing.
        name: what to call the model in the profile.
        overhead: how the overhead of a decoding step is measured; None for that of the stock model.
        restart: drop what an interrupted or finished job left in `out`.
        engine: who measures the quantizer errors.

    Raises:
        ProfileError: bad model, text or settings; `out` holds a finished profile or another job's rows.
    """
    device = choose_device(settings.device)
    model_info = inventory(model_dir, name=name, head=settings.head, embedding=settings.embedding)
    if model_info.tied_embeddings and settings.embedding and settings.head is False:
        raise ProfileError(
            f"the head of {name} is its embedding, so the two are planned as one layer; expected --embedding without "
            "--no-head, or neither of them."
        )
    if settings.batch_sizes:
        config = model_dir / "config.json"
        check_context(read_json(config, "model config"), settings.context, config)
    digest = model_digest(model_dir)
    tokens = calibration(
        model_dir,
        settings.text,
        tokens=settings.tokens,
        window=settings.window,
        seed=settings.seed,
        source=settings.source,
        device=device,
    )
    journal_path = out / JOURNAL_FILE
    make_directory(out, restart=restart)
    job: dict[str, Any] = {key: str(value) for key, value in asdict(settings).items() if key != "specs"}
    job |= {"device": describe_device(device).model_dump(mode="json"), "msq": __version__, "torch": torch.__version__}
    job |= {"model": digest, "quantizers": [asdict(spec) for spec in settings.specs], "text": _text_digest(settings)}
    with Journal(journal_path, job, restart=restart) as journal:
        sweep_temporaries(out)
        if restart:
            _remove_work(out)
        if (out / MANIFEST_FILE).exists():  # interrupted while it cleaned up
            profile = load_profile(out)
        else:
            profile = _measure(model_dir, out, settings, model_info, digest, tokens, overhead, device, journal, engine)
        _remove_work(out)
        journal_path.unlink()  # last: it says that there is something to go on from
    return profile


def _remove_work(out: Path) -> None:
    """Remove what was kept for a job that is interrupted, but the journal."""
    for name in (HESSIANS_DIR, RESULTS_DIR):
        shutil.rmtree(out / name, ignore_errors=True)


def model_digest(model_dir: Path) -> str:
    """SHA-256 over the config and the weights of a model directory."""
    total = hashlib.sha256()
    paths = sorted([model_dir / "config.json", *model_dir.glob("*.safetensors")])
    with ThreadPoolExecutor() as threads:
        for path, digest in zip(paths, threads.map(sha256_file, paths), strict=True):
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def _text_digest(settings: ProfileSettings) -> str | None:
    return None if settings.text is None else sha256_file(settings.text)


def _measure(
    model_dir: Path,
    out: Path,
    settings: ProfileSettings,
    model_info: ModelInventory,
    digest: str,
    tokens: Calibration,
    overhead: StepOverhead | None,
    device: torch.device,
    journal: Journal,
    engine: Engine,
) -> Profile:
    layers = model_info.layers
    windows = tokens.windows
    timer, method = timer_for(device), overhead_method(overhead, device)
    sensitivities, beside, dtype = _run_model(
        model_dir, layers, windows, settings, overhead, method, device, timer, journal
    )
    hessians = None
    if settings.error == "proxy":
        hessians = collect_hessians(
            model_dir, model_info, tokens, out / HESSIANS_DIR, digest=digest, seed=settings.seed, device=device
        )
    errors = measure_errors(
        model_dir,
        layers,
        settings.specs,
        seed=settings.seed,
        device=settings.device,
        work=out / RESULTS_DIR,
        engine=engine,
        hessians=hessians,
    )
    batches: dict[str, Any] = {"batch_sizes": settings.batch_sizes, "device": device, "dtype": dtype, "timer": timer}
    with monitored(device) as monitor:
        latencies = measure_latency(layers, settings.specs, journal=journal, monitor=monitor, **batches)
        plain = measure_plain(layers, journal=journal, **batches)
        state = {} if monitor is None else monitor.summary()
    latency = (
        LatencyPart(
            batch_sizes=settings.batch_sizes,
            overhead_us=beside,
            overhead_method=method,
            context=settings.context,
            head_us=plain.get(HEAD),
            embedding_us=plain.get(EMBED),
        )
        if settings.batch_sizes
        else None
    )
    manifest = ProfileManifest(
        model=model_part(model_info, digest),
        device=describe_device(device, **state),
        loss=LossPart(
            method=settings.method,
            error="proxy" if hessians else "measured",
            tokens=windows.numel(),
            noise=settings.noise if settings.method in _BY_NOISE else None,
            seed=settings.seed,
            sequences=windows.shape[0],
            sequence_length=windows.shape[1],
            source=tokens.source,
            text=tokens.text,
            quantizer=middle_quantizer(settings.specs).label if settings.method is LossMethod.DIRECT else None,
        ),
        latency=latency,
        software={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    error_rows = [(*key, error, size) for key, (error, size) in errors.items()]
    return save_profile(
        out,
        manifest,
        layer_table(layers, sensitivities),
        quantizer_table(settings.specs, settings.seed),
        errors=pd.DataFrame(error_rows, columns=["layer", "quantizer", "error", "size_bytes"]),
        latency=latency_table(latencies),
    )


def _run_model(
    model_dir: Path,
    layers: Sequence[LayerInfo],
    windows: Tensor,
    settings: ProfileSettings,
    overhead: StepOverhead | None,
    method: str,
    device: torch.device,
    timer: Timer,
    journal: Journal,
) -> tuple[dict[str, Sensitivity], dict[int, float], torch.dtype]:
    """What needs the whole model in memory: sensitivities and overheads; and the dtype it runs in."""
    model = load_model(model_dir, device)
    sensitivities = _sensitivities(model, layers, windows, settings, journal)

    def step_us(batch_sizes: Sequence[int]) -> Mapping[int, float]:
        if overhead is None:
            return stock_overhead(model, layers, settings.context, timer, batch_sizes)
        return overhead(model_dir, layers, batch_sizes, settings.context, device)

    beside = journaled_overhead(step_us, method, batch_sizes=settings.batch_sizes, journal=journal)
    return sensitivities, beside, next(model.parameters()).dtype


def middle_quantizer(specs: Sequence[QuantizerSpec]) -> QuantizerSpec:
    """The quantizer that direct sensitivities swap in: of a palette, the one in the middle by bits."""
    return sorted(specs, key=lambda spec: (spec.bits, spec))[len(specs) // 2]


def _sensitivities(
    model: nn.Module, layers: Sequence[LayerInfo], windows: Tensor, settings: ProfileSettings, journal: Journal
) -> dict[str, Sensitivity]:
    shared: dict[str, Any] = {"seed": settings.seed, "windows_per_group": settings.windows_per_group}
    if settings.method is LossMethod.FISHER:
        return measure_fisher(model, layers, windows, journal=journal, **shared)
    if settings.method is LossMethod.DIRECT:
        return measure_direct(model, layers, windows, spec=middle_quantizer(settings.specs), journal=journal, **shared)
    return measure_sensitivities(model, layers, windows, noise=settings.noise, journal=journal, **shared)
