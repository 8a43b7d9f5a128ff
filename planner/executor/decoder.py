"""Generation with a static cache and one CUDA graph for a whole decoding step.

    decoder = Decoder(model, batch_size=1, capacity=512)
    texts = decoder.generate([[1, 15, 7]], max_tokens=64)

A prompt runs through the stock model (long inputs dequantize and multiply); then every step is `DecodeStep` with the
choice of the next token, replayed from a graph on CUDA and called as it is on a CPU. Sequences may differ in length:
each has its own positions and no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .decode_step import DecodeStep, KeyValueCache, activation_format
from .errors import CheckpointError

_CHECKED_EVERY = 16
"""Steps between two looks at whether all sequences have ended: a look waits for the device."""
_PARTS = 512
"""Parts of a vocabulary whose maxima are found side by side."""


class Decoder:
    """A model made ready to generate for a number of sequences at once.

    Args:
        model: see `DecodeStep`; on CUDA in fp16 or bf16.
        batch_size: sequences.
        capacity: positions of each, prompt included.
        temperature: 0 takes the likeliest token, else tokens are drawn from softmax(logits / temperature).
        graph: whether steps run from a CUDA graph; None for yes on CUDA.

    Raises:
        CheckpointError: the model is of no known kind, or longer inputs are asked for than it reads.
    """

    def __init__(
        self, model: nn.Module, *, batch_size: int, capacity: int, temperature: float = 0.0, graph: bool | None = None
    ) -> None:
        self.model = cast(Any, model)
        longest = self.model.config.max_position_embeddings
        if not 1 <= capacity <= longest or batch_size < 1 or temperature < 0:
            raise CheckpointError(
                f"expected 1 to {longest} positions, a batch of 1 or more and a temperature of 0 or more; got "
                f"{capacity}, {batch_size} and {temperature:g}."
            )
        device, dtype = activation_format(model)
        self.capacity, self.temperature = capacity, temperature
        self.cache = KeyValueCache(model, batch_size, capacity, dtype, device)
        with torch.inference_mode():
            self._step = DecodeStep(model, self.cache)
            self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
            """The newest token of each sequence, ``(batch,)``."""
            self.positions = torch.full((batch_size,), -1, dtype=torch.int32, device=device)
            """The position before that of the newest token, ``(batch,)``."""
            self.logits: Tensor | None = None
            """What `start` or `advance` last chose tokens from, ``(batch, vocabulary)``; the next overwrites it."""
            self._graph = self._capture() if (device.type == "cuda" if graph is None else graph) else None
        self._longest = 0

    def _advance(self) -> None:
        # positions first: kernels that start early read them, and the lookup of embeddings is an ordinary launch
        self.positions.add_(1)
        self.logits = self._step(self.tokens, self.positions)
        self.tokens.copy_(self._choose(self.logits))

    def _choose(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return likeliest(logits)
        chances = (logits.float() / self.temperature).softmax(-1)
        return (chances / torch.empty_like(chances).exponential_()).argmax(-1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._advance()  # compiles and loads every kernel
            self.positions.fill_(-1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the prompts, one for each sequence, and choose the first new tokens.

        Raises:
            CheckpointError: as many prompts as sequences, each of at least one token and within the capacity.
        """
        lengths = [len(prompt) for prompt in prompts]
        if len(prompts) != self.cache.batch_size or not all(1 <= length < self.capacity for length in lengths):
            raise CheckpointError(
                f"expected {self.cache.batch_size} prompts of 1 to {self.capacity - 1} tokens; got lengths {lengths}."
            )
        together = len(set(lengths)) == 1
        for row, count in [(0, len(prompts))] if together else [(row, 1) for row in range(len(prompts))]:
            tokens = torch.tensor([list(prompt) for prompt in prompts[row : row + count]], device=self.tokens.device)
            logits = self._read(tokens, row)
            if self.logits is None:
                self.logits = logits.new_empty(len(prompts), logits.shape[-1])
            self.logits[row : row + count] = logits
            self.tokens[row : row + count] = self._choose(logits)
        self.positions.copy_(torch.tensor(lengths) - 1)
        self._longest = max(lengths)

    @torch.inference_mode()
    def pretend(self, context: int) -> None:
        """Start from a cache of `context` random positions instead of prompts: for timing.

        Raises:
            CheckpointError: that is more than the capacity.
        """
        if not 1 <= context < self.capacity:
            raise CheckpointError(f"expected a context of 1 to {self.capacity - 1} tokens; got {context}.")
        self.cache.blocks.normal_()
        self.rewind(context)

    @torch.inference_mode()
    def rewind(self, context: int) -> None:
        """Go back to where the cache held `context` positions of each sequence."""
        self.positions.fill_(context - 1)
        self._longest = context

    def _read(self, tokens: Tensor, row: int) -> Tensor:
        """Run ``(sequences, positions)`` tokens through the stock model and keep their keys and values; last logits."""
        from transformers import DynamicCache

        cache = DynamicCache()
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for block, layer in enumerate(cache.layers):
            self.cache.keep(row, block, cast(Any, layer).keys, cast(Any, layer).values)
        return cast(Tensor, output.logits[:, -1])

    @torch.inference_mode()
    def advance(self) -> Tensor:
        """Take the newest tokens in and choose the next ones; ``(batch,)``, overwritten by the next call.

        Raises:
            CheckpointError: the cache is full.
        """
        if self._longest >= self.capacity:
            raise CheckpointError(f"the cache of {self.capacity} positions is full; make a decoder of more.")
        self._longest += 1
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self.tokens

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """What the model adds to each prompt, up to and without a stop token.

        Args:
            max_tokens: at most so many.
            stop: tokens that end a sequence.
        """
        self.start(prompts)
        found = torch.empty(len(prompts), max_tokens, dtype=torch.int64, device=self.tokens.device)
        stops = torch.tensor(list(stop), dtype=torch.int64, device=self.tokens.device)
        count = 0
        while count < max_tokens:
            found[:, count] = self.tokens if count == 0 else self.advance()
            count += 1
            if len(stop) and count % _CHECKED_EVERY == 0 and torch.isin(found[:, :count], stops).any(1).all():
                break
        rows = found[:, :count].tolist()
        return [row[: next((n for n, token in enumerate(row) if token in set(stop)), count)] for row in rows]


def likeliest(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)`` of ``(batch, vocabulary)``, in two steps: torch's own takes one block for a row."""
    size = logits.shape[-1]
    parts = next(count for count in range(min(size, _PARTS), 0, -1) if size % count == 0)
    highest, places = logits.unflatten(-1, (parts, -1)).max(-1)
    part = highest.argmax(-1, keepdim=True)
    chosen: Tensor = part * (size // parts) + places.gather(-1, part)
    return chosen.squeeze(-1)
