"""A decoder that walks through a model one block at a time, with no more than one block in memory.

The activations of all windows go through block 0, then through block 1, and so on; a block's weights are read from the
safetensors files when it is due and dropped after it. Works on the stock models that `blockwise` works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import CorruptModelError, ProfileError
from .inventory import weight_files
from .models import load_config

_TOKENS_AT_ONCE = 4096
"""Tokens that run through a block together."""


class StreamedModel:
    """The activations of some windows, somewhere on their way through a model.

    Attributes:
        block: the block that runs next; `blocks` where the head is next.
        hidden: what enters it, in batches ``(windows, length, hidden_size)`` on the CPU.
        blocks: how many there are.
    """

    def __init__(
        self, directory: Path, tokens: Tensor, device: torch.device, *, dtype: torch.dtype | None = None
    ) -> None:
        """Embeds the tokens.

        Args:
            tokens: ``(windows, length)`` int64.
            dtype: to compute in; None for float32 on a CPU and as stored on a GPU.

        Raises:
            ProfileError: transformers can't build the model, or a tensor is missing, damaged or not finite.
        """
        from transformers import AutoModelForCausalLM

        config = load_config(directory)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        self.device = device
        self._dtype = torch.float32 if dtype is None and device.type == "cpu" else dtype
        self._decoder = model.model.eval()
        self._files = tensor_files(directory)
        self._directory = directory
        self._load(self._decoder.embed_tokens, "model.embed_tokens.")
        # Rotary frequencies are computed from the config, never stored.
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config=config).to(device)
        self._norm, self._decoder.norm = self._decoder.norm, nn.Identity()
        self.block, self.blocks = 0, len(self._decoder.layers)
        batches = tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1]))
        self._arguments: list[list[dict[str, Any]]] = []
        self.hidden = [self._embed(batch.to(device)) for batch in batches]

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> Tensor:
        """What enters the first block, ``(windows, length, hidden_size)``; keeps every block's keyword arguments."""
        arguments: list[dict[str, Any]] = []

        def pass_on(hidden: Tensor, **keywords: Any) -> Tensor:
            arguments.append(keywords)
            return hidden

        for block in self._decoder.layers:
            block.forward = pass_on
        try:
            hidden: Tensor = self._decoder(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            for block in self._decoder.layers:
                del block.forward
        self._arguments.append(arguments)
        return hidden.cpu()

    def advance(self, watch: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run all windows through the next block; after the last one, through the norm to the head's input.

        Args:
            watch: by module path, what is called with each input ``(windows, length, in_features)`` of that layer.

        Raises:
            ProfileError: a tensor of the block is missing, damaged or not finite, or an activation is not finite.
        """
        if self.block == self.blocks:
            self._watch_head(watch)
            return
        module = self.load_block()
        handles = [
            module.get_submodule(name.removeprefix(self.prefix)).register_forward_pre_hook(_caller(see))
            for name, see in watch.items()
        ]
        for number, left in enumerate(self.run(module, self.hidden)):
            self.hidden[number] = left
        for handle in handles:
            handle.remove()
        self.leave_block()

    @property
    def prefix(self) -> str:
        """What the module paths of the next block begin with."""
        return f"model.layers.{self.block}."

    def load_block(self) -> nn.Module:
        """The next block with its stored weights; `leave_block` drops them.

        Raises:
            ProfileError: a tensor of the block is missing, damaged or not finite.
        """
        module: nn.Module = self._decoder.layers[self.block]
        self._load(module, self.prefix)
        return module

    def leave_block(self) -> None:
        """Drop the block's weights; the one after it is next. `hidden` is the caller's to replace."""
        self._decoder.layers[self.block].to("meta")
        self.block += 1

    def arguments(self, batch: int) -> dict[str, Any]:
        """The keyword arguments of the next block for a batch: positions and mask."""
        return self._arguments[batch][self.block]

    @torch.no_grad()
    def run(self, module: nn.Module, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """What leaves a module in the next block's place, batch by batch, on the CPU.

        Args:
            hidden: a batch each, ``(windows, length, hidden_size)``, as in `hidden`.

        Raises:
            ProfileError: an activation is not finite.
        """
        for number, batch in enumerate(hidden):
            found = module(batch.to(self.device), **self.arguments(number))
            if not torch.isfinite(found).all():
                raise ProfileError(f"block {self.block} gives NaN or infinite activations; the model is broken.")
            yield found.cpu()

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of one of the model's stored tensors."""
        return stored_dtype(self._files, name)

    @torch.no_grad()
    def _watch_head(self, watch: Mapping[str, Callable[[Tensor], None]]) -> None:
        self._load(self._norm, "model.norm.")
        for hidden in self.hidden:
            normed = self._norm(hidden.to(self.device))
            for see in watch.values():
                see(normed)
        self.block += 1

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Give a module of the model its stored tensors, in the dtype to compute in."""
        tensors = {}
        for name in module.state_dict():
            path = self._files.get(prefix + name)
            if path is None:
                raise ProfileError(
                    f"{self._directory} has no tensor '{prefix}{name}'; the model is incomplete, download it again."
                )
            tensor = _read(path, prefix + name)
            tensors[name] = tensor.to(self.device, self._dtype or tensor.dtype)
        module.load_state_dict(tensors, assign=True)


def _caller(see: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: see(inputs[0])


def stored_dtype(files: Mapping[str, Path], name: str) -> torch.dtype:
    """The dtype of a tensor of `tensor_files`."""
    return _read(files[name], name).dtype


def tensor_files(directory: Path) -> dict[str, Path]:
    """The safetensors file of every tensor of a model.

    Raises:
        ProfileError: a file is damaged.
    """
    files: dict[str, Path] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as cause:
            raise ProfileError(
                f"{path} is not a whole safetensors file ({cause}); it may be cut short, download it again."
            ) from cause
    return files


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    if not torch.isfinite(tensor).all():
        raise CorruptModelError(f"'{name}' in {path} holds NaN or infinite numbers; the model is corrupt.")
    return tensor
