"""What rank 0 finds out or does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from megatron_mixcpt.errors import MixcptError

Result = TypeVar("Result")


def from_first(action: Callable[[], Result]) -> Result:
    """Collective: what `action` returns on rank 0, on every rank; a MixcptError that it raises there, too.

    `action` must be short: the others wait in a collective, which has a time limit (for long work: align/rank0.py).
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
