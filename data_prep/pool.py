"""Worker processes that cannot hang: the parent watches pipes and process ends together.

Only chunk numbers go out and only a short summary comes back. When a worker dies (a signal, out of memory), the
parent says so and stops; finished parts stay, and the same command continues.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from traceback import format_exc
from typing import Any, cast

from megatron_mixcpt.errors import MixcptError, StoppedError

Work = Callable[[Any], Any]


class Pool:
    """Worker processes that each call `make_work()` once and its result for every task.

    `make_work` must be picklable. With one worker everything happens in this process. Use as a context.
    """

    def __init__(self, make_work: Callable[[], Work], workers: int) -> None:
        self._make_work, self.size = make_work, max(1, workers)
        self._processes: dict[Connection, Any] = {}
        self._work: Work | None = None

    def __enter__(self) -> "Pool":
        if self.size == 1:
            self._work = self._make_work()
            return self
        context: Any = multiprocessing.get_context(_start_method())
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._make_work, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
        return self

    def run(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of every task, in any order.

        Raises the worker's own MixcptError or OSError, or StoppedError when a worker was killed.
        """
        if self._work is not None:
            yield from map(self._work, tasks)
        else:
            yield from _dispatch(self._processes, iter(tasks))

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            # Closing the pipe would not do: forked workers hold copies of it. A busy worker is not waited for.
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()


def _start_method() -> str:
    """fork is quick, but only safe while no library has started threads of its own. The engines do when they encode:
    this process must not encode before its workers are there."""
    threaded = {"torch", "pyarrow"} & sys.modules.keys() or threading.active_count() > 1
    return "spawn" if threaded else "fork"


def _dispatch(pool: dict[Connection, Any], tasks: Iterator[Any]) -> Iterator[Any]:
    busy: set[Connection] = set()

    def give(connection: Connection) -> None:
        for task in tasks:
            connection.send(task)
            busy.add(connection)
            return
        busy.discard(connection)

    for connection in pool:
        give(connection)
    while busy:
        for connection in cast(list[Connection], wait(list(busy))):
            try:
                ok, result = connection.recv()
            except (EOFError, ConnectionResetError):
                raise StoppedError(_obituary(pool[connection])) from None
            if not ok:
                raise result
            give(connection)
            yield result


def _obituary(process: Any) -> str:
    process.join(timeout=5)
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        cause = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        cause = f"ended with code {code}"
    return f"a worker process {cause}; finished parts are kept, run the same command again to continue"


def _serve(make_work: Callable[[], Work], connection: Connection, parent: int) -> None:
    # The parent decides on Ctrl-C, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    try:
        work = make_work()
        while True:
            task = connection.recv()
            if task is None:
                return
            connection.send((True, work(task)))
    except (BrokenPipeError, EOFError):  # the parent is gone
        return
    except (MixcptError, OSError) as error:
        connection.send((False, error))
    except Exception:
        connection.send((False, MixcptError(f"a worker failed unexpectedly; please report this:\n{format_exc()}")))


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, however that dies."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
