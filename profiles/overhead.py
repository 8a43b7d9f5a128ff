"""What a decoding step takes beside the planned layers: attention, norms, embeddings, and launches between them.

Here every planned layer of the stock model is replaced by one that returns zeros; on a GPU the step is captured in a
CUDA graph with a static cache. An executor that fuses more takes less: it brings a `StepOverhead` of its own. Head and
embedding, where they are planned layers, are timed by themselves too, for plans that leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inventory import LayerInfo
from .journal import Journal
from .latency import lookup_tokens
from .progress import progress
from .schema import EMBED, HEAD, STOCK_METHODS
from .timing import Timer


class StepOverhead(Protocol):
    """Another way to measure overheads, such as that of an executor that fuses more than the stock model.

    Attributes:
        methods: what a profile calls it, by kind of device.
    """

    methods: Mapping[str, str]

    def __call__(
        self,
        config: Path,
        layers: Sequence[LayerInfo],
        batch_sizes: Sequence[int],
        context: int,
        device: torch.device,
    ) -> Mapping[int, float]:
        """µs of a decoding step beside the products of `layers`, by batch size.

        Args:
            config: a config.json or a model directory.
            context: tokens already in the cache.
        """


def overhead_method(overhead: StepOverhead | None, device: torch.device) -> str:
    """What a profile calls an overhead measured on a device; `overhead` is None for that of the stock model."""
    return (STOCK_METHODS if overhead is None else overhead.methods)[device.type]


def journaled_overhead(
    step_us: Callable[[Sequence[int]], Mapping[int, float]],
    method: str,
    *,
    batch_sizes: Sequence[int],
    journal: Journal,
) -> dict[int, float]:
    """µs of a decoding step beside the planned layers, by batch size, measured where the journal has none.

    Args:
        step_us: measures some batch sizes; not called for those that are in the journal.
        method: what it is called; the journal keeps the rows of each apart.
    """
    missing = [batch for batch in batch_sizes if ("overhead", batch, method) not in journal]
    if missing:
        for batch, us in step_us(missing).items():
            journal.add(("overhead", batch, method), us)
    return {batch: float(journal["overhead", batch, method]) for batch in batch_sizes}


@torch.inference_mode()
def stock_overhead(
    model: nn.Module, layers: Sequence[LayerInfo], context: int, timer: Timer, batch_sizes: Sequence[int]
) -> dict[int, float]:
    """µs of a step of the stock model beside its planned layers, which are put back before this returns, by batch size.

    Args:
        context: tokens already in the cache.
    """
    times = {}
    with progress("overhead", len(batch_sizes)) as advance, without_layers(model, layers):
        for batch in batch_sizes:
            times[batch] = _time_step(model, batch, context, timer)
            advance()
    return times


def measure_plain(
    layers: Sequence[LayerInfo],
    *,
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    journal: Journal,
) -> dict[str, dict[int, float]]:
    """µs of the head and of the embedding in the model's own dtype, by batch size; only of those that are planned.

    Returns:
        By module path.
    """
    found: dict[str, dict[int, float]] = {}
    for path, layer in _plain_layers(layers).items() if batch_sizes else ():
        weight = None
        for batch in batch_sizes:
            if (path, batch) in journal:
                continue
            if weight is None:
                weight = torch.ones(layer.out_features, layer.in_features, device=device, dtype=dtype)
            if path == HEAD:
                call = partial(F.linear, torch.ones(batch, layer.in_features, device=device, dtype=dtype), weight)
            else:
                call = partial(F.embedding, lookup_tokens(batch, layer.out_features, device), weight)
            with torch.inference_mode():
                journal.add((path, batch), timer.measure(call).median_us)
        found[path] = {batch: float(journal[path, batch]) for batch in batch_sizes}
    return found


def _plain_layers(layers: Sequence[LayerInfo]) -> dict[str, LayerInfo]:
    """Head and embedding by module path; one layer may be both."""
    uses = [(path, layer) for layer in layers for path in ([EMBED] * layer.is_embedding + [HEAD] * layer.is_head)]
    return dict(uses)


def _time_step(model: nn.Module, batch: int, context: int, timer: Timer) -> float:
    device = next(model.parameters()).device
    if device.type == "cuda":
        step, reset = _captured_step(model, batch, context)
        return timer.measure(step, before=reset).median_us
    return timer.measure(_plain_step(model, batch, context)).median_us


def _plain_step(model: Any, batch: int, context: int) -> Callable[[], None]:
    """A call that decodes one token for `batch` sequences of `context` tokens, again and again from the same cache."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    prompt = torch.ones(batch, context, dtype=torch.int64, device=device)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def static_step(model: Any, batch: int, context: int) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The same with a static cache, returning the logits, and what puts the cache back before each call."""
    from transformers import StaticCache

    device = next(model.parameters()).device
    prompt = torch.ones(batch, context, dtype=torch.int64, device=device)
    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1].clone()
    lengths = torch.full((len(cache.layers),), context, dtype=torch.int64, device=device)
    for layer, length in zip(cache.layers, lengths.unbind(), strict=True):
        cast(Any, layer).cumulative_length = length  # in one tensor, so that one kernel puts all of them back
    positions = torch.full((batch, 1), context, dtype=torch.int64, device=device)

    sliding = [cast(Any, layer) for layer in cache.layers if hasattr(layer, "cumulative_length_int")]

    def reset() -> None:
        lengths.fill_(context)
        for layer in sliding:  # counts in Python too
            layer.cumulative_length_int = context

    def step() -> Tensor:
        logits: Tensor = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits

    return step, reset


def _captured_step(model: Any, batch: int, context: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """`static_step` in a CUDA graph."""
    step, reset = static_step(model, batch, context)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            reset()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, reset


class without_layers:  # noqa: N801 (a context manager, used as a phrase)
    """Swaps layers for `Zeros` inside a ``with`` block."""

    def __init__(self, model: nn.Module, layers: Sequence[LayerInfo]) -> None:
        dtype = next(model.parameters()).dtype
        self.places = [(*_parent(model, path), module) for path, module in stand_ins(layers, dtype).items()]

    def __enter__(self) -> None:
        self.originals = [getattr(parent, name) for parent, name, _ in self.places]
        for parent, name, module in self.places:
            setattr(parent, name, module)

    def __exit__(self, *_: object) -> None:
        for (parent, name, _module), original in zip(self.places, self.originals, strict=True):
            setattr(parent, name, original)


class Zeros(nn.Module):
    """Stands where a planned layer was and costs nothing: the same zeros for every input of a shape."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self._zeros: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if shape not in self._zeros:
            self._zeros[shape] = x.new_zeros(shape)
        return self._zeros[shape]


class ZeroRows(nn.Module):
    """The same in the place of an embedding: zeros of a dtype, one row for each token."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        self._zeros: dict[tuple[int, ...], Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        shape = (*tokens.shape, self.width)
        if shape not in self._zeros:
            self._zeros[shape] = torch.zeros(shape, dtype=self.dtype, device=tokens.device)
        return self._zeros[shape]


def stand_ins(layers: Sequence[LayerInfo], dtype: torch.dtype) -> dict[str, nn.Module]:
    """By module path, what stands where planned layers were; `dtype` is that of the activations."""
    found: dict[str, nn.Module] = {}
    for layer in layers:
        if layer.is_embedding:
            found[EMBED] = ZeroRows(layer.in_features, dtype)
        if layer.is_head:
            found[HEAD] = Zeros(layer.out_features)
        if not layer.is_embedding and not layer.is_head:
            found[layer.name] = Zeros(layer.out_features)
    return found


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
