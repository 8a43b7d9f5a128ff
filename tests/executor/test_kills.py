"""`kill -9` in the middle of profile and apply: the files in the end are those of an undisturbed run."""

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
from msq.profiles.engines import Engine
from msq.profiles.job import RESULTS_DIR, ProfileSettings, run_profile
from msq.profiles.tables import load_profile

KILLS = 10
SLOW = ProfileSettings(specs=(QuantizerSpec(Family.TCQ, 2, 14),), tokens=64, window=32, batch_sizes=())
"""Some tenths of a second for each of the 14 layers: long enough to be killed in."""


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


def holders(leases: Path, count: int) -> list[int]:
    """Processes that hold one of the first `count` leases, as the kernel tells."""
    found = []
    with leases.open("r+b") as file:
        for index in range(count):
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, index, 1, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                found.append(pid)
    return found


@contextmanager
def killer(results: Path, kills: int):
    """Kill a worker that holds a lease on a job in `results`, so many times, with a result in between."""
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        chance = random.Random(3)
        seen = 0
        while len(killed) < kills and not stop.is_set():
            time.sleep(0.005)
            done = len(list(results.glob("[0-9]*"))) if results.exists() else 0
            if done > seen and (busy := holders(results / "leases", 14)):
                killed.append(chance.choice(busy))
                os.kill(killed[-1], signal.SIGKILL)
                seen = done

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()
    assert len(killed) == kills


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory):
    """A profile, its plan and its checkpoint, made in one process."""
    home = tmp_path_factory.mktemp("undisturbed")
    profile = run_profile(tiny_llama, home / "profile", SLOW, name="tiny")
    plan = find_plan(profile, parse_budgets(["memory=6bpw"]), solver="lagrangian").plan
    apply_plan(tiny_llama, plan, home / "checkpoint")
    return home, plan


def test_two_processes_of_which_one_is_killed(tiny_llama, undisturbed, tmp_path):
    home, plan = undisturbed
    two = Engine(workers=2)
    with killer(tmp_path / "profile" / RESULTS_DIR, kills=1):
        run_profile(tiny_llama, tmp_path / "profile", SLOW, name="tiny", engine=two)
    assert files(tmp_path / "profile") == files(home / "profile")
    with killer(work_directory(tmp_path / "checkpoint") / RESULTS_DIR, kills=1):
        apply_plan(tiny_llama, plan, tmp_path / "checkpoint", engine=two)
    assert files(tmp_path / "checkpoint") == files(home / "checkpoint")


def test_two_ray_workers_of_which_one_is_killed(tiny_llama, undisturbed, tmp_path):
    ray = pytest.importorskip("ray")
    home, plan = undisturbed
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    two = Engine("ray", workers=2)
    try:
        with killer(tmp_path / "profile" / RESULTS_DIR, kills=1):
            run_profile(tiny_llama, tmp_path / "profile", SLOW, name="tiny", engine=two)
        with killer(work_directory(tmp_path / "checkpoint") / RESULTS_DIR, kills=1):
            apply_plan(tiny_llama, plan, tmp_path / "checkpoint", engine=two)
    finally:
        ray.shutdown()
    assert files(tmp_path / "profile") == files(home / "profile")
    assert files(tmp_path / "checkpoint") == files(home / "checkpoint")
