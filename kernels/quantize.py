"""A weight in, a quantized weight out: rotate, scale rows, encode, pack; and exactly back.

Pure functions on tensors, any torch device. `QuantizedWeight` is what a checkpoint stores of a layer; the values that
`decode` gives are the layer's weights from then on, and every implementation must reproduce them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codebooks import codebook as shipped_codebook
from .errors import QuantizerError
from .packing import from_pairs, pack, to_pairs, unpack
from .quantizers.base import PairCoder
from .quantizers.scalar import ScalarCoder
from .quantizers.trellis import TrellisCoder
from .quantizers.vector import VectorCoder
from .rotation import rotate, unrotate
from .specs import TILE, Family, QuantizerSpec

_CLIP_RATIOS = tuple(0.4 + 0.02 * i for i in range(31))
"""Row ranges that `int` tries, relative to the largest weight."""
_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class QuantizedWeight:
    """One layer, packed.

    Attributes:
        spec: the quantizer.
        out_features, in_features: shape of the weight, without padding.
        rotation_seed: seed of the input rotation; None where the weight is not rotated.
        packed: one uint8 tensor ``(row_tiles, column_tiles, 16 * width)`` per segment of `spec.rates`.
        scales: ``(out_features,)`` fp16.
        codebook: ``spec.codebook_shape`` fp16, empty for `int`.
    """

    spec: QuantizerSpec
    out_features: int
    in_features: int
    rotation_seed: int | None
    packed: tuple[Tensor, ...]
    scales: Tensor
    codebook: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as a checkpoint stores them; an empty codebook is left out."""
        yield from zip(packed_names(self.spec), self.packed, strict=True)
        yield "scales", self.scales
        if self.codebook.numel():
            yield "codebook", self.codebook

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors; equals ``spec.size_bytes(out_features, in_features)``."""
        return sum(t.numel() * t.element_size() for _, t in self.tensors())


def packed_names(spec: QuantizerSpec) -> tuple[str, ...]:
    """Tensor names of the packed segments, low rate first."""
    return ("packed",) if len(spec.rates) == 1 else ("packed_low", "packed_high")


def tensor_shapes(
    spec: QuantizerSpec, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a layer, by name."""
    row_tiles = -(-out_features // TILE)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: ((row_tiles, tiles, int(32 * rate)), torch.uint8)
        for name, tiles, rate in zip(packed_names(spec), spec.segment_tiles(in_features), spec.rates, strict=True)
    }
    shapes["scales"] = ((out_features,), torch.float16)
    if spec.table_bytes:
        shapes["codebook"] = (spec.codebook_shape, torch.float16)
    return shapes


def from_tensors(
    spec: QuantizerSpec,
    out_features: int,
    in_features: int,
    rotation_seed: int | None,
    tensors: Mapping[str, Tensor],
) -> QuantizedWeight:
    """A layer from its stored tensors.

    Raises:
        QuantizerError: a tensor is missing or has another shape or dtype than the quantizer implies.
    """
    for name, (shape, dtype) in tensor_shapes(spec, out_features, in_features).items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            got = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise QuantizerError(
                f"{spec.label} of a {out_features}x{in_features} layer needs '{name}' of shape {shape} {dtype}; "
                f"got {got}."
            )
    packed = tuple(tensors[name] for name in packed_names(spec))
    return QuantizedWeight(
        spec,
        out_features,
        in_features,
        rotation_seed,
        packed,
        tensors["scales"],
        tensors.get("codebook", torch.empty(spec.codebook_shape, dtype=torch.float16)),
    )


def coders(spec: QuantizerSpec) -> list[PairCoder]:
    """One coder per segment."""
    if spec.has_trellis:
        return [TrellisCoder(int(2 * rate), spec.state_bits) for rate in spec.rates]
    if spec.family is Family.VQ:
        return [VectorCoder(int(2 * spec.bits))]
    return [ScalarCoder(int(spec.bits), uniform=spec.family is Family.INT)]


def quantize(
    weight: Tensor, spec: QuantizerSpec, *, rotation_seed: int, codebook: Tensor | None = None
) -> QuantizedWeight:
    """Quantize one weight, data-free.

    Rotated families: rotate the input dimension, divide each row by its root mean square, encode, then refit the row
    scale by least squares. `int` is round-to-nearest on a symmetric grid, the row's range chosen by least squares.

    Args:
        weight: ``(out_features, in_features)``, any float dtype.
        rotation_seed: seed of the signs; ignored by `int`, which is not rotated.
        codebook: table to use instead of the shipped one.

    Raises:
        QuantizerError: the weight is not a finite matrix, or a row is too large for an fp16 scale.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise QuantizerError(
            f"expected a floating-point weight (out_features, in_features); got {tuple(weight.shape)} {weight.dtype}."
        )
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise QuantizerError(
            f"expected finite weights; {bad} of {values.numel()} are NaN or infinite: the model is corrupt."
        )
    table = shipped_codebook(spec) if codebook is None else codebook
    table = table.to(weight.device)
    if spec.family is Family.INT:
        seed, scales = None, _best_int_steps(values, int(spec.bits))
    else:
        seed, values = rotation_seed, rotate(values, rotation_seed)
        scales = values.square().mean(dim=1).sqrt()
    if float(scales.max()) > _LARGEST_FP16:
        raise QuantizerError(
            f"expected row scales up to {_LARGEST_FP16:.0f} (fp16); a row needs {float(scales.max()):.3g}: "
            "rescale the weight."
        )
    scales = scales.half()
    rows, columns = values.shape
    divisor = scales.float().unsqueeze(1)
    unit = torch.where(divisor > 0, values / divisor, 0.0)
    packed = []
    for pairs, coder in zip(to_pairs(unit).split(spec.segment_tiles(columns), dim=1), coders(spec), strict=True):
        codes = coder.encode(pairs.flatten(0, 1), table).unflatten(0, pairs.shape[:2])
        packed.append(pack(codes, coder.width))
    draft = QuantizedWeight(spec, rows, columns, seed, tuple(packed), scales, table)
    unit_values = decode_unit(draft)
    power = unit_values.square().sum(dim=1)
    refit = torch.where(power > 0, (values * unit_values).sum(dim=1) / power, 0.0)
    return QuantizedWeight(spec, rows, columns, seed, draft.packed, refit.clamp(0, _LARGEST_FP16).half(), table)


def _best_int_steps(values: Tensor, bits: int) -> Tensor:
    """Row steps of least squared error over a grid of clip ratios, ``(out_features,)``."""
    half = ((1 << bits) - 1) / 2
    largest = values.abs().amax(dim=1)
    best_step, best_error = largest / half, torch.full_like(largest, torch.inf)
    for ratio in _CLIP_RATIOS:
        step = (largest * ratio / half).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        rounded = ((values / step + half).round().clamp(0, 2 * half) - half) * step
        error = (rounded - values).square().sum(dim=1)
        better = error < best_error
        best_step = torch.where(better, step.squeeze(1), best_step)
        best_error = torch.where(better, error, best_error)
    return torch.where(largest > 0, best_step, 0.0)


def decode_unit(weight: QuantizedWeight) -> Tensor:
    """The decoded codes before the row scale, ``(out_features, in_features)`` float32."""
    segments = [
        coder.decode(unpack(packed, coder.width), weight.codebook)
        for packed, coder in zip(weight.packed, coders(weight.spec), strict=True)
    ]
    return from_pairs(torch.cat(segments, dim=1), weight.out_features, weight.in_features)


def decode(weight: QuantizedWeight) -> Tensor:
    """The layer's weights in the rotated domain, ``(out_features, in_features)`` float32: code value x row scale."""
    return decode_unit(weight) * weight.scales.float().unsqueeze(1)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The layer's weights in the model's own domain, ``(out_features, in_features)`` float32."""
    decoded = decode(weight)
    return decoded if weight.rotation_seed is None else unrotate(decoded, weight.rotation_seed)


def normalized_error(original: Tensor, weight: QuantizedWeight) -> float:
    """``|W - Q(W)|^2 / |W|^2`` in the rotated domain, float64 sums; 0 for an all-zero weight.

    Args:
        original: the weight that was quantized, ``(out_features, in_features)``.
    """
    values = original.detach().float()
    if weight.rotation_seed is not None:
        values = rotate(values, weight.rotation_seed)
    power = float(values.double().square().sum())
    return float((decode(weight) - values).double().square().sum()) / power if power else 0.0
