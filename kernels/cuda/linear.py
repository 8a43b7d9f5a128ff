"""The linear module that runs on the kernels: rotate the input, multiply with the packed weight.

Its buffers are the weight in the kernels' layout, the rotation's tables and a workspace, so it moves between devices
like any module, and on a CPU it runs on the operators' twins. The workspace is shared by all modules of a device: they
must run one after another, on one stream, as the layers of a model do. Models that are to run at the same time get one
each from `separate_workspace`. Codebooks of the same numbers are one tensor on a device, which so stays in its cache
from layer to layer: a kernel decodes nothing before it has read its codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..codebooks import check_levels
from ..errors import KernelError
from ..quantize import QuantizedWeight
from ..specs import QuantizerSpec
from . import ops
from .decode import KERNEL_CODES, new_workspace
from .layout import PreparedWeight, prepare, restore
from .limits import Limits, device_index, device_limits
from .rotation_plan import rotation_tables
from .tuning import launch_for
from .tuning_choice import tune

_workspaces: dict[torch.device, Tensor] = {}
_codebooks: WeakValueDictionary[tuple[torch.device, bytes], Tensor] = WeakValueDictionary()


def shared_codebook(codebook: Tensor) -> Tensor:
    """The one tensor of these numbers on their device; not to be written to."""
    if codebook.device.type == "meta":
        return codebook
    key = (codebook.device, codebook.cpu().numpy().tobytes())
    return _codebooks.setdefault(key, codebook)


class KernelLinear(nn.Module):
    """``y = x W^T + b`` with W packed, on CUDA kernels.

    Args:
        weight: the packed layer, or several stacked by `linear.stack`; `decode.unsupported_reason` says which fit.
        bias: ``(out_features,)`` or None.

    Raises:
        KernelError: the kernels do not know the weight's trellis code.
        QuantizerError: the codebook has other levels than the quantizer stores.
    """

    scales: Tensor
    codebook: Tensor
    bias: Tensor | None
    workspace: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.spec.code not in KERNEL_CODES:
            raise KernelError(
                f"expected a weight of a trellis code that the kernels know ({' or '.join(KERNEL_CODES)}); "
                f"got {weight.spec.label}: use a QuantizedLinear, or quantize with one of these."
            )
        self.spec = weight.spec
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.rotation_seed = weight.rotation_seed
        prepared = prepare(weight)
        self._unit_names = [f"units_{n}" for n in range(len(prepared.units))]
        for name, units in zip(self._unit_names, prepared.units, strict=True):
            self.register_buffer(name, units)
        self.register_buffer("scales", prepared.scales)
        self.register_buffer("codebook", shared_codebook(prepared.codebook))
        self.register_buffer("bias", bias)
        self._table_names: list[str] = []
        if weight.rotation_seed is not None:
            tables = rotation_tables(weight.in_features, weight.rotation_seed, weight.scales.device)
            for name, table in [("signs", tables.signs), *((f"matrix_{n}", t) for n, t in enumerate(tables.matrices))]:
                self.register_buffer(name, table, persistent=False)
                self._table_names.append(name)
        self.register_buffer("workspace", self._shared_workspace(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` fp16 or bf16 -> ``(..., out_features)``; fp32 inside."""
        tables = self.rotation
        return self.product(x if tables is None else torch.ops.msq.rotate(x, *tables))

    @property
    def units(self) -> list[Tensor]:
        """The codes in the kernels' layout, one tensor for each segment (`layout.PreparedWeight`)."""
        return [getattr(self, name) for name in self._unit_names]

    @property
    def rotation(self) -> tuple[Tensor, list[Tensor]] | None:
        """Signs and matrices of the input's rotation, as the operators take them; None where it is not rotated."""
        if not self._table_names:
            return None
        signs, *matrices = [getattr(self, name) for name in self._table_names]
        return signs, matrices

    def product(self, x: Tensor) -> Tensor:
        """`forward` of an input that is rotated already: layers of one input may share its rotation."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        spec = self.spec
        y: Tensor = torch.ops.msq.multiply(
            x,
            self.units,
            self.scales,
            self.codebook,
            bias,
            self.workspace,
            str(spec.family),
            spec.bits,
            spec.state_bits,
        )
        return y

    @property
    def weight(self) -> QuantizedWeight:
        """The packed layer in its stored layout."""
        shape = (self.out_features, self.in_features)
        prepared = PreparedWeight(self.spec, *shape, tuple(self.units), self.scales, self.codebook)
        return restore(prepared, self.rotation_seed)

    def extra_repr(self) -> str:
        return f"{self.spec.label}, in_features={self.in_features}, out_features={self.out_features}"

    def workspace_words(self) -> int:
        """32-bit words of workspace that the decode kernels may want on this module's device."""
        device = self.scales.device
        if device.type != "cuda":
            return 0
        limits = device_limits(device_index(device))
        return _workspace_words(self.spec, self.out_features, self.in_features, limits)

    def _shared_workspace(self) -> Tensor:
        device, words = self.scales.device, self.workspace_words()
        if device not in _workspaces or _workspaces[device].numel() < words:
            _workspaces[device] = new_workspace(words, device)
        return _workspaces[device]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        """Loading writes into buffers: not into a codebook that others share, and none that the kernels can't read."""
        found = state_dict.get(f"{prefix}codebook")
        if found is not None:
            check_levels(self.spec, found)
        self.codebook = self.codebook.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        self.codebook = shared_codebook(self.codebook)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """What every move between devices comes through: buffers move, what modules share is that of the new device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.workspace = self._shared_workspace()
        self.codebook = shared_codebook(self.codebook)
        return self


@cache
def _workspace_words(spec: QuantizerSpec, out_features: int, in_features: int, limits: Limits) -> int:
    words = 0
    shape = (spec, out_features, in_features)
    for batch in range(1, ops.DECODE_LIMIT + 1):
        tuning = tune(*shape, batch, limits)
        launch = None if tuning is None else launch_for(*shape, batch, torch.float16, limits, tuning)
        words = max(words, 0 if launch is None else launch.workspace_words)
    return words


def separate_workspace(model: nn.Module) -> None:
    """Give the kernel modules of a model a workspace of their own, so that it may run while other models do."""
    own: dict[torch.device, Tensor] = {}
    modules = [module for module in model.modules() if isinstance(module, KernelLinear)]
    for module in modules:
        device, words = module.scales.device, module.workspace_words()
        if device not in own or own[device].numel() < words:
            own[device] = new_workspace(words, device)
    for module in modules:
        module.workspace = own[module.scales.device]
