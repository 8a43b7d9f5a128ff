"""Ways to write a set of layers as disjoint subsets, each taken from a list of available subsets.

Layers are bits of a Python integer. The search always covers the lowest missing layer next, so every
partition appears once, and remembers the sets of missing layers that led nowhere, so that a dead end is
walked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .errors import SolverError

MAX_DEAD_ENDS = 100_000
"""Sets of layers that lead nowhere, after which the search is given up."""


def partitions(masks: Sequence[int], full: int) -> Iterator[tuple[int, ...]]:
    """Yield every partition of `full` into entries of `masks`.

    Args:
        masks: available subsets as bit masks, each non-zero and inside `full`.
        full: the set to partition.

    Yields:
        positions in `masks`, ascending; partitions come in lexicographic order of their search.

    Raises:
        SolverError: the search runs into too many dead ends.
    """
    by_lowest: dict[int, list[int]] = {}
    for position, mask in enumerate(masks):
        by_lowest.setdefault(mask & -mask, []).append(position)
    dead: set[int] = set()

    def extend(missing: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if missing == 0:
            yield tuple(sorted(chosen))
            return
        if missing in dead:
            return
        found = False
        for position in by_lowest.get(missing & -missing, ()):
            if masks[position] & ~missing == 0:
                for partition in extend(missing & ~masks[position], (*chosen, position)):
                    found = True
                    yield partition
        if not found:
            dead.add(missing)
            if len(dead) > MAX_DEAD_ENDS:
                raise SolverError(
                    f"the columns of a group of {full.bit_length()} layers can be combined in too many ways to tell "
                    "whether they cover it; offer every layer alone, or fewer patterns"
                )

    return extend(full, ())


def has_partition(masks: Sequence[int], full: int) -> bool:
    """Whether `full` is a disjoint union of entries of `masks`; raises as `partitions` does."""
    return next(partitions(masks, full), None) is not None
