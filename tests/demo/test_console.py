"""The overall bar: shares add up to one, the estimate follows the machine's pace, skipped stages do not count."""

import io

import pytest

from megatron_mixcpt.demo import console as module
from megatron_mixcpt.demo.console import DemoConsole


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def last_line(output):
    return output.getvalue().strip().splitlines()[-1]


def test_the_estimate_scales_with_the_pace_of_this_machine(clock):
    output = io.StringIO()
    console = DemoConsole({"a": 100.0, "b": 300.0}, file=output)
    console.begin("a", "First")
    clock.now += 100.0  # half of the stage in twice the expected time
    console.progress(0.5, "step 1/2")
    assert "overall 12%" in last_line(output)
    assert "ETA 11m40s" in last_line(output)  # 350 expected seconds at half the expected speed
    assert "a | step 1/2" in last_line(output)


def test_a_skipped_stage_neither_counts_as_done_nor_as_work_to_do(clock):
    output = io.StringIO()
    console = DemoConsole({"a": 500.0, "b": 100.0}, file=output)
    console.skipped("a", "First")
    console.begin("b", "Second")
    clock.now += 50.0
    console.progress(0.5, "")
    assert "overall 50%" in last_line(output) and "ETA 50s" in last_line(output)


def test_a_log_gets_a_line_every_ten_seconds_at_most(clock):
    output = io.StringIO()
    console = DemoConsole({"a": 100.0}, file=output)
    console.begin("a", "First")
    before = len(output.getvalue().splitlines())
    for _ in range(25):
        clock.now += 1.0
        console.progress(0.1, "")
    assert len(output.getvalue().splitlines()) - before == 2
