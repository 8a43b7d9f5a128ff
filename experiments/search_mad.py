"""Search the constants of the trellis code MAD (`kernels.mad`): multipliers and addends of its hashes, and the scale.

    python -m msq.experiments.search_mad --device cuda --count 400 --seed 1

draws hashes at random and ranks them by their error on N(0,1). Codes of one hash are ranked directly. Of two hashes
there are too many pairs: half of those tried are of two good ones, half of a good one and any other, good being the
best codes of one hash at 4 and 6 bits a pair. The best few are measured again on fresh and more samples, with several
deviations. For each width a line for ``kernels/mad.py`` is printed, with its error and, on the same samples, that of
the code in use.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..kernels.mad import LARGEST_WIDTH, TWO_HASHES_FROM, MadCode, mad_code
from ..kernels.quantizers.codes import mad_points
from ..kernels.quantizers.trellis import TrellisCoder
from ..kernels.specs import DEFAULT_STATE_BITS, Family, QuantizerSpec
from .train_codebooks import NO_TABLE, gaussian_pairs, squared_error

Hash = tuple[int, int]
"""Multiplier and addend."""
_LEAST_WIDTH = 3
_GOOD = {6: 12, 4: 6}
"""Widths whose best hashes make up pairs, and how many of them."""
_REMEASURED = 3
_DEVIATIONS = (-0.06, -0.04, -0.02, 0.0, 0.02, 0.04, 0.06)
"""Tried around that of the code in use."""


@dataclass(frozen=True)
class Settings:
    """What a search depends on.

    Attributes:
        count: hashes drawn.
        pairs: pairs of hashes tried for each width that takes two.
        tiles, test_tiles: of 256 weights, to rank all and to measure the best.
        state_bits: trellis state length.
        seed: of hashes and samples.
        device: where to encode.
    """

    count: int = 400
    pairs: int = 80
    tiles: int = 1024
    test_tiles: int = 8192
    state_bits: int = DEFAULT_STATE_BITS
    seed: int = 0
    device: str = "cpu"


class _Coder(TrellisCoder):
    """A coder of any code of the kind."""

    def __init__(self, code: MadCode, width: int, state_bits: int) -> None:
        super().__init__(QuantizerSpec(Family.TCQ, width / 2, state_bits), width / 2)
        self.gain = code.gain
        self._points = mad_points(code, state_bits)

    def points(self, codebook: Tensor, device: torch.device) -> Tensor:
        return self._points.to(device)


def error_of(code: MadCode, width: int, samples: Tensor, state_bits: int = DEFAULT_STATE_BITS) -> float:
    """Normalised error of a code of `width` bits a pair on ``(tiles, 128, 2)``."""
    wrong = squared_error(_Coder(code, width, state_bits), NO_TABLE, samples)
    return wrong / float(samples.double().square().sum())


class Search:
    """Codes by width; the same ones for the same settings, whichever widths are asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        draws = random.Random(settings.seed)
        self._hashes: list[Hash] = [(draws.getrandbits(32) | 1, draws.getrandbits(32)) for _ in range(settings.count)]
        self._samples = gaussian_pairs(settings.tiles, settings.seed, settings.device)
        self._fresh = gaussian_pairs(settings.test_tiles, settings.seed + 1, settings.device)
        self._ranked_hashes = cache(self._rank_hashes)

    def best(self, width: int) -> tuple[MadCode, float]:
        """The best code of a width, and its error on fresh samples."""
        hashes = [(one,) for one in self._ranked_hashes(width)] if width < TWO_HASHES_FROM else self._rank_pairs(width)
        tried = [
            replace(code, deviation=round(code.deviation + more, 2))
            for code in (_code(width, chosen) for chosen in hashes[:_REMEASURED])
            for more in _DEVIATIONS
        ]
        return min(((code, self.measure(code, width)) for code in tried), key=lambda found: found[1])

    def measure(self, code: MadCode, width: int) -> float:
        """Error on the fresh samples."""
        return error_of(code, width, self._fresh, self._settings.state_bits)

    def _rank_hashes(self, width: int) -> list[Hash]:
        return [chosen for (chosen,) in self._rank(width, [(one,) for one in self._hashes])]

    def _rank_pairs(self, width: int) -> list[tuple[Hash, ...]]:
        good = [one for other, count in _GOOD.items() for one in self._ranked_hashes(other)[:count]]
        draws, pairs = random.Random(self._settings.seed + width), []
        for i in range(self._settings.pairs):
            first = draws.choice(good)
            pairs.append((first, draws.choice([one for one in (good if i % 2 else self._hashes) if one != first])))
        return self._rank(width, pairs)

    def _rank(self, width: int, hashes: Sequence[tuple[Hash, ...]]) -> list[tuple[Hash, ...]]:
        """By error at the deviation in use, the best first."""
        bits = self._settings.state_bits
        return sorted(hashes, key=lambda chosen: error_of(_code(width, chosen), width, self._samples, bits))


def _code(width: int, hashes: tuple[Hash, ...]) -> MadCode:
    """With the deviation of the code in use, of one hash or two."""
    multipliers, addends = zip(*hashes, strict=True)
    return MadCode(multipliers, addends, mad_code(width).deviation)


def found_lines(search: Search, widths: Sequence[int]) -> Iterator[str]:
    """Lines for ``kernels/mad.py``."""
    for width in widths:
        code, error = search.best(width)
        used = search.measure(mad_code(width), width)
        yield (
            f"    {width}: MadCode({code.multipliers}, {code.addends}, {code.deviation:.2f}),  "
            f"# error {error:.6f}; in use {used:.6f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = Settings()
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--count", type=int, default=defaults.count, help="hashes to draw")
    parser.add_argument("--pairs", type=int, default=defaults.pairs, help="pairs of hashes to try for each width")
    parser.add_argument("--tiles", type=int, default=defaults.tiles, help="tiles of 256 weights that rank them")
    parser.add_argument("--test-tiles", type=int, default=defaults.test_tiles, help="tiles that measure the best")
    parser.add_argument("--state-bits", type=int, default=defaults.state_bits)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=list(range(_LEAST_WIDTH, LARGEST_WIDTH + 1)),
        choices=range(_LEAST_WIDTH, LARGEST_WIDTH + 1),
        help="bits of a pair",
    )
    arguments = vars(parser.parse_args())
    widths = arguments.pop("widths")
    for name in ("count", "pairs", "tiles", "test_tiles"):
        if arguments[name] < 2:
            parser.error(f"expected --{name.replace('_', '-')} of at least 2; got {arguments[name]}.")
    for line in found_lines(Search(Settings(**arguments)), widths):
        print(line, flush=True)


if __name__ == "__main__":
    main()
