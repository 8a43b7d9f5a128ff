"""Who works through a job list: this process, several processes of this machine, or a Ray cluster.

Results lie in the list's directory and are the same whoever computes them, so an engine only starts workers, watches
them and starts those that were killed again. Every worker runs `quantize_jobs.work` over the whole list, each from
another place, and skips what is done or leased.
"""

from __future__ import annotations

import difflib
import logging
import multiprocessing
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .device import usable_cores
from .errors import ProfileError
from .jobs import Job, JobList
from .models import choose_device
from .progress import progress
from .quantize_jobs import QuantizeTask, work
from .worker_failure import WorkerFailure

ENGINES = ("local", "ray")
_POLL_SECONDS = 0.2
_STRIKES = 3
"""Deaths for each worker of a crew, counted over all of them, without a result in between before it is given up."""
_WORTH_PROCESSES = 1 << 24
"""Weights to encode below which a CPU's other cores are not worth the seconds that a process takes to start."""


@dataclass(frozen=True)
class Engine:
    """How a job list is worked through.

    Attributes:
        name: "local" for this machine; "ray" for the cluster at RAY_ADDRESS, or one that is started on this machine.
        workers: processes; None for one a GPU, or on a CPU one a core where the model is worth it. One local worker
            is this process itself.
    """

    name: str = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            near = difflib.get_close_matches(self.name, ENGINES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(ENGINES)}."
            raise ProfileError(f"unknown engine '{self.name}'; {hint}")
        if self.workers is not None and self.workers < 1:
            raise ProfileError(f"expected at least one worker; got {self.workers}.")


IN_PROCESS = Engine(workers=1)


def run_jobs(task: QuantizeTask, jobs: JobList, *, device: str, engine: Engine, what: str) -> Iterator[Job]:
    """Have every job done, and yield them in the order of the list as they get done.

    Args:
        device: where to encode; "cuda" with several local workers means all GPUs.
        what: for the progress bar.

    Raises:
        ProfileError: a job failed, workers keep dying, or there is no such engine or device.
    """
    known = jobs.done()
    with progress(what, len(jobs.jobs), done=len(known)) as advance:
        place = 0

        def ready(done: set[int]) -> Iterator[Job]:
            nonlocal place
            for _ in done - known:
                advance()
            known.update(done)
            while place < len(jobs.jobs) and place in known:
                place += 1
                yield jobs.jobs[place - 1]

        yield from ready(set())
        if len(known) == len(jobs.jobs):
            return
        crew = _crew(task, jobs, device, engine)
        if crew is None:
            for job in work(task, jobs, choose_device(device)):
                yield from ready({job.index})
            yield from ready(jobs.done())  # what another process did
            return
        try:
            for done in _watch(crew, jobs):
                yield from ready(done)
        finally:
            crew.close()


@dataclass(frozen=True)
class _End:
    """How a worker ended: killed, by an exception of its job, or because it found nothing more to do."""

    worker: int
    killed: bool = False
    failure: WorkerFailure | None = None


class _Crew(ABC):
    """Workers that can be started and watched.

    Attributes:
        workers: how many; they are numbered from 0.
    """

    workers: int

    @abstractmethod
    def start(self, worker: int) -> None:
        """Start a worker, or one that has ended once more."""

    @abstractmethod
    def ended(self, seconds: float) -> list[_End]:
        """Workers that ended since the last call; waits so long for the first."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers."""


def _watch(crew: _Crew, jobs: JobList) -> Iterator[set[int]]:
    """Keep workers running until every job is done; yields the indices of all that are, now and then."""
    strikes, done = 0, jobs.done()
    running = set(range(crew.workers))
    for worker in range(crew.workers):
        crew.start(worker)
    while len(done) < len(jobs.jobs):
        ends = crew.ended(_POLL_SECONDS)
        before, done = len(done), jobs.done()
        yield done
        if len(done) > before:
            strikes = 0
        for end in ends:
            if end.failure is not None:
                raise end.failure.error()
            running.discard(end.worker)
            if end.killed and len(done) < len(jobs.jobs):
                strikes += 1
                if strikes > _STRIKES * crew.workers:
                    raise ProfileError(
                        f"{strikes} workers were killed without finishing a job (out of memory?); what is done is kept "
                        f"in {jobs.directory}: run the same command again, with fewer --workers."
                    )
                running.add(end.worker)
                crew.start(end.worker)
        if not running and len(done) < len(jobs.jobs):  # others hold the rest: come back for what they may leave
            time.sleep(_POLL_SECONDS)
            running.add(0)
            crew.start(0)


def run_worker(task: QuantizeTask, jobs: JobList, device: str, worker: int, workers: int) -> WorkerFailure | None:
    """What a worker does: every job that is left and free, beginning at its share of the list; what went wrong."""
    parent = multiprocessing.parent_process()
    first = len(jobs.jobs) * worker // workers
    try:
        for _ in work(task, jobs, choose_device(device), first=first, wait=False):
            if parent is not None and not parent.is_alive():
                break
    except Exception as cause:  # whatever it is, the user is told
        return WorkerFailure.of(cause)
    return None


class _Processes(_Crew):
    """Processes of this machine; on CUDA, spread over its GPUs unless one is named."""

    def __init__(self, task: QuantizeTask, jobs: JobList, device: str, workers: int) -> None:
        self.workers = workers
        self._task, self._jobs, self._device = task, jobs, device
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    def start(self, worker: int) -> None:
        device = self._device
        if device == "cuda":
            device = f"cuda:{worker % torch.cuda.device_count()}"
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (theirs, self._task, self._jobs, device, worker, self.workers)
        process = self._context.Process(target=_worker_process, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._running[worker] = (process, ours)

    def ended(self, seconds: float) -> list[_End]:
        found = wait_for([process.sentinel for process, _ in self._running.values()], seconds)
        ends = []
        for worker, (process, pipe) in list(self._running.items()):
            if process.sentinel in found:
                process.join()
                with pipe:
                    try:
                        failure = pipe.recv()
                    except EOFError:  # it had nothing to say
                        failure = None
                del self._running[worker]
                ends.append(_End(worker, killed=failure is None and process.exitcode != 0, failure=failure))
        return ends

    def close(self) -> None:
        for process, pipe in self._running.values():
            process.kill()  # whatever it does can be cut short at any moment
            process.join()
            pipe.close()
        self._running.clear()


def _worker_process(pipe: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted terminal interrupts the parent, which stops us
    failure = run_worker(*arguments)
    if failure is not None:
        pipe.send(failure)


class _RayTasks(_Crew):
    """Ray tasks, each with a core, or on CUDA with a GPU of its own."""

    def __init__(self, task: QuantizeTask, jobs: JobList, device: str, workers: int | None) -> None:
        try:
            import ray
        except ImportError as cause:
            raise ProfileError("the engine ray needs Ray; install it with `pip install 'msq[ray]'`.") from cause
        self._ray: Any = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster has the cores that it has
            ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        gpus = device.startswith("cuda")
        resource = "GPU" if gpus else "CPU"
        there = int(self._ray.cluster_resources().get(resource, 0))
        self.workers = min(workers or there, there)
        if not self.workers:
            self.close()
            raise ProfileError(
                f"the Ray cluster has no {resource}; add a node that has one, or choose another --device."
            )
        self._arguments = (task, jobs, device)
        self._remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(run_worker)
        self._running: dict[Any, int] = {}

    def start(self, worker: int) -> None:
        self._running[self._remote.remote(*self._arguments, worker, self.workers)] = worker

    def ended(self, seconds: float) -> list[_End]:
        errors = self._ray.exceptions
        found, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        ends = []
        for task in found:
            worker = self._running.pop(task)
            try:
                ends.append(_End(worker, failure=self._ray.get(task)))
            except errors.RayTaskError as error:  # before or after what `run_worker` catches
                ends.append(_End(worker, failure=WorkerFailure.of(getattr(error, "cause", None) or error)))
            except errors.RayError:  # its process, node or memory is gone
                ends.append(_End(worker, killed=True))
        return ends

    def close(self) -> None:
        for task in getattr(self, "_running", {}):
            self._ray.cancel(task, force=True)
        if self._owned:
            self._ray.shutdown()


def _crew(task: QuantizeTask, jobs: JobList, device: str, engine: Engine) -> _Crew | None:
    """The workers of an engine; None for this process alone."""
    if engine.name == "ray":
        return _RayTasks(task, jobs, device, engine.workers)
    choose_device(device)
    workers = engine.workers
    if workers is None and device == "cuda":
        workers = torch.cuda.device_count()
    elif workers is None:
        weights = sum(job.layer.out_features * job.layer.in_features for job in jobs.jobs)
        workers = usable_cores() if device == "cpu" and weights >= _WORTH_PROCESSES else 1
    workers = min(workers, len(jobs.jobs))
    return None if workers == 1 else _Processes(task, jobs, device, workers)
