"""Words that users type for a profile, checked."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import replace

from ..kernels.specs import (
    DEFAULT_STATE_BITS,
    LEAST_STATE_BITS,
    QuantizerSpec,
    default_palette,
    every_quantizer,
    match_labels,
)
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
        ProfileError: not whole numbers of at least 1, or one is there twice.
    """
    if text.strip().lower() == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(sizes) != len(parts) or len(set(sizes)) != len(sizes) or 0 in sizes:
        raise ProfileError(f'expected distinct batch sizes of at least 1, such as "1,8", or "none"; got "{text}".')
    return sizes


def parse_palette(globs: str | None, state_bits: int) -> tuple[QuantizerSpec, ...]:
    """The quantizers that globs on labels select, of all that ship; the default palette without globs.

    A glob that matches quantizers of the default palette selects those; one that matches none selects among all that
    ship (``half-tcq-*.?[27]5``, ``tcq-*-hyb``, ``tcq-4-hyb-T12``). A glob without a trellis length matches every
    length: ``tcq-3`` selects ``tcq-3-L12`` when L is 12.

    Raises:
        QuantizerError: a glob selects nothing, or the trellis length doesn't fit what is selected.
        ProfileError: it fits no quantizer at all.
    """
    if not LEAST_STATE_BITS <= state_bits <= DEFAULT_STATE_BITS:
        raise ProfileError(
            f"expected a trellis state of {LEAST_STATE_BITS} to {DEFAULT_STATE_BITS} bits; got {state_bits}."
        )
    if globs is None:
        return default_palette(state_bits)
    usual, every = _names(default_palette(), state_bits), _names(every_quantizer(), state_bits)
    chosen: set[QuantizerSpec] = set()
    for glob in globs.split(","):
        names = usual if any(fnmatch.fnmatchcase(name, glob.strip()) for name in usual) else every
        chosen |= {names[name] for name in match_labels(list(names), glob)} if glob.strip() else set()
    if not chosen:
        match_labels(list(every), globs)  # says what was expected
    found = (spec for spec in dict.fromkeys(every.values()) if spec in chosen)
    return tuple(replace(spec, state_bits=state_bits) if spec.has_trellis else spec for spec in found)


def _names(specs: tuple[QuantizerSpec, ...], state_bits: int) -> dict[str, QuantizerSpec]:
    """Specs of the default trellis length by what users may call them: without the asked length, and with it."""
    return {spec.label: spec for spec in specs} | {spec.label_with(state_bits): spec for spec in specs}
