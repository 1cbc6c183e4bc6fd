"""Errors a user can act on. The command line prints the message alone and exits with `exit_code`."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

LAST_WORDS = "MIXCPT_LAST_WORDS"
"""Variable of ranks that `--nproc` started: the folder for what each ended with."""


class MixcptError(Exception):
    """What was wrong, where (file, line or key), and what to do about it."""

    exit_code = 1
    told = False
    """Whether it has been printed."""


class ConfigError(MixcptError):
    """A wrong key or value in a configuration file or on the command line."""

    exit_code = 2


class VerificationError(MixcptError):
    """Data or a checkpoint does not match its manifest."""

    exit_code = 3


class BadRecordsError(MixcptError):
    """More input records were bad than the budget allows."""

    exit_code = 4


class StoppedError(MixcptError):
    """Stopped on request; running the same command again resumes (EX_TEMPFAIL)."""

    exit_code = 75


class LostRankError(MixcptError):
    """Another rank ended. It has its own message; this one says only how the loss was noticed."""


def tell(error: MixcptError) -> None:
    """Print an error, once.

    Where ranks share a terminal rank 0 prints what all of them met; the others leave theirs to the launcher, which
    prints what rank 0 did not say. On clusters, where each rank has a log of its own, all print.
    """
    if error.told:
        return
    error.told = True
    rank, folder = os.environ.get("RANK", "0"), os.environ.get(LAST_WORDS)
    if rank != "0" and isinstance(error, (StoppedError, LostRankError)):  # somebody else's story
        return
    # What was stopped on request says so itself, and is no error.
    text = str(error) if isinstance(error, StoppedError) else f"error: {error}"
    try:
        if folder:
            Path(folder, rank).write_text(text, encoding="utf-8")
    except OSError:
        folder = None
    if rank == "0" or not folder:
        with contextlib.suppress(OSError):  # a terminal that is closed
            print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
