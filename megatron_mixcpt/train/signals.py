"""Stop requests: SIGTERM, SIGUSR1 and SIGINT.

While a run is being set up there is nothing to save: they end it at once. From the first step on they become a flag
that all ranks agree on after the step, validation batch or save in flight.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:  # this module is imported before anything heavy: a signal may come in the first second
    import torch


class StopRequest:
    """Context that turns stop signals into StoppedError until `defer()`, and into a flag afterwards.

    A second SIGINT interrupts at once, for the user who does not want to wait.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = self._ready = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        # A launcher may have blocked them until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise StoppedError where a stop was asked for early; libraries may have swallowed it while they loaded."""
        if self.early:
            raise stopped_early()

    def defer(self, device: torch.device) -> bool:
        """Collective: from now on stop at the end of a step; whether some rank is to stop before the first.

        Raises like `check`.
        """
        self.check()
        self._deferred = True
        stopping = self.agreed(device)
        self._ready = True
        return stopping

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """After `defer`: within it a stop, also one that came before, raises on this rank as it did before `defer`."""
        self._deferred = self._ready = False
        try:
            self.check()
            yield
        finally:
            self._deferred = self._ready = True

    @property
    def early(self) -> bool:
        """Whether a stop was asked for before all ranks were ready to save."""
        return self.received is not None and not self._ready

    def follows(self, seconds: float) -> bool:
        """Whether a stop before the first step reaches this rank within `seconds`; it may raise StoppedError itself."""
        deadline = time.monotonic() + seconds
        while not self._ready and not self.early and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.early

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if not self._deferred:
            raise stopped_early()

    def agreed(self, device: torch.device) -> bool:
        """Collective: whether any rank was asked to stop."""
        import torch

        flag = torch.tensor([self.received is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


def stopped_early() -> StoppedError:
    return StoppedError("stopped as asked before the first step; nothing is lost: run the same command to go on")
