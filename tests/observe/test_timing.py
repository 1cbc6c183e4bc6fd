"""The parts of a step add up to the step, whatever is nested in what and however late the device is."""

import pytest
import torch

from megatron_mixcpt.runtime.timing import MegatronTimers, StepTimer, section


class Clock:
    """A clock that is set by hand; moments later than `reached` have not passed on the device."""

    def __init__(self):
        self.time, self.reached = 0.0, float("inf")

    def now(self):
        return self.time

    def passed(self, moment):
        return moment <= self.reached

    def seconds(self, start, end):
        return end - start


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timer(clock):
    timer = StepTimer(torch.device("cpu"), clock)
    timer.install()
    yield timer
    timer.remove()


def test_an_outer_section_stands_still_inside_an_inner_one(clock, timer):
    with section("forward"):
        clock.time = 1.0
        with section("loss"):
            clock.time = 3.0
        clock.time = 3.5
    clock.time = 10.0
    assert timer.lap() == {"time/forward": 1.5, "time/loss": 2.0, "time/other": 6.5}
    clock.time = 11.0
    assert timer.lap() == {"time/other": 1.0}


def test_a_pass_within_the_teacher_is_the_teachers(clock, timer):
    timers = MegatronTimers()
    with section("teacher"):
        timers("forward-compute", log_level=2).start()
        clock.time = 2.0
        timers("forward-compute").stop()
    timers("forward-compute", log_level=2).start()
    clock.time = 5.0
    timers("forward-compute").stop()
    assert timer.lap() == {"time/teacher": 2.0, "time/forward": 3.0, "time/other": 0.0}


def test_megatrons_own_names_become_sections(clock, timer):
    timers = MegatronTimers()
    timers("forward-backward", log_level=1).start(barrier=True)  # covers all the others: not a section
    for name in ("forward-recv", "forward-compute", "backward-send-forward-recv", "backward-compute", "all-grads-sync"):
        timers(name, log_level=2).start()
        clock.time += 1.0
        timers(name).stop()
    timers("embedding-grads-all-reduce", log_level=1).start(barrier=False)
    clock.time += 1.0
    timers("embedding-grads-all-reduce").stop()
    timers("forward-backward").stop()
    assert timer.lap() == {"time/communication": 4.0, "time/forward": 1.0, "time/backward": 1.0, "time/other": 0.0}


def test_what_the_device_has_not_finished_is_counted_to_the_next_lap(clock, timer):
    with section("forward"):
        clock.time = 4.0
    with section("optimizer"):
        clock.time = 6.0
        clock.reached = 4.0
        first = timer.lap()
    assert first == {"time/forward": 4.0, "time/other": 0.0}
    clock.time, clock.reached = 7.0, float("inf")
    assert timer.lap() == {"time/optimizer": 2.0, "time/other": 1.0}
    clock.time, clock.reached = 8.0, 6.5
    assert timer.lap() == {}


def test_sections_close_on_errors_and_mean_nothing_without_a_timer(clock, timer):
    with pytest.raises(ValueError), section("data"):
        clock.time = 1.0
        raise ValueError
    clock.time = 2.0
    timer.remove()
    with section("data"):
        clock.time = 3.0
    MegatronTimers()("forward-compute").start()
    MegatronTimers()("forward-compute").stop()
    assert timer.lap() == {"time/data": 1.0, "time/other": 2.0}


def test_a_section_decorates_a_function_many_times(clock, timer):
    @section("validation")
    def validate():
        clock.time += 1.0

    validate()
    validate()
    assert timer.lap()["time/validation"] == 2.0
