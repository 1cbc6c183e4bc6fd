"""A temporary folder that does not stay where the process is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megatron_mixcpt.runtime.stop import STOP_SIGNALS


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder in TMPDIR, removed with the context, also where a stop signal that nobody handles ends the process."""
    with _unwound_by_signals(), tempfile.TemporaryDirectory(prefix=prefix) as name:
        yield Path(name)


@contextlib.contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Within: signals that would end the process at once leave the context first, and end it then."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in STOP_SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not cut short what the first one does
            raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])
