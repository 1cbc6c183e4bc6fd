"""Stop requests: SIGTERM, SIGUSR1, SIGINT, and SIGHUP, which a terminal sends that is closed, unless nohup is there.

While a run is being set up there is nothing to save: they end it at once. From the first step on they become a flag
that all ranks agree on after the step, validation batch or save in flight.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from megatron_mixcpt.errors import StoppedError

if TYPE_CHECKING:  # this module is imported before anything heavy: a signal may come in the first second
    import torch

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []),
)
"""The launcher, the trainer and its helper processes agree on them."""

BLOCKED_SECONDS = 5.0  # after which a main thread that has not taken a signal counts as waiting in C++
LEAVING_SECONDS = 60.0  # for one that has taken it, to close what it opened

os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not its parent's


def end_at_stop_signals() -> None:
    """Let stop signals end this process, which has nothing to save. A launcher blocks them until somebody listens."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopRequest:
    """Context that turns stop signals into StoppedError until `defer()`, and into a flag afterwards.

    After an early stop every error that leaves the context is that stop: the library that was at work may have wrapped
    it, or the peers stopped first and were missed. A second SIGINT interrupts at once, for the user who does not want
    to wait.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = self._ready = False
        self.answer = ""
        """What rank 0 says at once when a stop is asked for that has to wait."""
        self._previous: dict[int, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> StopRequest:
        self._told, self._teller = socket.socketpair()
        self._teller.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._teller.fileno(), warn_on_full_buffer=False)
        # Blocked in the thread, which inherits that: a launcher that blocks them for a moment must not get them there.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._insist, name="stop request", daemon=True).start()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        # A launcher may have blocked them until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        self._left.set()
        self._teller.close()
        if self.early and error is not None and not isinstance(error, (KeyboardInterrupt, StoppedError)):
            raise stopped_early() from None

    def _insist(self) -> None:
        """In a thread: end a process that was told to stop and does not, where there is nothing to save.

        Handlers written in Python wait for the main thread to come back from C++, where it may be waiting for a peer
        that has already stopped, for as long as the process group's timeout.
        """
        with self._told:
            while numbers := self._told.recv(16):
                # Others may have taken over (a launcher, which passes signals on).
                ours = any(signal.getsignal(number) == self._receive for number in numbers)
                if not ours or self._left.wait(BLOCKED_SECONDS):
                    continue
                blocked = self.received is None and not self._deferred
                if blocked or not (self._left.wait(LEAVING_SECONDS) or self._ready):
                    try:
                        if os.environ.get("RANK", "0") == "0":
                            print(stopped_early(), file=sys.stderr, flush=True)
                    finally:
                        os._exit(StoppedError.exit_code)

    def check(self) -> None:
        """Raise StoppedError where a stop was asked for early; libraries may have swallowed it while they loaded."""
        if self.early:
            raise stopped_early()

    def taken(self) -> None:
        """The stop is being carried out, which may take as long as it does: this process is not ended for that."""
        self._left.set()

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
        first, self.received = self.received is None, number
        if not self._deferred:
            raise stopped_early()
        if first and self.answer and os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{self.answer}\n".encode())  # print may be in the middle of a line of its own

    def agreed(self, device: torch.device) -> bool:
        """Collective: whether any rank was asked to stop."""
        import torch

        flag = torch.tensor([self.received is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


def stopped_early() -> StoppedError:
    return StoppedError("stopped as asked before the first step; nothing is lost: run the same command to go on")
