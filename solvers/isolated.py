"""Solve in a process of its own: a crash, a clash of libraries or an overrun time limit takes nothing else down."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .problem import Problem
from .registry import get_solver
from .solution import Solution

GRACE = 30.0
"""Seconds beyond the time limit after which the process is ended."""


@dataclass(frozen=True)
class Isolated:
    """What came out of the process.

    Attributes:
        solution: the answer, or None.
        error: one sentence on why there is none; "" with a solution.
        seconds: wall time of the solve, packages that the backend needs being loaded on the way; that of the
            process without a solution.
        cpu_seconds: likewise, of processor time; 0 if not known.
        peak_bytes: largest resident size of the process, 0 if not known. Interpreter and problem included.
    """

    solution: Solution | None
    error: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def solve_isolated(
    name: str,
    problem: Problem,
    *,
    time_limit: float = 60.0,
    rel_gap: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> Isolated:
    """Run a backend in a fresh process; arguments as in `Solver.solve`.

    A program that calls this must be importable without side effects (``if __name__ == "__main__"``), as for all
    uses of `multiprocessing` with spawned processes.

    Returns:
        the answer, or what went wrong; nothing is raised for what happens in the process.
    """
    arguments = {"time_limit": time_limit, "rel_gap": rel_gap, "seed": seed, "threads": threads}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # a copy without what is cached on the problem, so that the process works it out itself
    process = context.Process(target=_work, args=(theirs, name, dataclasses.replace(problem), arguments), daemon=True)
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(None if time_limit == float("inf") else time_limit + GRACE):
            return Isolated(None, f"{name} ran {GRACE:g} s past its time limit and was ended", _since(started), 0.0, 0)
        found: Isolated = ours.recv()
        return found
    except EOFError:
        process.join()
        return Isolated(None, f"{name} crashed (exit code {process.exitcode})", _since(started), 0.0, 0)
    finally:
        process.kill()
        process.join()
        ours.close()


def _since(started: float) -> float:
    return time.monotonic() - started


def _work(connection: Connection, name: str, problem: Problem, arguments: dict[str, Any]) -> None:
    started, worked = time.monotonic(), time.process_time()
    try:
        solver = get_solver(name)
        worked = time.process_time()
        solution = solver.solve(problem, **arguments)
        found = Isolated(solution, "", solution.seconds, time.process_time() - worked, _peak_bytes())
    except Exception as cause:
        message = f"{type(cause).__name__}: {cause}"
        found = Isolated(None, message, _since(started), time.process_time() - worked, _peak_bytes())
    connection.send(found)
    connection.close()


def _peak_bytes() -> int:
    """Kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
