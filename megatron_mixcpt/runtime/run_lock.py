"""One run at a time in a run directory, on any file system that several machines share.

The lock is a file with its owner's name, created exclusively, which NFS does atomically too, and touched while its
owner lives. File locks of the kernel would be simpler, but are missing or local to a node on many parallel file
systems. An owner counts as dead when its process is gone (on this machine), when it was an earlier start of this very
SLURM job, or when it has not touched the file for LEASE_SECONDS by the file server's clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.first_rank import from_first

LOCK = "run.lock"
BEAT_SECONDS = 10.0
LEASE_SECONDS = 120.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    token: str
    host: str
    machine: str
    """Boot and process namespace: where `pid` means something."""
    pid: int
    started: int | None
    """See _started: numbers of processes are used again."""
    job: str | None
    """SLURM job."""
    restart: int
    """How often SLURM has restarted it."""

    @classmethod
    def this_process(cls) -> Owner:
        boot = Path("/proc/sys/kernel/random/boot_id")
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=(boot.read_text().strip() if boot.exists() else "") + os.readlink("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", SLURM job {self.job}" if self.job else "")


class RunLock:
    """Context: this process alone works in `run_dir`. Raises ConfigError where another one does."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._me = run_dir / LOCK, Owner.this_process()
        self._released = threading.Event()

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not _create(self._path, json.dumps(asdict(self._me))):
            self._evict()
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._released.set()
        if _read(self._path) == self._me:
            self._path.unlink(missing_ok=True)

    def _evict(self) -> None:
        """Remove the lock of a dead owner; raise ConfigError where it lives."""
        # One process at a time, or a slow one would remove the lock of whoever followed the dead owner.
        guard = self._path.with_name(f"{LOCK}.evict")
        if not _create(guard, ""):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - guard.stat().st_mtime > LEASE_SECONDS:  # ended in these few lines
                    guard.unlink()
            time.sleep(0.05)
            return
        try:
            # The guard is new: its time is that of the server's clock, as the owner's beats are.
            idle = guard.stat().st_mtime - self._path.stat().st_mtime
            owner = _read(self._path)
            if not self._is_dead(owner, idle):
                raise ConfigError(
                    f"{self._path.parent} is in use by {owner or 'another run'}, which gave a sign of life "
                    f"{max(idle, 0):.0f} s ago: wait for its end, or choose another folder. If it is dead, this "
                    f"command works {LEASE_SECONDS:.0f} s after its last sign"
                )
            self._path.unlink()
        except FileNotFoundError:
            pass  # released a moment ago
        finally:
            guard.unlink(missing_ok=True)

    def _is_dead(self, owner: Owner | None, idle: float) -> bool:
        if owner is not None and owner.machine == self._me.machine:
            return _started(owner.pid) != owner.started
        if owner is not None and owner.job and owner.job == self._me.job and owner.restart != self._me.restart:
            return True
        return idle > LEASE_SECONDS

    def _keep(self) -> None:
        """Signs of life. Ends the process if it lost the lock, asleep for longer than the lease."""
        while not self._released.wait(BEAT_SECONDS):
            owner = _read(self._path)
            if owner not in (None, self._me) and not self._released.is_set():
                print(f"error: {self._path.parent} was taken over by {owner} meanwhile", file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                os.utime(self._path)


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Collective: rank 0 holds the lock of `run_dir` for all. Every rank raises ConfigError where another run does."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            try:
                stack.enter_context(RunLock(run_dir))
            except OSError as error:
                raise ConfigError(str(error)) from error

        from_first(lock)
        yield


def _create(path: Path, text: str) -> bool:
    """Whether the file was not there before."""
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
