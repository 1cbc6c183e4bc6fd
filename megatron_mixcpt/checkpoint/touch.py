"""Long work on files, during which the ranks keep in touch: a long one is told from one that hangs, and no rank waits
for another in a collective, which has a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from megatron_mixcpt.runtime.watchdog import alive

TOUCH_SECONDS = 1.0

Result = TypeVar("Result")


class Amount:
    """How many bytes are done; a lower bound where threads add at the same time."""

    def __init__(self) -> None:
        self.done = 0


def in_touch(work: Callable[[], Result], amount: Amount) -> Result:
    """Collective: what `work`, which counts in `amount`, returns or raises here, when it has ended on all ranks."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="in touch", daemon=True)
    thread.start()
    join_in_touch(thread, lambda: amount.done)
    return future.result()


def join_in_touch(thread: threading.Thread, num_done: Callable[[], int]) -> None:
    """Collective: until the threads of all ranks have ended. The watchdog hears of it while some rank gets on, and
    never while all stand still."""
    before = -1
    while True:
        thread.join(TOUCH_SECONDS)
        state = torch.tensor([thread.is_alive(), num_done()], device=torch.cuda.current_device(), dtype=torch.int64)
        torch.distributed.all_reduce(state)
        working, done = state.tolist()
        if done > before:
            before = done
            alive()
        if not working:
            return
