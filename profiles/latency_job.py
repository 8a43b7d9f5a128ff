"""The latency profile of a GPU for a model's shapes: no weights are needed, a config.json is enough.

It holds every kernel's time and the overhead of a decoding step, but no losses: `combine` joins it with a loss profile
of the model, which may have been measured on another machine. The head is always among its layers, and timed in the
model's own dtype too, so that it serves plans with and without it. Resumable like `job`, and by the same journal: rows
of another GPU or driver are refused.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import __version__
from ..kernels.specs import QuantizerSpec
from .device import describe_device
from .errors import ProfileError
from .files import sha256_file, sweep_temporaries
from .frames import latency_table, layer_table, model_part, quantizer_table
from .inventory import ModelInventory, inventory_of_config
from .journal import JOURNAL_FILE, Journal, make_directory
from .latency import measure_latency, monitored
from .model_config import check_context, read_json
from .models import choose_device, load_config
from .overhead import StepOverhead, journaled_overhead, measure_plain, overhead_method, stand_ins, stock_overhead
from .schema import EMBED, HEAD, MANIFEST_FILE, LatencyPart, ProfileManifest
from .tables import Profile, load_profile, save_profile
from .timing import Timer, timer_for

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LatencySettings:
    """What a latency profile depends on besides the shapes.

    Attributes:
        specs: the palette.
        batch_sizes: tokens decoded together, at least one size.
        context: tokens in the cache while the overhead is measured.
        device: cpu or cuda.
        embedding: whether the embedding is one of the layers; tied to the head, the two are one.
    """

    specs: tuple[QuantizerSpec, ...]
    batch_sizes: tuple[int, ...] = (1, 8)
    context: int = 256
    device: str = "cuda"
    embedding: bool = False

    def __post_init__(self) -> None:
        if not self.specs:
            raise ProfileError("expected at least one quantizer to measure; got none.")
        if not self.batch_sizes:
            raise ProfileError("a latency profile needs batch sizes, such as --batch-sizes 1,8; got none.")
        if len(set(self.batch_sizes)) != len(self.batch_sizes) or any(b < 1 for b in self.batch_sizes):
            raise ProfileError(f"expected distinct batch sizes of at least 1; got {self.batch_sizes}.")
        if self.context < 1:
            raise ProfileError(f"expected context of at least 1; got {self.context}.")


def run_latency_profile(
    config: Path,
    out: Path,
    settings: LatencySettings,
    *,
    name: str | None = None,
    overhead: StepOverhead | None = None,
    restart: bool = False,
) -> Profile:
    """Measure the kernels and the overhead of the model that a config.json describes.

    Args:
        config: the file.
        out: the profile's directory; made if missing.
        name: what to call the model; None for the name of the file, or of its directory.
        overhead: how the overhead is measured; None for that of the stock model.
        restart: drop what an interrupted or finished job left in `out`.

    Raises:
        ProfileError: a bad config or device; `out` holds a finished profile or another job's rows.
    """
    device = choose_device(settings.device)
    info = inventory_of_config(config, name=name, head=True, embedding=settings.embedding)
    check_context(read_json(config, "model config"), settings.context, config)
    make_directory(out, restart=restart)
    job: dict[str, Any] = {key: str(value) for key, value in asdict(settings).items() if key != "specs"}
    job |= {"device": describe_device(device).model_dump(mode="json"), "msq": __version__, "torch": torch.__version__}
    job |= {"config": sha256_file(config), "quantizers": [asdict(spec) for spec in settings.specs]}
    with Journal(out / JOURNAL_FILE, job, restart=restart) as journal:
        sweep_temporaries(out)
        if (out / MANIFEST_FILE).exists():  # interrupted before the journal was removed
            profile = load_profile(out)
        else:
            profile = _measure(config, info, out, settings, overhead, device, journal)
        (out / JOURNAL_FILE).unlink()  # last: it says that there is something to go on from
    return profile


def _measure(
    config: Path,
    info: ModelInventory,
    out: Path,
    settings: LatencySettings,
    overhead: StepOverhead | None,
    device: torch.device,
    journal: Journal,
) -> Profile:
    layers, timer = info.layers, timer_for(device)
    method = overhead_method(overhead, device)
    dtype = _DTYPES[layers[0].dtype] if device.type == "cuda" else torch.float32
    with monitored(device) as monitor:
        latencies = measure_latency(
            layers,
            settings.specs,
            batch_sizes=settings.batch_sizes,
            device=device,
            dtype=dtype,
            timer=timer,
            journal=journal,
            monitor=monitor,
        )
        beside = journaled_overhead(
            partial(_overhead, config, info, settings, overhead, device, dtype, timer),
            method,
            batch_sizes=settings.batch_sizes,
            journal=journal,
        )
        plain = measure_plain(
            layers, batch_sizes=settings.batch_sizes, device=device, dtype=dtype, timer=timer, journal=journal
        )
        state = {} if monitor is None else monitor.summary()
    return save_profile(
        out,
        ProfileManifest(
            model=model_part(info, None),
            device=describe_device(device, **state),
            loss=None,
            latency=LatencyPart(
                batch_sizes=settings.batch_sizes,
                overhead_us=beside,
                overhead_method=method,
                context=settings.context,
                head_us=plain.get(HEAD),
                embedding_us=plain.get(EMBED),
            ),
            software={
                "msq": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        ),
        layer_table(layers, None),
        quantizer_table(settings.specs, 0),
        latency=latency_table(latencies),
    )


def _overhead(
    config: Path,
    info: ModelInventory,
    settings: LatencySettings,
    overhead: StepOverhead | None,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    batch_sizes: Sequence[int],
) -> Mapping[int, float]:
    if overhead is not None:
        return overhead(config, info.layers, batch_sizes, settings.context, device)
    return stock_overhead(
        model_with_zeros(config, info, device, dtype), info.layers, settings.context, timer, batch_sizes
    )


def model_with_zeros(config: Path, info: ModelInventory, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The stock model of a config with zeros for its planned layers; what else it has is random.

    Raises:
        ProfileError: transformers can't build it.
    """
    from transformers import AutoModelForCausalLM

    settings = load_config(config)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    except Exception as cause:  # transformers raises any type for a bad config; type and text are told
        detail = " ".join(str(cause).split())[:200]
        raise ProfileError(
            f"transformers can't build the model of {config} ({type(cause).__name__}: {detail})."
        ) from cause
    for path, module in stand_ins(info.layers, dtype).items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).to(device)  # computed, never stored
    result: nn.Module = model.eval()
    return result
