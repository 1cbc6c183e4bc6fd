"""Failures that reach the trainer as RuntimeErrors of the libraries below it, in words that say what happened."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator

from megatron_mixcpt.errors import LostRankError, MixcptError, StoppedError, tell
from megatron_mixcpt.runtime.stop import StopRequest, stopped_early

# What gloo and nccl say when the other end of a connection is gone.
LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|Connection refused|connectFullMesh|"
    r"Timed out waiting|remote process exited|Socket Timeout|failed to recv|failed to send|wait timeout|"
    r"ncclRemoteError|ncclSystemError|ncclInternalError|NCCL error|communicator was aborted|"
    r"collective operation timeout|collective timeout|Failed to check the \"should dump\" flag|socket .*closed",
    re.IGNORECASE,
)
# What a device says that failed, also through NCCL.
LOST_DEVICE = re.compile(
    r"CUDA error: (?!out of memory)|CUDA driver error|ncclUnhandledCudaError|unhandled cuda error|cudaErrorECC|"
    r"CUDNN_STATUS_EXECUTION_FAILED|CUBLAS_STATUS_EXECUTION_FAILED|CUBLAS_STATUS_INTERNAL_ERROR",
    re.IGNORECASE,
)
# What NCCL says of a call that was wrong: a mistake of the program, which must be seen as it is.
WRONG_CALL = re.compile(r"ncclInvalidUsage|ncclInvalidArgument", re.IGNORECASE)
LOST_WORKER = re.compile(r"DataLoader worker .*(killed|exited)")

SIGNALS_APART_SECONDS = 3.0  # ranks are told to stop one after another; the first may be gone before the last knows


def tell_alone(error: MixcptError) -> MixcptError:
    """Print an error that only this rank knows of at once: it may be killed before its command ends."""
    tell(error)
    return error


@contextlib.contextmanager
def explained(stop: StopRequest) -> Iterator[None]:
    """Within `stop`'s context: turn the loss of a peer or of a data worker into MixcptErrors."""
    try:
        yield
    except (KeyboardInterrupt, StoppedError):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if stop.early:
            raise
        known = named(error)
        if known is None or known is error:
            raise
        if not isinstance(known, LostRankError):
            raise tell_alone(known) from error
        if stop.follows(SIGNALS_APART_SECONDS):
            raise stopped_early() from None
        raise known from error


def named(error: BaseException) -> MixcptError | None:
    """The error as a user should read it; None where it is nothing that is known here."""
    if isinstance(error, MixcptError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    first = next((line for line in text.splitlines() if line.strip()), "")[:200]
    if LOST_WORKER.search(text):
        return MixcptError(
            f"a data loader process died ({first}): most often /dev/shm or memory is full; see `mixcpt doctor`, or set "
            "data.num_workers=0. Run the same command to resume"
        )
    if LOST_DEVICE.search(text):
        return MixcptError(
            f"the GPU of {platform.node()} with local rank {os.environ.get('LOCAL_RANK', '0')} failed ({first}): see "
            "nvidia-smi and `dmesg | grep Xid` there, take the node out if it fails again; an earlier kernel may have "
            "done it, which CUDA_LAUNCH_BLOCKING=1 shows. Run the same command to resume"
        )
    if LOST_PEER.search(text) and not WRONG_CALL.search(text):
        return LostRankError(
            f"lost contact with another rank ({first}): it ended or cannot be reached, and its own output says why; "
            "stacks are in run_dir/stacks. Run the same command to resume from the newest checkpoint"
        )
    return None
