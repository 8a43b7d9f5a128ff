"""Words that users type for a profile, checked."""

from __future__ import annotations

import difflib

from ..kernels.specs import QuantizerSpec, default_palette, match_labels
from .errors import ProfileError
from .schema import LossMethod

_LOSS_METHODS = {
    "data-free": LossMethod.DATA_FREE_KL,
    "calibration": LossMethod.CALIBRATION_KL,
    "fisher": LossMethod.FISHER,
    "direct": LossMethod.DIRECT,
}


def parse_loss_method(text: str) -> LossMethod:
    """``data-free``, ``calibration``, ``fisher`` or ``direct``.

    Raises:
        ProfileError: none of them.
    """
    if text not in _LOSS_METHODS:
        close = difflib.get_close_matches(text, _LOSS_METHODS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(_LOSS_METHODS)}."
        raise ProfileError(f"unknown loss method '{text}'; {hint}")
    return _LOSS_METHODS[text]


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """``1,8`` or ``none``.

    Raises:
        ProfileError: not whole numbers.
    """
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as cause:
        raise ProfileError(f'expected batch sizes such as "1,8", or "none"; got "{text}".') from cause


def parse_palette(globs: str | None, state_bits: int) -> tuple[QuantizerSpec, ...]:
    """The quantizers that globs on labels select; all without globs.

    A glob without a trellis length matches every length: ``tcq-3`` selects ``tcq-3-L12`` when L is 12.

    Raises:
        QuantizerError: a glob selects nothing, or the trellis length doesn't fit.
    """
    by_label = {spec.label: spec for spec in default_palette(state_bits)}
    if globs is None:
        return tuple(by_label.values())
    suffix = f"-L{state_bits}"
    plain = {label.removesuffix(suffix): spec for label, spec in by_label.items()}
    chosen = set(match_labels([*plain, *(label for label in by_label if label not in plain)], globs))
    return tuple(spec for label, spec in by_label.items() if chosen & {label, label.removesuffix(suffix)})
