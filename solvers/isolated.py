"""Solve in a process of its own: a crash, a clash of libraries or an overrun time limit takes nothing else down.

The process gets a session of its own (not on Windows), so that programmes which a backend starts end with it, and a
temporary directory that is removed with whatever a backend left there. Ctrl-C reaches the caller only, which then
ends the process; should the caller be killed, the process ends itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from .errors import SolverError
from .problem import Problem
from .registry import get_solver
from .solution import Solution

GRACE = 30.0
"""Seconds beyond the time limit after which the process is ended."""
LONGEST = 2e6
"""Seconds (23 days) above which a time limit counts as none: the operating system can't wait longer at a time."""
_EXIT = 5.0
"""Seconds for a process that has stopped talking to end by itself, so that its exit code is its own."""


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
        refused: the backend can't handle the problem or an argument; `error` is its sentence.
    """

    solution: Solution | None
    error: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    refused: bool = False


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
    if time_limit > LONGEST:
        time_limit = math.inf
    arguments = {"time_limit": time_limit, "rel_gap": rel_gap, "seed": seed, "threads": threads}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="msq-", ignore_cleanup_errors=True) as scratch:
        ours, theirs = context.Pipe(duplex=False)
        # a copy without what is cached on the problem, so that the process works it out itself
        work = (theirs, name, dataclasses.replace(problem), arguments, scratch)
        process = context.Process(target=_work, args=work, daemon=True)
        started = time.monotonic()
        try:
            with _interrupts_held():
                process.start()
            theirs.close()
            found = _answer(ours, process, name, time_limit, started)
        finally:
            _end(process)
            ours.close()
    if found is None:
        return Isolated(None, f"{name} crashed (exit code {process.exitcode})", _since(started), 0.0, 0)
    return found


def _answer(
    connection: Connection, process: BaseProcess, name: str, time_limit: float, started: float
) -> Isolated | None:
    """What the process says, or that it ran too long; None if it ends without a word."""
    try:
        if not connection.poll(None if math.isinf(time_limit) else time_limit + GRACE):
            return Isolated(None, f"{name} ran {GRACE:g} s past its time limit and was ended", _since(started), 0.0, 0)
        found: Isolated = connection.recv()
    except (EOFError, OSError):  # the latter in the middle of an answer
        wait([process.sentinel], _EXIT)
        return None
    return found


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits, and never reaches a process that is started meanwhile: it inherits the signal mask."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # its start, else a part of the process's, unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: BaseProcess) -> None:
    """Kill the process, and on POSIX what it started. Reaped last: until then no other group can have its number."""
    if process.pid is None:
        return
    if sys.platform != "win32":
        # it may not have come as far as its session; macOS forbids signals to a group that has ended
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _since(started: float) -> float:
    return time.monotonic() - started


def _work(connection: Connection, name: str, problem: Problem, arguments: dict[str, Any], scratch: str) -> None:
    """What the process does."""
    if sys.platform != "win32":
        os.setsid()
        threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    tempfile.tempdir = scratch
    started, worked = time.monotonic(), time.process_time()
    try:
        solver = get_solver(name)
        worked = time.process_time()
        solution = solver.solve(problem, **arguments)
        found = Isolated(solution, "", solution.seconds, time.process_time() - worked, _peak_bytes())
    except Exception as cause:
        refused = isinstance(cause, SolverError)
        message = str(cause) if refused else f"{type(cause).__name__}: {cause}"
        found = Isolated(None, message, _since(started), time.process_time() - worked, _peak_bytes(), refused)
    connection.send(found)
    connection.close()


def _end_with_parent(scratch: str) -> None:
    """Do the parent's work once it is gone, be it by a signal that it can't handle."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(scratch, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def _peak_bytes() -> int:
    """Largest resident size so far; 0 on Windows, whose Python has no `resource`."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
