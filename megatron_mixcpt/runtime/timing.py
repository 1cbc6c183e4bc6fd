"""Where the time of a run goes: every moment belongs to one section, so that the parts add up to the whole.

    with section("teacher"):        # anywhere in the code; costs nothing where no timer runs
        ...

On a GPU the moments are CUDA events on the current stream. They are read when the device has passed them anyway: what
it has not finished yet when a row is written is counted to the next row, and no step ever waits for a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

OTHER = "other"
WHOLE = (
    "teacher",
    "validation",
    "checkpoint",
)  # what runs inside these is theirs: a teacher's forward pass is no step's
_active: StepTimer | None = None


class Clock(Protocol):
    """Takes moments without waiting for anything."""

    def now(self) -> Any: ...
    def passed(self, moment: Any) -> bool: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """perf_counter: on the CPU, work is done when the call returns."""

    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """CUDA events: when the device, not the host, gets there."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


class StepTimer:
    """Attributes time to nested sections; inside an inner section the outer one stands still.

    Args:
        device: decides on the clock.
        clock: another clock, for tests.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self._clock = clock or (DeviceClock() if device.type == "cuda" else HostClock())
        self._stack: list[tuple[str, AbstractContextManager[Any]]] = []
        self._marks: list[tuple[Any, str]] = [(self._clock.now(), OTHER)]  # since when which section runs
        self.label: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        """Opened around every section: the profiler's labels, while it traces."""

    def push(self, name: str) -> None:
        outer = self._stack[-1][0] if self._stack else OTHER
        label = self.label(name)
        label.__enter__()
        self._stack.append((outer if outer in WHOLE else name, label))
        self._mark()

    def pop(self) -> None:
        _, label = self._stack.pop()
        label.__exit__(None, None, None)
        self._mark()

    def lap(self) -> dict[str, float]:
        """`{"time/<section>": seconds}` since the last lap, as far as the device has got."""
        self._mark()
        last = len(self._marks) - 1
        while not self._clock.passed(self._marks[last][0]):
            last -= 1
            if last < 0:
                return {}
        seconds: dict[str, float] = {}
        for (start, name), (end, _) in zip(self._marks[:last], self._marks[1 : last + 1]):
            key = f"time/{name}"
            seconds[key] = seconds.get(key, 0.0) + self._clock.seconds(start, end)
        self._marks = self._marks[last:]
        return seconds

    def install(self) -> None:
        """Let `section` mean this timer, until `remove`."""
        global _active
        _active = self

    def remove(self) -> None:
        global _active
        if _active is self:
            _active = None

    def _mark(self) -> None:
        self._marks.append((self._clock.now(), self._stack[-1][0] if self._stack else OTHER))


@contextmanager
def section(name: str) -> Iterator[None]:
    """Count the time of this block (or, as a decorator, function) as `time/<name>` of the running timer, if any."""
    timer = _active
    if timer is None:
        yield
        return
    timer.push(name)
    try:
        yield
    finally:
        timer.pop()


class MegatronTimers:
    """What megatron-core's schedules call as `config.timers(name, log_level=...).start()` and `.stop()`."""

    def __call__(self, name: str, log_level: int | None = None) -> _Hook:
        return _HOOKS.get(name) or (_COMMUNICATION if name.endswith(_TRAFFIC) else _NOTHING)


class _Hook:
    def __init__(self, name: str | None) -> None:
        self._name = name

    def start(self, barrier: bool = False) -> None:
        """Never a barrier: measuring must not change what is measured."""
        if _active is not None and self._name is not None:
            _active.push(self._name)

    def stop(self, barrier: bool = False) -> None:
        if _active is not None and self._name is not None:
            _active.pop()


_HOOKS = {"forward-compute": _Hook("forward"), "backward-compute": _Hook("backward")}
_COMMUNICATION, _NOTHING = _Hook("communication"), _Hook(None)
_TRAFFIC = ("-recv", "-send", "-sync", "-all-reduce")
