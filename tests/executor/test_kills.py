"""`kill -9` in the middle of profile and apply: the files in the end are those of an undisturbed run.

One process is killed ten times a command. Of two workers, local or on Ray, one is killed in one run of each command;
``MSQ_WORKER_KILLS=10 pytest tests/executor/test_kills.py -k two_workers`` makes that ten runs, each at another moment.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from msq.kernels.specs import Family, QuantizerSpec
from msq.planner.budget import parse_budgets
from msq.planner.executor.apply import apply_plan, work_directory
from msq.planner.plan import save_plan
from msq.planner.solve import find_plan
from msq.profiles.engines import ENGINES, Engine
from msq.profiles.job import RESULTS_DIR, ProfileSettings, run_profile
from msq.profiles.jobs import JobList
from msq.profiles.tables import load_profile

KILLS = 10
WORKER_KILLS = int(os.environ.get("MSQ_WORKER_KILLS", "1"))
JOBS = 14
LONGEST_WAIT_SECONDS = 0.3
"""From a result to a kill: about a job's time."""
SLOW = ProfileSettings(specs=(QuantizerSpec(Family.TCQ, 2, 14),), tokens=64, window=32, batch_sizes=())
"""Some tenths of a second for each of the `JOBS` layers: long enough to be killed in."""


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class KillServer:
    """Commands to `kill_server`."""

    def __init__(self, model: Path, home: Path) -> None:
        self.home = home
        script = Path(__file__).with_name("kill_server.py")
        self._process = subprocess.Popen(
            [sys.executable, script, model, home / "first"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "stderr").open("wb"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, limit: int = 0, **command: object) -> tuple[bool, int]:
        """Whether the child was killed, and its file operations."""
        texts = {name: str(value) for name, value in command.items()}
        self._process.stdin.write(json.dumps(texts | {"home": str(self.home), "limit": limit}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, (self.home / "stderr").read_text()[-2000:]
        killed, operations = json.loads(line)
        return killed, operations

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def server(tiny_llama, tmp_path):
    started = KillServer(tiny_llama, tmp_path)
    yield started
    started.close()


def killed_again_and_again(server: KillServer, seed: int, **command: object) -> None:
    """Run a command with `KILLS` kills at random file operations, each run going on from what the last one left."""
    chance = random.Random(seed)
    whole = server.home / "whole"
    _, operations = server.run(out=whole, **command)
    expected = files(whole)
    kills = rounds = 0
    while kills < KILLS:
        out = server.home / f"out{rounds}"
        while server.run(limit=chance.randint(1, operations // 2) if kills < KILLS else 0, out=out, **command)[0]:
            kills += 1
        assert files(out) == expected
        assert not work_directory(out).exists()
        rounds += 1


def test_a_profile_killed_at_random_moments(tiny_llama, server):
    killed_again_and_again(server, 1, run="profile", model=tiny_llama)


def test_a_checkpoint_killed_at_random_moments(tiny_llama, server, tmp_path):
    server.run(run="profile", model=tiny_llama, out=tmp_path / "profile")
    plan = find_plan(load_profile(tmp_path / "profile"), parse_budgets(["memory=5bpw"]), solver="lagrangian").plan
    save_plan(plan, tmp_path / "plan.yaml")
    killed_again_and_again(server, 2, run="apply", model=tiny_llama, plan=tmp_path / "plan.yaml")


def holders(leases: Path) -> dict[int, int]:
    """Jobs that are leased, and the processes that hold the leases, as the kernel tells."""
    found = {}
    with leases.open("r+b") as file:
        for index in range(JOBS):
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, index, 1, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                found[index] = pid
    return found


@contextmanager
def killer(results: Path, chance: random.Random):
    """Kill a worker in the middle of a job in `results`: so many results and seconds after the start, both random."""
    jobs, leases = JobList(results, ()), results / "leases"
    results_before, seconds = chance.randrange(JOBS - 2), chance.uniform(0, LONGEST_WAIT_SECONDS)
    lost: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        due = None
        while not lost and not stop.wait(0.005):
            if not leases.exists() or len(done := jobs.done()) < results_before:
                continue
            busy = {index: pid for index, pid in holders(leases).items() if index not in done}
            if not busy:
                continue
            due = due or time.monotonic() + seconds
            if time.monotonic() < due and len(done) == results_before:  # else there might soon be nobody left to kill
                continue
            worker = chance.choice(sorted(busy.values()))
            os.kill(worker, signal.SIGKILL)
            while worker in holders(leases).values():
                time.sleep(0.001)
            lost.update({index for index, pid in busy.items() if pid == worker} - jobs.done())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert lost, "no worker was killed in the middle of a job"


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory):
    """A profile, its plan and its checkpoint, made in one process."""
    home = tmp_path_factory.mktemp("undisturbed")
    profile = run_profile(tiny_llama, home / "profile", SLOW, name="tiny")
    plan = find_plan(profile, parse_budgets(["memory=6bpw"]), solver="lagrangian").plan
    apply_plan(tiny_llama, plan, home / "checkpoint")
    return home, plan


@pytest.fixture(scope="module", params=ENGINES)
def two_workers(request):
    """An engine of two workers."""
    if request.param == "local":
        yield Engine(workers=2)
        return
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield Engine("ray", workers=2)
    ray.shutdown()


@pytest.mark.parametrize("seed", range(WORKER_KILLS))
def test_two_workers_of_which_one_is_killed(tiny_llama, undisturbed, two_workers, seed, tmp_path):
    home, plan = undisturbed
    chance = random.Random(seed)
    with killer(tmp_path / "profile" / RESULTS_DIR, chance):
        run_profile(tiny_llama, tmp_path / "profile", SLOW, name="tiny", engine=two_workers)
    assert files(tmp_path / "profile") == files(home / "profile")
    work = work_directory(tmp_path / "checkpoint")
    with killer(work / RESULTS_DIR, chance):
        apply_plan(tiny_llama, plan, tmp_path / "checkpoint", engine=two_workers)
    assert files(tmp_path / "checkpoint") == files(home / "checkpoint")
    assert not work.exists()
