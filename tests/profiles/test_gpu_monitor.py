"""Reading `nvidia-smi`: a stand-in for it prints what a GPU would say."""

from __future__ import annotations

import time

import pytest
from msq.profiles import latency
from msq.profiles.gpu_monitor import GpuMonitor, parse_sample

SCRIPT = """#!/bin/sh
case "$*" in
  *clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2;;
esac
case "$*" in
  *-lms*) while :; do echo "$(cat {state})"; sleep 0.05; done;;
  *) cat {state};;
esac
"""
FREE, HOT = "1980, 2619, 41, 120.5, 0x0000000000000000", "1200, 2619, 88, 690.0, 0x0000000000000040"


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The line that the stand-in prints; older drivers' name of a field is all that it knows."""
    path = tmp_path / "state"
    path.write_text(FREE + "\n")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SCRIPT.replace("{state}", str(path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return path


def wait_for(condition) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("the stand-in printed nothing")


def test_samples_tell_clocks_and_why_they_are_low(state):
    with GpuMonitor("abc") as monitor:
        wait_for(lambda: monitor.samples)
        assert monitor.throttled_since(0.0) is None
        state.write_text(HOT + "\n")
        wait_for(lambda: monitor.samples[-1].throttled)
        assert monitor.throttled_since(monitor.samples[-1].seconds) == "hardware thermal slowdown"
        assert monitor.throttled_since(monitor.samples[-1].seconds + 1.0) is None
    found = monitor.summary()
    assert (found["sm_clock_lowest_mhz"], found["temperature_highest_c"], found["power_highest_w"]) == (1200, 88, 690)


def test_without_nvidia_smi_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuMonitor("abc") as monitor:
        assert monitor.throttled_since(0.0) is None
    assert monitor.summary() == {}


@pytest.mark.parametrize("line", ["", "1980, 2619", "[N/A], 2619, 41, 120.5, 0x0", "1980, 2619, 41, 120.5, Not Active"])
def test_what_is_no_sample_is_left_out(line):
    assert parse_sample(line, 0.0) is None


@pytest.mark.parametrize("reasons", ["0x1", "0x2", "0x10", "0x100"])
def test_idleness_and_chosen_clocks_are_no_throttling(reasons):
    assert parse_sample(f"1980, 2619, 41, 120.5, {reasons}", 0.0).throttled is None


class Held:
    """A monitor of a GPU that is held back for the first attempts."""

    def __init__(self, attempts: int) -> None:
        self.left = attempts

    def throttled_since(self, seconds: float) -> str | None:
        self.left -= 1
        return "power cap" if self.left >= 0 else None


@pytest.mark.parametrize(("attempts", "taken", "marked"), [(0, 1, 0), (1, 2, 0), (2, 3, 0), (3, 3, 1)])
def test_rows_are_taken_again_and_marked_if_the_gpu_is_held_back_still(monkeypatch, attempts, taken, marked):
    monkeypatch.setattr(latency, "_PAUSE_SECONDS", 0.0)
    times = iter(range(10, 20))
    assert latency._settled(lambda: (float(next(times)), 1.0), Held(attempts)) == [9.0 + taken, 1.0, marked]
