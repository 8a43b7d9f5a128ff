"""Whether a checkpoint does on a CUDA device what it does on a CPU: perplexity, greedy tokens, fused steps.

    python -m msq.experiments.check_decode CHECKPOINT [--text FILE]

The CPU's reference implementation in float32 is the truth. Against it stand on the device: the kernels in the dtype of
the checkpoint, prompts in the stock forward; the same fed token by token through the fused step and its CUDA graph; and
the reference implementation in float32. Where greedy tokens part, the row says by how little the truth preferred its
token, beside how far the logits are apart there: a tie within rounding, or a fault.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import QuantizedLinear
from ..planner.executor.decoder import Decoder
from ..planner.executor.load import load_checkpoint
from ..profiles.models import load_tokenizer, windows_of
from .demo import help_text_windows
from .evaluate import evaluate

_WINDOW = 256


@dataclass(frozen=True)
class Check:
    """One comparison: `value` against `reference`; `passed` says whether it is close enough."""

    what: str
    value: float
    reference: float
    passed: bool
    remark: str = ""


def check_perplexity(found: nn.Module, truth: nn.Module, windows: Tensor, what: str) -> Check:
    """Perplexities within 0.2 percent of each other."""
    value, reference = (evaluate(model, windows).perplexity for model in (found, truth))
    return Check(what, value, reference, abs(value / reference - 1) < 2e-3)


@torch.inference_mode()
def check_steps(found: nn.Module, truth: nn.Module, windows: Tensor, *, prompt: int = 32) -> Check:
    """Mean loss of windows fed to the fused step token by token, all windows at once, within 0.2 percent.

    Args:
        prompt: tokens of each window that go in as a prompt.
    """
    count, length = windows.shape
    logits = cast(Any, truth)(windows).logits[:, prompt - 1 : -1].float()
    targets = windows[:, prompt:]
    reference = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    decoder = Decoder(found, batch_size=count, capacity=length)
    losses = []
    decoder.start(windows[:, :prompt].tolist())
    for place in range(prompt, length - 1):
        decoder.tokens.copy_(windows[:, place])
        decoder.advance()
        losses.append(F.cross_entropy(cast(Tensor, decoder.logits).float().cpu(), windows[:, place + 1]))
    value = float(torch.stack(losses).mean())
    reference = float(F.cross_entropy(logits[:, 1:].flatten(0, 1), targets[:, 1:].flatten()))
    return Check(f"loss of {count} sequences, step by step", value, reference, abs(value / reference - 1) < 2e-3)


@torch.inference_mode()
def check_greedy(found: nn.Module, truth: nn.Module, prompt: Tensor, what: str, *, count: int = 64) -> Check:
    """Greedy tokens after a prompt: equal, or parted at a near tie.

    Args:
        prompt: ``(length,)``.
    """
    sequences = []
    for model in (found, truth):
        decoder = Decoder(model, batch_size=1, capacity=len(prompt) + count)
        sequences.append(decoder.generate([prompt.tolist()], count)[0])
    mine, theirs = sequences
    same = next((n for n in range(count) if mine[n] != theirs[n]), count)
    if same == count:
        return Check(what, count, count, True, "all tokens equal")
    shared = torch.cat([prompt, torch.tensor(theirs[:same])])[None]
    logits = [
        cast(Any, model)(shared.to(next(model.parameters()).device)).logits[0, -1].float().cpu()
        for model in (found, truth)
    ]
    gap = float(logits[1][theirs[same]] - logits[1][mine[same]])
    apart = float((logits[0] - logits[1]).abs().max())
    remark = f"parts at token {same}: preferred by {gap:.4g}, logits up to {apart:.4g} apart"
    return Check(what, same, count, 0 <= gap <= 2 * apart and apart < 0.05 * float(logits[1].std()), remark)


def check_checkpoint(directory: Path, windows: Tensor, device: str) -> list[Check]:
    """All comparisons of one checkpoint."""
    truth = load_checkpoint(directory)
    for module in truth.modules():
        if isinstance(module, QuantizedLinear):
            module.keep_decoded()
    kernels = load_checkpoint(directory, device=device)
    exact = load_checkpoint(directory, device=device, implementation="reference", dtype=torch.float32)
    prompt = windows[0, :16]
    return [
        check_perplexity(kernels, truth, windows, "perplexity, kernels"),
        check_perplexity(exact, truth, windows, "perplexity, reference in float32"),
        check_steps(kernels, truth, windows[:1]),
        check_steps(kernels, truth, windows[: min(8, len(windows))]),
        check_greedy(kernels, truth, prompt, "greedy tokens, kernels"),
        *_exact_greedy(exact, truth, prompt),
    ]


def _exact_greedy(exact: nn.Module, truth: nn.Module, prompt: Tensor) -> list[Check]:
    """Greedy tokens of the stock models in float32, which the attention kernel does not take."""
    count = 64
    texts = []
    for model in (exact, truth):
        inputs = prompt[None].to(next(model.parameters()).device)
        found = cast(Any, model).generate(inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
        texts.append(found[0, len(prompt) :].tolist())
    same = next((n for n in range(count) if texts[0][n] != texts[1][n]), count)
    return [Check("greedy tokens, reference in float32", same, count, same == count)]


def report(checks: list[Check]) -> bool:
    """Print a table; whether all passed."""
    for check in checks:
        state = "ok  " if check.passed else "FAIL"
        print(f"{state} {check.what:40} {check.value:12.6g} {check.reference:12.6g} {check.remark}")
    return all(check.passed for check in checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--text", type=Path, help="UTF-8 text; Python's help topics by default")
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    passed = True
    for directory in arguments.checkpoints:
        tokenizer = load_tokenizer(directory)
        if arguments.text is None:
            windows = help_text_windows(tokenizer, _WINDOW, arguments.windows)
        else:
            text = arguments.text.read_text(encoding="utf-8")
            windows = windows_of(tokenizer, text, _WINDOW, arguments.windows, str(arguments.text))
        print(f"{directory}: {len(windows)} windows of {_WINDOW} tokens")
        passed &= report(check_checkpoint(directory, windows, arguments.device))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
