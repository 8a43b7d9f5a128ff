"""A plan as a map in the terminal: a row a block, a column a layer, colours from few bits to many."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..kernels.specs import Family
from ..planner.plan import Plan, PlannedLayer

_COLOURS = ("#3b4cc0", "#6788ee", "#9abbff", "#c9d7f0", "#edd1c2", "#f7a889", "#e26952", "#b40426")
"""Cold for few bits, hot for many (Moreland's diverging map)."""
_FEWEST, _MOST = 1.5, 5.5


_SHORT = {Family.HALF_TCQ: "half"}
"""Families whose name is too long for a cell of the map."""


def plan_map(plan: Plan) -> Table:
    """The map, 76 columns wide for the seven layers of a dense block; layers outside the blocks are in the caption."""
    by_block: dict[str, dict[str, PlannedLayer]] = {}
    caption = Text("+ runs as one kernel with a layer to its left; half is half-tcq")
    for entry in plan.layers:
        block, role = _place(entry.layer)
        if block:
            by_block.setdefault(block, {})[role] = entry
        else:
            caption = Text(f"{role}").append(_cell(plan, entry)).append("\n").append(caption)
    roles = list(dict.fromkeys(role for layers in by_block.values() for role in layers))
    table = Table(
        title=f"{plan.model.name}: family and bits of every layer",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=0,
    )
    table.add_column("block", justify="right")
    for role in roles:
        table.add_column(" " + role.removesuffix("_proj"), min_width=10, no_wrap=True)
    for block, layers in by_block.items():
        table.add_row(block, *(_cell(plan, layers.get(role)) for role in roles))
    return table


def _place(layer: str) -> tuple[str, str]:
    """Block and role in a module path such as ``model.layers.3.mlp.up_proj``."""
    parts = layer.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    return block, parts[-1]


def _cell(plan: Plan, entry: PlannedLayer | None) -> Text:
    if entry is None:
        return Text("")
    quantizer = plan.quantizers[entry.quantizer]
    share = min(max((quantizer.bits - _FEWEST) / (_MOST - _FEWEST), 0.0), 1.0)
    colour = _COLOURS[round(share * (len(_COLOURS) - 1))]
    joined = "+" if entry.layer != entry.pattern[0] else " "
    return Text(f"{joined}{_SHORT.get(quantizer.family, quantizer.family)} {quantizer.bits:g}", style=colour)
