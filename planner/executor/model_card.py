"""The README.md of a checkpoint: what it is and how to run it."""

from __future__ import annotations

import json
from collections import Counter

from ..plan import Plan


def model_card(plan: Plan) -> str:
    """Markdown for people who find the checkpoint without knowing msq."""
    counts = Counter(entry.quantizer for entry in plan.layers)
    rows = "\n".join(f"| {label} | {count} |" for label, count in sorted(counts.items()))
    budgets = ", ".join(f"`{budget.text}`" for budget in plan.budgets)
    return f"""---
base_model: {json.dumps(plan.model.name)}
library_name: msq
tags: [msq, quantized]
---
# {plan.model.name}, mixed-scheme quantized

Made by msq {plan.msq_version} for the budget {budgets}: the planned layers take
{plan.promised.memory_bytes} bytes, {plan.promised.bits_per_weight:.3f} bits per weight. `plan.yaml` has every layer's
quantizer and what was promised; `msq.yaml` has a digest of each file.

Stock transformers does not know this format by itself: install msq, and import it first.

    import msq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    model = msq.to_device(model, "cuda")   # where there is a GPU

From the command line: `msq generate DIRECTORY --prompt "..."`.

| quantizer | layers |
| --- | --- |
{rows}
"""
