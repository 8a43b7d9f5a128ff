"""Ways to write a set of layers as disjoint subsets, each taken from a list of available subsets.

Layers are bits of a Python integer. The search always covers the lowest missing layer next, so every
partition appears once, and remembers the sets of missing layers that led nowhere, so that a dead end is
walked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def partitions(masks: Sequence[int], full: int) -> Iterator[tuple[int, ...]]:
    """Yield every partition of `full` into entries of `masks`.

    Args:
        masks: available subsets as bit masks, each non-zero and inside `full`.
        full: the set to partition.

    Yields:
        positions in `masks`, ascending; partitions come in lexicographic order of their search.
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

    return extend(full, ())


def has_partition(masks: Sequence[int], full: int) -> bool:
    """Whether `full` is a disjoint union of entries of `masks`."""
    return next(partitions(masks, full), None) is not None
