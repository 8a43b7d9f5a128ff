"""Job lists: leases, engines, and what they say when something is wrong."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
from msq.kernels.specs import Family, QuantizerSpec
from msq.profiles import engines as engines_module
from msq.profiles.device import usable_cores
from msq.profiles.engines import Engine, run_jobs
from msq.profiles.errors import ProfileError
from msq.profiles.inventory import inventory
from msq.profiles.jobs import JobList, Leases
from msq.profiles.quantize_jobs import QuantizeTask, read_error_result

SPECS = (QuantizerSpec(Family.NUQ, 2), QuantizerSpec(Family.INT, 4))
HOLD = """
import sys, time
from pathlib import Path
from msq.profiles.jobs import Job, JobList, Leases
jobs = JobList(Path(sys.argv[1]), tuple(Job(index, None, None) for index in range(3)))
with Leases(jobs) as leases:
    held = [job for _, job in zip(range(2), leases.each(0, wait=False))]
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def jobs(tiny_llama, tmp_path):
    layers = inventory(tiny_llama).layers
    return JobList.open(tmp_path / "results", [(layer, spec) for layer in layers for spec in SPECS])


@pytest.fixture
def task(tiny_llama):
    return QuantizeTask(tiny_llama, 0, None, keep_weights=False)


def results(jobs):
    return [read_error_result(jobs.load(job)) for job in jobs.jobs]


def test_what_another_process_holds_is_left_alone_until_it_ends(jobs):
    command = [sys.executable, "-c", HOLD, str(jobs.directory)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with Leases(jobs) as leases:
        free = list(leases.each(0, wait=False))
        assert [job.index for job in free] == list(range(2, len(jobs.jobs)))
        for job in free:
            jobs.store(job, b"")
        other.kill()
        other.communicate()
        # What it held is free at once, and nothing else is left.
        assert [job.index for job in leases.each(5, wait=False)] == [0, 1]


def test_jobs_come_in_order_and_are_not_done_twice(task, jobs, monkeypatch):
    found = [job.index for job in run_jobs(task, jobs, device="cpu", engine=Engine(workers=1), what="test")]
    assert found == list(range(len(jobs.jobs)))
    before = results(jobs)
    jobs.path(jobs.jobs[7]).unlink()
    times = {job.index: jobs.path(job).stat().st_mtime_ns for job in jobs.jobs if job.index != 7}
    again = [job.index for job in run_jobs(task, jobs, device="cpu", engine=Engine(workers=1), what="test")]
    assert again == found and results(jobs) == before
    assert all(jobs.path(jobs.jobs[index]).stat().st_mtime_ns == time for index, time in times.items())


def test_an_error_in_a_worker_process_is_told_as_it_is(task, jobs, tmp_path):
    broken = QuantizeTask(task.model_dir, 0, tmp_path / "nowhere", keep_weights=False)
    for workers in (1, 2):
        with pytest.raises(ProfileError, match=r"can't read the Hessian of model\.layers"):
            list(run_jobs(broken, jobs, device="cpu", engine=Engine(workers=workers), what="test"))


STRANGE = """
from msq.profiles.quantize_jobs import QuantizeTask

class StrangeError(Exception):
    def __init__(self, code, *, table):  # pickles, can't be unpickled
        super().__init__(f"code {code} of {table}")
        self.table = open(__file__)  # can't even be pickled

class StrangeTask(QuantizeTask):
    @property
    def seed(self):
        raise StrangeError(17, table="values")

    @seed.setter
    def seed(self, value):
        pass
"""


def test_an_exception_that_cannot_be_pickled_is_told_by_type_and_text(task, jobs, tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)  # of the workers too
    strange = importlib.import_module("strange").StrangeTask.__new__(sys.modules["strange"].StrangeTask)
    strange.__dict__.update(model_dir=task.model_dir, hessians=tmp_path, keep_weights=False)
    with pytest.raises(ProfileError, match="a worker failed with StrangeError: code 17 of values") as found:
        list(run_jobs(strange, jobs, device="cpu", engine=Engine(workers=2), what="test"))
    assert "strange.py" in found.value.__notes__[0]


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_workers_that_are_killed_again_and_again_are_given_up(task, jobs, monkeypatch):
    class Doomed(engines_module._Crew):
        workers = 2
        starts = 0

        def start(self, worker):
            self.starts += 1

        def ended(self, seconds):
            return [engines_module._End(0, killed=True), engines_module._End(1, killed=True)]

        def close(self):
            self.closed = True

    crew = Doomed()
    monkeypatch.setattr(engines_module, "_crew", lambda *_: crew)
    with pytest.raises(ProfileError, match=r"workers were killed without finishing a job.*fewer --workers"):
        list(run_jobs(task, jobs, device="cpu", engine=Engine(workers=2), what="test"))
    assert crew.closed and crew.starts < 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rai"}, "unknown engine 'rai'; did you mean 'ray'"),
        ({"name": "slurm"}, "there are local, ray"),
        ({"workers": 0}, "at least one worker; got 0"),
    ],
)
def test_engines_that_are_not_there_are_refused(fields, message):
    with pytest.raises(ProfileError, match=message):
        Engine(**fields)
