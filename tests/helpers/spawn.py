"""The one way tests start several processes: gloo, a timeout that dumps every rank's stacks."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.helpers.ports import free_port

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.helpers.preload"])


def process_context() -> Any:
    """Processes that start in milliseconds: forked from a server which has the trainer's libraries loaded, and neither
    threads nor process groups, so that what makes forked gloo processes deadlock is not there. CUDA does not survive a
    fork: where there is a GPU each is a new interpreter."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the server, which keeps the environment it started with
    return _forkserver


def _entry(fn, rank, world_size, port, folder, deadline, environment, args):
    os.setsid()  # a group of its own, so that what the rank starts can be ended with it
    gc.freeze()  # what the server has loaded stays: to look through it took each grid of ranks half a second at its end
    os.environ.clear()  # of the server, which may have been started in a test that had set something
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    with open(folder / f"{rank}.stacks", "w") as stacks:
        # Fires a little before the parent gives up, so that each rank says where it stood.
        faulthandler.dump_traceback_later(max(deadline - time.time() - 5, 1), file=stacks, exit=False)
        try:
            torch.set_num_threads(1)
            result = (True, fn(rank, world_size, *args))
        except BaseException:
            result = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
    partial = folder / f"{rank}.partial"
    try:
        partial.write_bytes(pickle.dumps(result))
    except Exception:
        partial.write_bytes(pickle.dumps((False, f"the result cannot be pickled: {traceback.format_exc()}")))
    partial.rename(folder / f"{rank}.result")
    # Skips interpreter teardown: a gloo group whose peer failed can block there for minutes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if result[0] else 1)


def run_distributed(fn, world_size, *args, timeout=180):
    """Run `fn(rank, world_size, *args)` in `world_size` processes and return their results by rank.

    `fn` must be importable (a module-level function) and its result picklable. Raises AssertionError with the first
    failing rank's traceback, or with every rank's stacks if the processes have not ended after `timeout` seconds.
    """
    context = process_context()
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_entry, args=(fn, rank, world_size, port, folder, time.time() + timeout, dict(os.environ), args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in processes):
                deadline = min(deadline, time.monotonic() + 10)  # peers of a dead rank only wait for it
            time.sleep(0.05)
        hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        results = {}
        for rank in range(world_size):
            path = folder / f"{rank}.result"
            if path.exists():
                results[rank] = pickle.loads(path.read_bytes())
        failures = [f"rank {rank} failed:\n{out}" for rank, (ok, out) in results.items() if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        if hung or len(results) < world_size:
            stacks = "\n".join(
                f"--- rank {rank}\n{(folder / f'{rank}.stacks').read_text() or 'ended without a result'}"
                for rank in range(world_size)
                if rank not in results and (folder / f"{rank}.stacks").exists()
            )
            raise AssertionError(f"ranks {hung or 'that died'} did not finish within {timeout} s\n{stacks}")
        return [results[rank][1] for rank in range(world_size)]
