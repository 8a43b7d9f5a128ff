"""What a decoding step takes beside the planned layers: attention, norms, embeddings, and launches between them.

Here every planned layer of the stock model is replaced by one that returns zeros; on a GPU the step is captured in a
CUDA graph with a static cache. An executor that fuses more takes less: it brings a `StepOverhead` of its own. The head,
where it is a planned layer, is timed by itself too, for plans that leave it out.
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
from .progress import progress
from .schema import HEAD
from .timing import Timer


class StepOverhead(Protocol):
    """Another way to measure overheads, such as that of an executor that fuses more than the stock model.

    Attributes:
        method: what a profile calls it.
    """

    method: str

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


def measure_head(
    layers: Sequence[LayerInfo],
    *,
    batch_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    journal: Journal,
) -> dict[int, float] | None:
    """µs of the head in the model's own dtype, by batch size; None where it is not a planned layer."""
    head = next((layer for layer in layers if layer.role == HEAD), None)
    if head is None or not batch_sizes:
        return None
    weight = None
    with torch.inference_mode():
        for batch in batch_sizes:
            if ("head", batch) in journal:
                continue
            if weight is None:
                weight = torch.ones(head.out_features, head.in_features, device=device, dtype=dtype)
            x = torch.ones(batch, head.in_features, device=device, dtype=dtype)
            journal.add(("head", batch), timer.measure(partial(F.linear, x, weight)).median_us)
    return {batch: float(journal["head", batch]) for batch in batch_sizes}


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
        self.places = [(*_parent(model, layer.name), layer.out_features) for layer in layers]

    def __enter__(self) -> None:
        self.originals = [getattr(parent, name) for parent, name, _ in self.places]
        for parent, name, rows in self.places:
            setattr(parent, name, Zeros(rows))

    def __exit__(self, *_: object) -> None:
        for (parent, name, _rows), original in zip(self.places, self.originals, strict=True):
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


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
