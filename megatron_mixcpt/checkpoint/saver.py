"""Saving: in the foreground or behind the training, always the same steps, always all ranks with the same outcome.

    begin   (together)  plan who writes what; with `background`, copy the values
    write   (alone)     each rank its share: write, hash, flush
    finish  (together)  when all shares are written: index, manifest, rename, latest.json, remove old ones

A failure anywhere is known to all ranks in `finish`; then nothing becomes visible and nothing old is removed.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_mixcpt.checkpoint.info import CheckpointInfo, TrainingState
from megatron_mixcpt.checkpoint.optimizer_state import common_state, optimizer_step_count
from megatron_mixcpt.checkpoint.shares import written_here
from megatron_mixcpt.checkpoint.store import commit, new_directory, prune, require_space
from megatron_mixcpt.checkpoint.touch import join_in_touch
from megatron_mixcpt.checkpoint.writer import Buffers, ShareWriter, plan_share, write_index
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.runtime.first_rank import from_first

RESERVE = 1 << 20  # bytes beyond the tensors: indices, manifest, directory


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank: `path` when it is complete and visible, else `error`."""

    step: int
    seconds: float
    """From `begin` to now."""
    blocked: float
    """Of these, how long training stood still."""
    path: Path | None = None
    error: str | None = None


@dataclass
class _Pending:
    step: int
    info: CheckpointInfo
    common: dict[str, Any]
    began: float
    folder: Path | None
    writer: ShareWriter | None
    error: str | None  # of this rank
    written: Any = None
    blocked: float = 0.0

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=_write, args=(self,), name="checkpoint", daemon=True)


class Saver:
    """Writes checkpoints of a run under `parent`. All methods are collective.

    Args:
        keep: after a save, keep this many of the newest checkpoints; None keeps all.
        keep_every: and those of every n-th step; 0 keeps none of them.
        background: write while training goes on, one save at a time.
        add_files: called on rank 0 with the folder, when all shares are in it; what it adds belongs to the checkpoint.
    """

    def __init__(
        self,
        parent: Path,
        *,
        keep: int | None = None,
        keep_every: int = 0,
        background: bool = False,
        add_files: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.parent, self.keep, self.keep_every, self.background = parent, keep, keep_every, background
        self.spared: int | None = None  # step of a checkpoint that is kept, however old
        self._add_files = add_files
        self._pending: _Pending | None = None
        self._buffers: Buffers | None = {} if background else None

    def begin(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: MegatronOptimizer | None = None,
        training: TrainingState | None = None,
    ) -> None:
        """Start saving; `poll` or `finish` tells how it ended. Finish a save that is under way first.

        Without `background` no value may change before `finish`.

        Args:
            model: this rank's stage, bare or wrapped.
            optimizer: None saves weights alone.
            training: what the run needs to go on from here.
        """
        assert self._pending is None, "a save is under way"
        began = time.monotonic()
        stage = unwrap_model(model)
        share = written_here(stage.sharded_state_dict(), optimizer)
        common = {} if optimizer is None else {"optimizer": common_state(optimizer)}
        info = CheckpointInfo(
            step,
            stage.arch,
            None if optimizer is None else optimizer_step_count(optimizer),
            stage.adapter,
            training=training,
        )
        folder, error = _from_first(lambda: new_directory(self.parent, step))
        pending = _Pending(step, info, common, began, folder, None, error)
        self._pending = pending
        if folder is not None:
            pending.writer = plan_share(share, folder, self._buffers)
            needed = torch.tensor([pending.writer.num_bytes], dtype=torch.int64, device=torch.cuda.current_device())
            torch.distributed.all_reduce(needed)
            _, pending.error = _from_first(lambda: require_space(self.parent, int(needed.item()) + RESERVE))
        pending.thread.start()
        pending.blocked = time.monotonic() - began

    def poll(self) -> Outcome | None:
        """The outcome, if a save has been written by all ranks since the last call."""
        if self._pending is None:
            return None
        done = torch.tensor([not self._pending.thread.is_alive()], device=torch.cuda.current_device()).int()
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        return self.finish() if done.item() else None

    def finish(self) -> Outcome | None:
        """Wait for the save that is under way, and tell how it ended; None where there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        began = time.monotonic()
        join_in_touch(pending.thread, lambda: pending.writer.num_written if pending.writer is not None else 0)
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (pending.written, pending.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(shares) if error]
        path, error = None, errors[0] if errors else None
        if error is None:
            path, error = _from_first(lambda: self._commit(pending, [written for written, _ in shares]))
        if error is not None and torch.distributed.get_rank() == 0 and pending.folder is not None:
            shutil.rmtree(pending.folder, ignore_errors=True)
        now = time.monotonic()
        return Outcome(pending.step, now - pending.began, pending.blocked + now - began, path, error)

    def _commit(self, pending: _Pending, shares: list[Any]) -> Path:
        assert pending.writer is not None and pending.folder is not None
        write_index(pending.writer, [results for results, _ in shares], pending.common)
        self._add_files(pending.folder)
        known = {name: entry for _, entries in shares for name, entry in entries.items()}
        path = commit(pending.folder, pending.info, known)
        if self.keep is not None:
            remove = _remove_later if self.background else partial(shutil.rmtree, ignore_errors=True)
            with contextlib.suppress(OSError):  # this checkpoint is whole; the next save tries again
                prune(self.parent, self.keep, self.keep_every, self.spared, remove=remove)
        return path


def _remove_later(folder: Path) -> None:
    """Deleting takes a file system as long as writing. A run that ends waits for it; what one leaves that dies, the
    next save removes."""
    threading.Thread(target=shutil.rmtree, args=(folder, True), name="remove-checkpoint", daemon=False).start()


def _write(pending: _Pending) -> None:
    if pending.writer is None or pending.error is not None:
        return
    try:
        pending.written = pending.writer.write()
    except Exception as error:  # torch wraps what the disk says in errors of its own
        pending.error = _reason(error)


def _from_first(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Rank 0's `(result, None)` or `(None, reason)`, on every rank."""

    def attempt() -> tuple[Any, str | None]:
        try:
            return action(), None
        except (OSError, RuntimeError, MixcptError) as error:
            return None, _reason(error)

    return from_first(attempt)


def _reason(error: BaseException) -> str:
    """The disk's own words where there are some: torch reports a full disk as an unexpected position."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (OSError, MixcptError)):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
