"""What rank 0 finds out or does for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_mixcpt.errors import LostRankError, MixcptError

if TYPE_CHECKING:
    from megatron_mixcpt.runtime.parallel import ParallelState

POLL_SECONDS = 0.5
Result = TypeVar("Result")


def from_first(action: Callable[[], Result]) -> Result:
    """Collective: what `action` returns on rank 0, on every rank; a MixcptError that it raises there, too.

    `action` must be short: the others wait in a collective, which has a time limit (for long work: `on_first`).
    """
    import torch

    message: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            message[0] = action()
        except MixcptError as error:
            message[1] = error
    torch.distributed.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def on_first(name: str, work: Callable[[], Result], state: ParallelState) -> Result:
    """What `work` returns on rank 0, on every rank, however long it takes. Collective, once a `name`.

    The other ranks neither end, since launchers kill what is left some time after the first (`srun --wait`), nor wait
    in a collective, which has a time limit: they sleep.

    Raises what `work` raised, on every rank where it is a MixcptError, else LostRankError on the others.
    """
    outcome: list[Any] = [None, None]
    if state.rank == 0:
        try:
            outcome[0] = work()
        except BaseException as error:
            outcome[1] = error
            if not isinstance(error, MixcptError):
                outcome[1] = LostRankError("rank 0 failed in work that it does alone; its own output says why")
            _tell(name, outcome, state)
            raise
    _tell(name, outcome, state)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _tell(name: str, outcome: list[Any], state: ParallelState) -> None:
    import torch

    key = f"rank 0: {name}"
    if state.rank == 0:
        state.store.set(key, "done")
    while not state.store.check([key]):
        time.sleep(POLL_SECONDS)
    torch.distributed.broadcast_object_list(outcome, src=0)
    torch.distributed.barrier()  # rank 0 may hold the others' connections: it ends when they know
