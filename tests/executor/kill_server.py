"""Runs profile and apply in children that kill themselves at a given file operation; a script of `test_kills`.

    python kill_server.py MODEL DIRECTORY

One JSON command a line on stdin, one answer a line on stdout: ``[killed, operations]``. Every command runs in a fork of
a process that has loaded all modules by profiling the model once, without any thread left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.executor.apply import apply_plan
from msq.planner.executor.manifest import TuneMethod
from msq.planner.executor.tuning import Tuning
from msq.planner.plan import load_plan
from msq.profiles.calibration import calibration
from msq.profiles.job import ProfileSettings, run_profile

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
SETTINGS = ProfileSettings(
    specs=(QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.TCQ, 2, 9)),
    tokens=64,
    window=32,
    batch_sizes=(),
    error="proxy",
)


def run(command: dict, limit: int, answer: int) -> None:
    """The child: do what the command says, and end at the file operation of number `limit` below its directory."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        # shutil removes trees by names relative to a directory that it holds open.
        if event in OPERATIONS and (event in ("os.remove", "os.rmdir") or command["home"] in str(arguments[0])):
            count += 1
            if count == limit:
                os.write(answer, b"\n")
                os.kill(os.getpid(), signal.SIGKILL)

    # After a fork, torch makes its thread pool anew in whichever thread first asks for it, and two that ask at once, as
    # those that load a model do, may find none ("Invalid thread pool!"): ask before there are any.
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    model, out = Path(command["model"]), Path(command["out"])
    if command["run"] == "profile":
        run_profile(model, out, SETTINGS, name="tiny")
    else:
        tokens = calibration(model, None, tokens=64, window=32, seed=0)
        tuning = Tuning(TuneMethod.BLOCKS, tokens)
        apply_plan(model, load_plan(command["plan"]), out, hessian=tokens, tuning=tuning)
    os.write(answer, f"{count}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    run_profile(Path(sys.argv[1]), Path(sys.argv[2]), SETTINGS, name="tiny")
    for line in sys.stdin:
        command = json.loads(line)
        here, there = os.pipe()
        child = os.fork()
        if not child:
            run(command, command["limit"], there)
            os._exit(0)
        os.close(there)
        _, status = os.waitpid(child, 0)
        with os.fdopen(here) as answer:
            operations = answer.read().strip()
        assert os.WIFSIGNALED(status) == (not operations), f"the child failed: {status}"
        print(json.dumps([not operations, int(operations or command["limit"])]), flush=True)


if __name__ == "__main__":
    main()
