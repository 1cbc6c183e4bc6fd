"""Work of rank 0 alone, however long it takes.

The other ranks neither end, since launchers kill what is left some time after the first (`srun --wait`), nor wait in a
collective, which has a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.parallel import ParallelState
from megatron_mixcpt.train.failures import LostRankError

POLL_SECONDS = 0.5
Result = TypeVar("Result")


def on_rank_0(name: str, work: Callable[[], Result], state: ParallelState) -> Result:
    """What `work` returns on rank 0, on every rank; the others sleep meanwhile. Collective, once a `name`.

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
    key = f"rank 0: {name}"
    if state.rank == 0:
        state.store.set(key, "done")
    while not state.store.check([key]):
        time.sleep(POLL_SECONDS)
    torch.distributed.broadcast_object_list(outcome, src=0)
    torch.distributed.barrier()  # rank 0 may hold the others' connections: it ends when they know
