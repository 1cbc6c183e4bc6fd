"""The end of a rank after an error, also where NCCL is stuck.

NCCL may wait for peers that are gone, or inside of collectives, when its groups are taken down and again when the
process exits. Nothing has been printed by then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback

from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.runtime.failures import named

CAN_HANG = ("nccl",)  # backends
GRACE_SECONDS = 20.0  # for groups to be taken down, and for the message to be printed where everybody expects it


def end_within(seconds: float, error: BaseException) -> None:
    """After `seconds` print the error and end this process with its exit code, whatever it is waiting for.

    After twice that time, which only a process that hangs in its very exit sees, the kernel ends it (SIGALRM).
    """

    def leave() -> None:
        time.sleep(seconds)
        try:
            known = named(error)
            text = str(known) if known else "".join(traceback.format_exception(error)).strip()
            print(f"rank {os.environ.get('RANK', '0')}: error: {text}", file=sys.stderr)
            print(f"(ended hard: the process groups were not taken down within {seconds:g} s)", file=sys.stderr)
            sys.stderr.flush()
        finally:
            os._exit(exit_code(error))

    threading.Thread(target=leave, name="leaving", daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)


def exit_code(error: BaseException) -> int:
    """What a process ends with that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, MixcptError) else 1
