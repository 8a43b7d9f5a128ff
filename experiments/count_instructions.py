"""Count the decode kernels' instructions for each pair of weights, from their machine code; no GPU is needed.

    python -m msq.experiments.count_instructions --out results/kernel_sass_counts.csv

For every quantizer, the innermost loop with tensor-core multiplications is taken from the disassembly of the kernel for
one token, and its instructions are sorted by the unit that runs them. An sm_90 multiprocessor takes, each cycle, 4
instructions of a warp in all, 2 on the integer unit (`alu`), 2 multiplications of integers (`multiply`), and one
wavefront of shared memory. `wavefronts` counts what the loads of shared memory take without bank conflicts. Reading
4.3 TB/s at 1.98 GHz on 132 multiprocessors, b bits a weight leave 0.97 b integer and 1.95 b other slots a pair, and
0.49 b wavefronts.

The disassembler is nvdisasm: of a CUDA toolkit, or ``pip install nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from ..kernels.cuda.jit import compile_cubin
from ..kernels.cuda.limits import Limits
from ..kernels.cuda.tuning import in_quads, launch_for
from ..kernels.cuda.tuning_choice import tune
from ..kernels.mad import mad_code
from ..kernels.specs import QuantizerSpec, TrellisCode
from .kernel_checks import CHECKED
from .records import checkout_commit

_LIMITS = Limits(132, 227 << 10)
_MULTIPLICATIONS = ("HMMA", "IMMA")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
_UNITS = {
    "multiply": r"IMAD|HADD2|HFMA2|HMUL2|FFMA|FMUL|FADD",
    "alu": r"LOP3|SHF|PRMT|IADD3|VIADD|ISETP|MOV|SEL|LEA|PLOP3|IMNMX|VIMNMX",
    "shared": r"LDS|STS|SHFL",
    "tensor": "|".join(_MULTIPLICATIONS),
    "uniform": r"U[A-Z]|R2UR|S2UR",
}


def disassembler() -> str:
    """Path of nvdisasm."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        except importlib.metadata.PackageNotFoundError:
            sys.exit("counting needs nvdisasm: pip install nvidia-cuda-nvdisasm.")
        found = next(str(file.locate()) for file in files if file.name in ("nvdisasm", "nvdisasm.exe"))
    return found


def inner_loop(listing: str) -> list[tuple[str, str]]:
    """(opcode, operands) of the shortest loop that multiplies on tensor cores."""
    lines = listing.splitlines()
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append((found[1], found[2]))
    best: list[tuple[str, str]] = []
    for end, (opcode, operands) in enumerate(instructions):
        target = re.search(r"\((\.L_x_\d+)\)", operands) if opcode.startswith("BRA") else None
        start = labels.get(target[1], end + 1) if target else end + 1
        body = instructions[start : end + 1]
        if any(name.startswith(_MULTIPLICATIONS) for name, _ in body) and (not best or len(body) < len(best)):
            best = body
    return best


def wavefronts(opcode: str, operands: str) -> int:
    """Cycles of shared memory that an instruction takes when no lanes collide."""
    if not opcode.startswith(("LDS", "STS", "SHFL")):
        return 0
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def pairs_of_multiplication(spec: QuantizerSpec) -> int:
    """Pairs of a lane that one multiplication takes: of fp16 weights, of bytes in quads, of hashes.

    MAD has a multiplication for each hash; of two rates, the one with the shorter loop counts.
    """
    if in_quads(spec, tokens=1):
        return 8
    hashes = 1
    if spec.code is TrellisCode.MAD:
        hashes = min(len(mad_code(int(2 * rate)).multipliers) for rate in spec.rates)
    return 4 // hashes


def count(spec: QuantizerSpec, arch: str, nvdisasm: str) -> dict[str, object]:
    """One row: instructions a pair of weights in the kernel for one token of 4096 x 4096."""
    tuning = tune(spec, 4096, 4096, 1, _LIMITS)
    assert tuning is not None
    launch = launch_for(spec, 4096, 4096, 1, torch.float16, _LIMITS, tuning)
    assert launch is not None
    code = compile_cubin(launch.source, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        listing = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    body = inner_loop(listing)
    pairs = pairs_of_multiplication(spec) * sum(opcode.startswith(_MULTIPLICATIONS) for opcode, _ in body)
    units: Counter[str] = Counter()
    for opcode, _ in body:
        units[next((unit for unit, names in _UNITS.items() if re.match(names, opcode)), "other")] += 1
    row: dict[str, object] = {"family": spec.family, "bits": spec.bits, "code": spec.code if spec.has_trellis else ""}
    row |= {"arch": arch, "pairs_in_loop": pairs}
    row |= {"issued": round(len(body) / pairs, 2)}
    row |= {unit: round(units[unit] / pairs, 2) for unit in (*_UNITS, "other")}
    row["wavefronts"] = round(sum(wavefronts(*instruction) for instruction in body) / pairs, 2)
    return row | {
        "replicas": tuning.replicas,
        "signed": int(tuning.signed),
        "code_bytes": len(code),
        "commit": checkout_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernel_sass_counts.csv"))
    parser.add_argument("--arch", default="sm_90")
    arguments = parser.parse_args()
    nvdisasm = disassembler()
    rows = []
    for spec in CHECKED:
        rows.append(count(spec, arguments.arch, nvdisasm))
        print(spec.label, rows[-1]["issued"], rows[-1]["alu"], rows[-1]["multiply"], rows[-1]["wavefronts"], flush=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
