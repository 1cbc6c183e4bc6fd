"""Failures that reach the trainer as RuntimeErrors of the libraries below it, in words that say what happened."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from megatron_mixcpt.errors import LostRankError, MixcptError, StoppedError
from megatron_mixcpt.runtime.stop import StopRequest, stopped_early

# What gloo and nccl say when the other end of a connection is gone.
LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|connectFullMesh|"
    r"Timed out waiting|remote process exited|NCCL error|Socket Timeout|failed to recv|failed to send|wait timeout",
    re.IGNORECASE,
)
LOST_WORKER = re.compile(r"DataLoader worker .*(killed|exited)")

SIGNALS_APART_SECONDS = 3.0  # ranks are told to stop one after another; the first may be gone before the last knows


def tell_alone(error: MixcptError) -> MixcptError:
    """Print an error that only this rank knows of: of all others, rank 0 prints the one message."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
    return error


@contextlib.contextmanager
def explained(stop: StopRequest) -> Iterator[None]:
    """Turn the loss of a peer or of a data worker into MixcptErrors, and early stops into StoppedErrors."""
    try:
        yield
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        text = str(error)
        if stop.early:  # wrapped by the library that was at work, or the peers stopped first and were missed
            raise stopped_early() from None
        if not isinstance(error, RuntimeError):
            raise
        if LOST_WORKER.search(text):
            raise tell_alone(
                MixcptError(
                    f"a data loader process died ({text.splitlines()[0]}): most often /dev/shm or memory is full; see "
                    "`mixcpt doctor`, or set data.num_workers=0. Run the same command to resume"
                )
            ) from error
        if LOST_PEER.search(text):
            if stop.follows(SIGNALS_APART_SECONDS):
                raise stopped_early() from None
            raise LostRankError(
                f"lost contact with another rank ({text.splitlines()[0][:200]}): it ended or cannot be reached, and "
                "its own output says why; stacks are in run_dir/stacks. Run the same command to resume from the newest "
                "checkpoint"
            ) from error
        raise
