"""Several ranks on this machine for `--nproc N`.

torchrun turns every failure of a worker into exit code 1 and is killed by SIGUSR1; this launcher passes signals on and
exit codes back, which the contract of `mixcpt` (75: stopped, resumable) needs. On clusters use srun or torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_mixcpt.errors import LAST_WORDS
from megatron_mixcpt.runtime.forked import ForkedRank, can_fork, start_tracker
from megatron_mixcpt.runtime.stop import STOP_SIGNALS

GRACE_SECONDS = 20.0  # for the peers of a rank that ended badly
FIRST_EXTRA_SECONDS = 40.0  # more for rank 0, which lets wandb finish and then says why
# Below the ports that Linux, by default, gives to outgoing connections (net.ipv4.ip_local_port_range), one of which
# could otherwise take a port in the seconds between `free_port` and rank 0's listening on it; and below those that
# launch/mixcpt.sbatch takes.
LISTENING_PORTS = range(10000, 20000)
# Variables that launchers set; torchrun's own tell torch to look for a store that torchrun serves.
LAUNCHED_BY = re.compile(
    rf"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME|TORCHELASTIC_.*|{LAST_WORDS})"
)
_offers = itertools.count(random.SystemRandom().randrange(len(LISTENING_PORTS)))


def free_port() -> int:
    """A local port that nobody listens on and that this process has not been given yet."""
    for offer in itertools.islice(_offers, len(LISTENING_PORTS)):
        port = LISTENING_PORTS[offer % len(LISTENING_PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port of {LISTENING_PORTS.start}-{LISTENING_PORTS.stop - 1} is free on this machine")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """`--nproc`, of the commands that start ranks of their own."""
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="ranks to start on this machine (default 1; not under srun, torchrun)",
    )


def is_distributed() -> bool:
    """Whether a launcher (this one, torchrun, srun) has already placed this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def unplaced(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher has put there."""
    return {name: value for name, value in environment.items() if not LAUNCHED_BY.fullmatch(name)}


@contextlib.contextmanager
def ranks_of_our_own(device: str) -> Iterator[None]:
    """For a run in small inside of another command: what this process may have from a launcher is kept away from the
    ranks that are launched in the context, which run on `device` (cpu or cuda)."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(unplaced(kept) | {"MIXCPT_DEVICE": device, "OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def launch(nproc: int, arguments: Sequence[str], program: str = "megatron_mixcpt.cli") -> int:
    """Run `mixcpt ARGUMENTS`, or another module, in `nproc` ranks; returns the exit code of the first rank that did not
    end with 0.

    Signals are passed on to all ranks. When a rank ends with an error its peers, which would wait for it until the
    collective times out, are given a grace period and then killed.
    """
    port = free_port()
    last_words = tempfile.TemporaryDirectory(prefix="mixcpt-ranks-")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    ranks: list[subprocess.Popen | ForkedRank] = []
    forked = can_fork(os.environ)
    if forked:
        start_tracker()

    def forward(number: int, frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    # Ranks begin with these signals blocked and take them when they have handlers: none dies of one while it loads.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for rank in range(nproc):
            environment = unplaced(os.environ) | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": threads,
                LAST_WORDS: last_words.name,
            }
            # Each in a group of its own: the terminal's ^C reaches the rank once, through `forward`.
            if forked:
                ranks.append(ForkedRank(program, arguments, environment))
            else:
                command = [sys.executable, "-m", program, *arguments]
                ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return _wait(ranks)
    finally:
        for process in ranks:
            # The rank's group: a rank that was killed leaves helper processes behind (loader, checkpoint writer).
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.poll() is None:  # it may not have come to having a group
                process.send_signal(signal.SIGKILL)
            process.wait()
        _tell_what_rank_0_did_not(Path(last_words.name), nproc)
        last_words.cleanup()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell_what_rank_0_did_not(last_words: Path, nproc: int) -> None:
    said = {""}
    for rank in range(nproc):
        path = last_words / str(rank)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if rank > 0 and text not in said:
            print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
        said.add(text)


def _wait(ranks: Sequence[subprocess.Popen | ForkedRank]) -> int:
    first: int | None = None  # that did not end with 0
    deadline = float("inf")
    running = True
    while running and time.monotonic() < deadline + (0.0 if ranks[0].poll() is not None else FIRST_EXTRA_SECONDS):
        time.sleep(0.05)
        running = any(rank.poll() is None for rank in ranks)
        if first is None:
            first = next((number for number, rank in enumerate(ranks) if rank.returncode), None)
            deadline = deadline if first is None else time.monotonic() + GRACE_SECONDS
    if first is None:
        return 0
    code = ranks[first].returncode or 0
    if code < 0 and -code not in STOP_SIGNALS:  # else it had the time to say something
        why = ", as the kernel does where memory runs out" if code == -signal.SIGKILL else ""
        print(f"rank {first}: killed by {signal.Signals(-code).name}{why}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code  # ended by a signal: the shell's convention
