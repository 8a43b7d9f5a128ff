"""Problems to measure solvers with: the published tables under many budgets, and generators for larger models.

Generated tables are synthetic but have the shape of real ones: errors fall as 4^-bits with a family's constant,
sensitivities are lognormal with a trend over depth, latency is a launch plus bytes over bandwidth with a few per
cent of noise per shape and quantizer, and fusing saves launches. Everything is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..planner.budget import parse_budgets
from ..planner.problem_builder import build_problem
from ..profiles.tables import load_profile
from ..solvers.problem import Problem, column_order

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Instance:
    """A named problem, built when asked for.

    Attributes:
        name: such as ``memory=3.25bpw`` or ``deepseek memory=3bpw``.
        build: makes the problem.
    """

    name: str
    build: Callable[[], Problem]


@dataclass(frozen=True)
class Group:
    """A fusion group that appears in every block: (out_features, in_features) of its layers, copies per block."""

    layers: tuple[tuple[int, int], ...]
    copies: int = 1


LLAMA_405B = (
    Group(((16384, 16384), (1024, 16384), (1024, 16384))),
    Group(((16384, 16384),)),
    Group(((53248, 16384), (53248, 16384))),
    Group(((16384, 53248),)),
)
"""Blocks of Llama-3.1-405B, of which there are 126."""

DEEPSEEK_V3 = (
    Group(((1536, 7168),)),
    Group(((24576, 1536),)),
    Group(((576, 7168),)),
    Group(((32768, 512),)),
    Group(((7168, 16384),)),
    Group(((2048, 7168),), copies=256),
    Group(((2048, 7168),), copies=256),
    Group(((7168, 2048),), copies=256),
)
"""MoE blocks of DeepSeek-V3, of which there are 58: latent attention, then gate, up and down of 256 experts."""


def generate(
    groups: tuple[Group, ...],
    blocks: int,
    *,
    quantizers: int = 60,
    bits_per_weight: float | None = 3.0,
    latency: float | None = None,
    seed: int = 0,
) -> Problem:
    """A model of `blocks` equal blocks.

    Args:
        groups: of one block.
        blocks: number of blocks.
        quantizers: choices of each layer, 1.5 to 8 bits, in four families of different error and speed.
        bits_per_weight: caps the memory; None leaves it free.
        latency: caps the latency at this fraction of what all layers take at 4 bits; None leaves it free. Layers
            that have copies count as run by 8 of their 256 experts.
        seed: of sensitivities and latencies.
    """
    random = np.random.default_rng(seed)
    bits = np.linspace(1.5, 8.0, quantizers)
    family = np.arange(quantizers) % 4
    error = np.array([1.13, 1.25, 1.6, 1.9])[family] * 4.0**-bits
    speed = np.array([1.0, 1.05, 1.25, 1.3])[family]
    parts: list[dict[str, npt.NDArray[np.generic]]] = []
    sizes: list[npt.NDArray[np.int64]] = []
    number, weight, four_bit = 0, 0.0, 0.0
    for shape in groups:
        count = blocks * shape.copies
        layers = len(shape.layers)
        weights = np.array([out * into for out, into in shape.layers], dtype=np.float64)
        depth = np.repeat(np.linspace(0.5, -0.5, blocks), shape.copies)
        sensitivity = np.exp(random.normal(-6, 1.0, (count, layers)) + depth[:, None]) * np.sqrt(weights / 1e7)
        share = 8 / 256 if shape.copies > 1 else 1.0
        for mask in range(1, 1 << layers):
            covered = np.array([mask >> i & 1 for i in range(layers)], dtype=bool)
            loss = sensitivity[:, covered].sum(axis=1)[:, None] * error
            size = weights[covered].sum() * bits / 8 + 4096
            time = (2.0 + size / 3e6 / speed) * random.uniform(0.97, 1.03, quantizers)
            if covered.sum() == 1:
                weight += float(weights[covered].sum()) * count
                four_bit += float(2.0 + weights[covered].sum() / 2 / 3e6) * count * share
            parts.append(
                {
                    "group": np.repeat(np.arange(number, number + count), quantizers),
                    "mask": np.full(count * quantizers, mask),
                    "choice": np.tile(np.arange(quantizers), count),
                    "loss": loss.ravel(),
                    "memory": np.tile(size, count),
                    "time": np.tile(time * share, count),
                }
            )
        sizes.append(np.full(count, layers))
        number += count
    column = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = column_order(column["group"], column["mask"])
    caps = {"memory": bits_per_weight and bits_per_weight * weight / 8, "latency@1": latency and latency * four_bit}
    use = {"memory": "memory", "latency@1": "time"}
    names = tuple(name for name, cap in caps.items() if cap)
    return Problem(
        group=column["group"][order],
        mask=column["mask"][order],
        choice=column["choice"][order],
        loss=column["loss"][order],
        usage=np.stack([column[use[name]][order] for name in names]),
        caps=np.array([caps[name] for name in names], dtype=np.float64),
        base=np.zeros(len(names)),
        group_sizes=np.concatenate(sizes),
        resource_names=names,
        choice_names=tuple(f"{'abcd'[kind]}-{rate:.3g}" for kind, rate in zip(family, bits, strict=True)),
    )


def large_instances() -> Iterator[Instance]:
    """Models with up to 2.7 million columns."""
    for name, groups, blocks in (("llama-405b", LLAMA_405B, 126), ("deepseek-v3", DEEPSEEK_V3, 58)):
        model = partial(generate, groups, blocks)
        for bits in (2.5, 3.25):
            yield Instance(f"{name} memory={bits}bpw", partial(model, bits_per_weight=bits))
        yield Instance(f"{name} memory=3.25bpw latency=0.8", partial(model, bits_per_weight=3.25, latency=0.8))


_SELECTIONS: dict[str, dict[str, object]] = {
    "": {},
    "tcq": {"quantizers": "tcq-*,half-tcq-*"},
    "no-cuda-core": {"implementations": ["tensor_core"]},
    "no-fusion": {"fusion": False},
    "no-fusion,no-cuda-core": {"fusion": False, "implementations": ["tensor_core"]},
}


def known_instances(profile: Path) -> Iterator[Instance]:
    """The instances of known_optima.json, by the arguments that it gives."""
    yield from (
        _published(profile, name, budgets, selection)
        for name, budgets, selection in (
            ("A:2.5", ("memory=2.5bpw",), "tcq"),
            ("A:3.25", ("memory=3.25bpw",), "tcq"),
            ("B:200", ("latency=200tps",), ""),
            ("B:200:nocc", ("latency=200tps",), "no-cuda-core"),
            ("B:200:nofuse", ("latency=200tps",), "no-fusion"),
            ("B:250:nofuse:nocc", ("latency=250tps",), "no-fusion,no-cuda-core"),
            ("C:2.9:200", ("memory=2.9bpw", "latency=200tps"), ""),
        )
    )


def published_instances(profile: Path) -> Iterator[Instance]:
    """Budgets from tight to loose on the tables of a profile, alone and joint, for every selection of kernels."""
    memory = [f"memory={bits}bpw" for bits in (2.25, 2.5, 2.75, 2.9, 3.0, 3.25, 3.5, 3.75, 4.0)]
    latency = [f"latency={speed}tps" for speed in (150, 160, 170, 180, 190, 200, 210, 220, 230, 240, 250)]
    joint = [(size, speed) for size in memory[1::2] for speed in latency[::3]]
    for selection in _SELECTIONS:
        for budgets in [(text,) for text in (*memory, *latency)] + joint:
            name = " ".join((*budgets, *((selection,) if selection else ())))
            yield _published(profile, name, budgets, selection)


def _published(profile: Path, name: str, budgets: tuple[str, ...], selection: str) -> Instance:
    def build() -> Problem:
        arguments = _SELECTIONS[selection]
        return build_problem(load_profile(profile), parse_budgets(budgets), **arguments).problem  # type: ignore[arg-type]

    return Instance(name, build)
