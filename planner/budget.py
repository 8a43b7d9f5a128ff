"""Budgets as users write them: ``memory=3.25bpw``, ``memory=4.2GiB``, ``latency=5ms@8``, ``latency=200tps``.

A memory budget caps the bytes of the planned layers, tables and scales included. A latency budget caps
the time of one decoding step at a batch size (1 unless ``@batch`` says otherwise); tokens per second count
the whole batch, so ``200tps@8`` allows 8 / 200 s a step.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Literal

from .errors import PlanError

_MEMORY = {"b": 1.0, "bytes": 1.0}
_MEMORY |= {f"{prefix}b": 1e3**power for power, prefix in enumerate("kmgt", start=1)}
_MEMORY |= {f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgt", start=1)}
_LATENCY = {"us": 1.0, "μs": 1.0, "ms": 1e3, "s": 1e6}  # μ: the Greek letter, to which the micro sign folds
_SPELLING = {"memory": "bpw, GiB, MiB, KiB, GB, MB, KB or B", "latency": "ms, us, s or tps (tokens per second)"}
_EXAMPLE = 'such as "memory=3.25bpw", "memory=4.2GiB", "latency=5ms" or "latency=200tps@8"'
_LEAST_PLAIN_BYTES = 1024
"""A smaller number without a unit was meant as GiB or bits per weight."""
_AMOUNT = re.compile(
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?nan|[+-]?inf(?:inity)?)\s*(?P<unit>[^\W\d]*)"
)


@dataclass(frozen=True)
class Budget:
    """A cap on one resource.

    Attributes:
        resource: what is capped.
        cap: bytes or microseconds; None for bits per weight before `resolve`.
        batch_size: tokens decoded together, for latency.
        text: as the user wrote it.
        value: the number in `text`.
        unit: the unit in `text`, lower case; "" for plain bytes.
    """

    resource: Literal["memory", "latency"]
    cap: float | None
    batch_size: int | None
    text: str
    value: float
    unit: str

    @property
    def name(self) -> str:
        """The resource as problems and plans name it: ``memory``, ``latency@8``."""
        return "memory" if self.batch_size is None else f"latency@{self.batch_size}"

    def resolve(self, total_weights: int) -> Budget:
        """The same budget with its cap in bytes; bits per weight need the planned layers' number of weights."""
        return replace(self, cap=self.value * total_weights / 8) if self.unit == "bpw" else self

    def in_unit(self, amount: float) -> str:
        """An amount of the resource (bytes or µs) in the user's unit, four digits, rounded to the loose side.

        A budget written with this number can be met by a plan that uses `amount`.
        """
        if self.cap is None:
            raise PlanError(f'the budget "{self.text}" has no cap yet; resolve it first.')
        if self.unit == "tps":
            return f"{_four_digits(self.value * self.cap / amount, ROUND_FLOOR)}tps"
        unit = _printed(self.unit)
        return f"{_four_digits(self.value * amount / self.cap, ROUND_CEILING)}{unit}"


def parse_budget(text: str) -> Budget:
    """One budget.

    Raises:
        PlanError: not ``resource=amount``, an unknown resource or unit, a number that is not positive and
            finite, a batch size where none belongs.
    """
    resource, equals, right = (part.strip() for part in text.partition("="))
    name = resource.casefold()
    if not equals or not right:
        raise PlanError(f'expected a budget {_EXAMPLE}; got "{text}".')
    if name == "memory":
        return _memory(text, right)
    if name == "latency":
        return _latency(text, right)
    near = difflib.get_close_matches(name, _SPELLING, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "budgets are on memory or latency."
    raise PlanError(f'"{text}" caps the unknown resource "{resource}"; {hint}')


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Several budgets, at most one for each resource and batch size.

    Raises:
        PlanError: see `parse_budget`; none given, or two on the same resource and batch size.
    """
    budgets = tuple(parse_budget(text) for text in texts)
    check_distinct(budgets)
    return budgets


def check_distinct(budgets: tuple[Budget, ...]) -> None:
    """Refuses no budget at all, and two on the same resource and batch size."""
    if not budgets:
        raise PlanError(f"expected at least one budget {_EXAMPLE}; got none.")
    seen: dict[str, Budget] = {}
    for budget in budgets:
        if budget.name in seen:
            raise PlanError(
                f'"{seen[budget.name].text}" and "{budget.text}" both cap {budget.name}; keep the tighter one.'
            )
        seen[budget.name] = budget


def _memory(text: str, right: str) -> Budget:
    if "@" in right:
        raise PlanError(f'"{text}": memory does not depend on the batch size; leave out "@{right.split("@")[1]}".')
    value, unit = _amount(text, right, "memory")
    if unit == "bpw":
        return Budget("memory", None, None, text, value, unit)
    scale = _MEMORY.get(unit or "b")
    meant_another_unit = not unit and (value < _LEAST_PLAIN_BYTES or value != int(value))
    if scale is None or meant_another_unit:
        raise _unit_error(text, unit, "memory")
    return Budget("memory", _finite(text, value * scale), None, text, value, unit)


def _latency(text: str, right: str) -> Budget:
    amount, at, batch = (part.strip() for part in right.partition("@"))
    if at and not re.fullmatch(r"0*[1-9][0-9]{0,8}", batch):
        raise PlanError(f'"{text}": the batch size after @ should be a whole number of at least 1; got "{batch}".')
    batch_size = int(batch) if at else 1
    value, unit = _amount(text, amount, "latency")
    if unit == "tps":
        return Budget("latency", _finite(text, batch_size * 1e6 / value), batch_size, text, value, unit)
    if unit not in _LATENCY:
        raise _unit_error(text, unit, "latency")
    return Budget("latency", _finite(text, value * _LATENCY[unit]), batch_size, text, value, unit)


def _amount(text: str, right: str, resource: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(right.casefold())
    if match is None:
        raise PlanError(f'"{text}": expected a number and a unit ({_SPELLING[resource]}); got "{right}".')
    value = float(match["number"])
    if not value > 0 or math.isinf(value):
        raise PlanError(f'"{text}": the amount should be positive and finite; got {match["number"]}.')
    return value, match["unit"]


def _finite(text: str, cap: float) -> float:
    if not 0 < cap < math.inf:
        raise PlanError(f'"{text}": the amount is out of range; give a number closer to what a model needs.')
    return cap


def _unit_error(text: str, unit: str, resource: str) -> PlanError:
    problem = f'unknown unit "{unit}"' if unit else "the unit is missing"
    return PlanError(f'"{text}": {problem}; {resource} is given in {_SPELLING[resource]}.')


def _printed(unit: str) -> str:
    """A unit as people spell it."""
    if unit in ("", "b", "bytes"):
        return "B"
    if unit in _MEMORY:
        return unit[0].upper() + ("iB" if unit.endswith("ib") else "B")
    return "us" if unit == "μs" else unit


def _four_digits(value: float, rounding: str) -> str:
    """Four significant digits, whole numbers in full, rounded as told; plain notation."""
    number = Decimal(value)
    step = Decimal(1).scaleb(min(number.adjusted() - 3, 0))
    rounded = number.quantize(step, rounding=rounding)
    return f"{rounded.normalize():f}"
