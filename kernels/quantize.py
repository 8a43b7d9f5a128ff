"""A weight in, a quantized weight out: rotate, scale rows, encode, pack; and exactly back.

Pure functions on tensors, any torch device. `QuantizedWeight` is what a checkpoint stores of a layer; the values that
`decode` gives are the layer's weights from then on, and every implementation must reproduce them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebooks import check_levels, gaussian_error
from .codebooks import codebook as shipped_codebook
from .errors import QuantizerError
from .hessian import Hessian
from .ldlq import encode_with_feedback, goes_up
from .packing import from_pairs, pack, to_pairs, unpack
from .quantizers.base import PairCoder
from .quantizers.scalar import ScalarCoder
from .quantizers.trellis import TrellisCoder
from .quantizers.vector import VectorCoder
from .rotation import rotate, unrotate
from .specs import TILE, Family, QuantizerSpec

_CLIP_RATIOS = tuple(0.4 + 0.02 * i for i in range(31))
"""Row ranges that `int` tries, relative to the largest weight."""
LARGEST_SCALE = 65504.0
"""Of a row: the largest fp16 number."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One layer, packed.

    Attributes:
        spec: the quantizer.
        out_features, in_features: shape of the weight, without padding.
        rotation_seed: seed of the input rotation; None where the weight is not rotated.
        packed: one uint8 tensor ``(row_tiles, column_tiles, 16 * width)`` per segment of `spec.rates`.
        scales: ``(out_features,)`` fp16.
        codebook: ``spec.codebook_shape`` fp16, empty where the quantizer has none.
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

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""
        packed = tuple(part.to(device) for part in self.packed)
        return replace(self, packed=packed, scales=self.scales.to(device), codebook=self.codebook.to(device))

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
        return [TrellisCoder(spec, rate) for rate in spec.rates]
    if spec.family is Family.VQ:
        return [VectorCoder(int(2 * spec.bits))]
    return [ScalarCoder(int(spec.bits), uniform=spec.family is Family.INT)]


def quantize(
    weight: Tensor,
    spec: QuantizerSpec,
    *,
    rotation_seed: int,
    codebook: Tensor | None = None,
    hessian: Hessian | None = None,
) -> QuantizedWeight:
    """Quantize one weight, data-free or under the Hessian of its inputs.

    Rotated families: rotate the input dimension, divide each row by its root mean square, encode, then refit the row
    scale by least squares. `int` is round-to-nearest on a symmetric grid, the row's range chosen by least squares.
    A Hessian adds error feedback between columns (see `ldlq`), widens the rows' range for it, and weights the least
    squares; the packed format is the same, and so is every bit where the Hessian is the identity.

    Args:
        weight: ``(out_features, in_features)``, any float dtype.
        rotation_seed: seed of the signs; ignored by `int`, which is not rotated.
        codebook: table to use instead of the shipped one.
        hessian: of the inputs, in the basis of `rotation_seed` (for `int` also in the model's own); None for data-free.

    Raises:
        QuantizerError: the weight is not a finite matrix, a row is too large for an fp16 scale, the Hessian is for
            another size or rotation, or the codebook has levels that the quantizer can't store.
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
    if hessian is not None:
        _check_basis(hessian, spec, weight.shape[1], rotation_seed)
    table = shipped_codebook(spec) if codebook is None else codebook
    check_levels(spec, table)
    table = table.to(weight.device)
    if spec.family is Family.INT:
        seed, hessian = None, hessian and hessian.unrotated()
        scales = _best_int_steps(values, int(spec.bits), hessian)
    else:
        seed, values = rotation_seed, rotate(values, rotation_seed)
        scales = values.square().mean(dim=1).sqrt() * _target_rms(spec, hessian)
    if float(scales.max()) > LARGEST_SCALE:
        raise QuantizerError(
            f"expected row scales up to {LARGEST_SCALE:.0f} (fp16); a row needs {float(scales.max()):.3g}: "
            "rescale the weight."
        )
    scales = scales.half()
    rows, columns = values.shape
    divisor = scales.float().unsqueeze(1)
    unit = torch.where(divisor > 0, values / divisor, 0.0)
    segments, tiles = coders(spec), spec.segment_tiles(columns)
    if hessian is None:
        codes = [
            coder.encode(pairs.flatten(0, 1), table).unflatten(0, pairs.shape[:2])
            for pairs, coder in zip(to_pairs(unit).split(tiles, dim=1), segments, strict=True)
        ]
    else:
        codes = encode_with_feedback(unit, segments, tiles, table, hessian)
    packed = tuple(pack(part, coder.width) for part, coder in zip(codes, segments, strict=True))
    draft = QuantizedWeight(spec, rows, columns, seed, packed, scales, table)
    unit_values = decode_unit(draft)
    weighted = unit_values if hessian is None else unit_values @ hessian.matrix.to(unit_values.device)
    return replace(draft, scales=least_squares_scales(values, unit_values, weighted))


def least_squares_scales(values: Tensor, unit_values: Tensor, weighted: Tensor) -> Tensor:
    """Row scales of least squared error, ``(out_features,)`` fp16; 0 where a row decodes to zeros.

    Args:
        values: what is approximated, ``(out_features, in_features)``.
        unit_values: the decoded codes, of the same shape.
        weighted: these times the Hessian, or alone.
    """
    power = (unit_values * weighted).sum(dim=1)
    scales = torch.where(power > 0, (values * weighted).sum(dim=1) / power, 0.0)
    return scales.clamp(0, LARGEST_SCALE).half()


def _target_rms(spec: QuantizerSpec, hessian: Hessian | None) -> float:
    """Root mean square of what is encoded, relative to the weights: feedback adds to them, at most as much again."""
    if hessian is None:
        return 1.0
    error = gaussian_error(spec)
    error = 2 ** (-2 * spec.bits) if error is None else error
    parts = coders(spec)
    return math.sqrt(1 + min(1.0, error * hessian.feedback_power(parts[0].block, ascending=goes_up(parts))))


def _check_basis(hessian: Hessian, spec: QuantizerSpec, in_features: int, rotation_seed: int) -> None:
    own_basis = spec.family is Family.INT and hessian.rotation_seed is None
    if hessian.size != in_features or not (own_basis or hessian.rotation_seed == rotation_seed):
        raise QuantizerError(
            f"expected a Hessian of {in_features} inputs rotated by the seed {rotation_seed}; got {hessian.size} "
            f"inputs and the seed {hessian.rotation_seed}: collect it for this model and seed."
        )


def _best_int_steps(values: Tensor, bits: int, hessian: Hessian | None) -> Tensor:
    """Row steps of least squared error, each column weighted by H's diagonal, over clip ratios, ``(out_features,)``."""
    importance = values.new_ones(()) if hessian is None else hessian.matrix.diagonal().to(values.device)
    half = ((1 << bits) - 1) / 2
    largest = values.abs().amax(dim=1)
    best_step, best_error = largest / half, torch.full_like(largest, torch.inf)
    for ratio in _CLIP_RATIOS:
        step = (largest * ratio / half).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        rounded = ((values / step + half).round().clamp(0, 2 * half) - half) * step
        error = ((rounded - values).square() * importance).sum(dim=1)
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


def decode_rows(weight: QuantizedWeight, rows: Tensor) -> Tensor:
    """Some rows of `decode`, ``(..., in_features)`` float32.

    Rows of tiles are decoded whole, and all of them where that is less work.

    Args:
        rows: ``(...)`` int64; one that the weight lacks is an IndexError on a CPU.
    """
    scales = F.embedding(rows, weight.scales.float().unsqueeze(1))
    if rows.numel() >= weight.packed[0].shape[0]:
        return F.embedding(rows, decode_unit(weight)) * scales
    tiles = (rows // TILE).flatten()
    packed = tuple(part[tiles] for part in weight.packed)
    units = decode_unit(replace(weight, out_features=TILE * len(tiles), packed=packed))
    places = TILE * torch.arange(len(tiles), device=rows.device) + (rows % TILE).flatten()
    return units[places].view(*rows.shape, weight.in_features) * scales


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The layer's weights in the model's own domain, ``(out_features, in_features)`` float32."""
    decoded = decode(weight)
    return decoded if weight.rotation_seed is None else unrotate(decoded, weight.rotation_seed)


def normalized_error(original: Tensor, weight: QuantizedWeight, hessian: Hessian | None = None) -> float:
    """``|W - Q(W)|^2 / |W|^2``, or ``tr((W - Q) H (W - Q)^T) / |W|^2`` with H of mean diagonal 1; float64 sums.

    An all-zero weight has an error of 0.

    Args:
        original: the weight that was quantized, ``(out_features, in_features)``.
        hessian: of its inputs, in any basis.
    """
    values = original.detach().float()
    if not values.any():
        return 0.0
    if hessian is not None:
        errors = dequantize(weight) - values
        turned = errors if hessian.rotation_seed is None else rotate(errors, hessian.rotation_seed)
        return hessian.weigh(turned) / float(values.double().square().sum())
    if weight.rotation_seed is not None:
        values = rotate(values, weight.rotation_seed)
    return float((decode(weight) - values).double().square().sum()) / float(values.double().square().sum())
