"""Worker processes that cannot hang: the parent watches pipes and process ends together.

Only chunk numbers go out and only a short summary comes back. When a worker dies (a signal, out of memory), the
parent says so and stops; finished parts stay, and the same command continues.
"""

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


def run_pool(make_work: Callable[[], Work], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield `make_work()(task)` for every task, in any order. `make_work` must be picklable; it runs in each worker.

    Raises the worker's own MixcptError, or StoppedError when a worker was killed.
    """
    if workers <= 1:
        work = make_work()
        for task in tasks:
            yield work(task)
        return
    context: Any = multiprocessing.get_context(_start_method())
    pool: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make_work, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        yield from _dispatch(pool, iter(tasks))
    finally:
        for connection, process in pool.items():
            connection.close()
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def _start_method() -> str:
    """fork is quick, but only safe while no library has started threads of its own."""
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
    # The parent decides on Ctrl-C; it closes the pipe, and recv below ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(parent)
    try:
        work = make_work()
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            connection.send((True, work(task)))
    except BrokenPipeError:  # the parent is gone
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
