"""Many short-lived training processes: forked from a server that has the libraries loaded but no threads, no gloo.

Starting an interpreter with torch takes seconds; these tests start hundreds. Everything a process does after its start,
signals, exit codes and files included, is what `mixcpt train` does: it is `mixcpt train`.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from tests.helpers.ports import free_port
from tests.helpers.spawn import process_context

FULL = os.environ.get("MIXCPT_FAULTS") == "full"  # make test-faults
STACKS = signal.SIGUSR2  # makes a rank print where it stands
PATIENCE = 240  # seconds after which a process counts as hanging, on a machine that has other things to do


def count(full, short):
    """How often to do something: as often as the aims say, or often enough to notice a regression."""
    return full if FULL else short


def _run(arguments, environment, log, fault):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import sys

    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.register(STACKS, all_threads=True)
    from megatron_mixcpt.cli import main

    multiprocessing.current_process()._config["daemon"] = False  # a rank may start data workers
    if fault is not None:
        function, *rest = fault
        function(*rest)
    try:
        code = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as after `mixcpt`, and without the fork server's teardown


class Fleet:
    """The ranks of one `mixcpt train`.

    `faults`: `{rank: (function, *arguments)}`, called in the rank before it trains.
    """

    def __init__(self, config, *overrides, ranks=1, faults=None, arguments=()):
        self.log = Path(config).with_suffix(".log")
        launch = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(ranks):
            environment = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            command = ["train", str(config), *overrides, *arguments]
            process = process_context().Process(
                target=_run, args=(command, environment, str(self.log), (faults or {}).get(rank)), daemon=True
            )
            process.start()
            self.processes.append(process)

    def send(self, number, *only):
        for process in only or self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def wait(self, patience=PATIENCE):
        """Exit codes by rank; negative where a signal killed. Fails the test where a rank does not end."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if hanging:
            self.send(STACKS)
            time.sleep(1)
        self.send(signal.SIGKILL)
        assert not hanging, f"ranks {hanging} hang\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def until(self, condition, patience=PATIENCE):
        """Wait for `condition()`; False where the ranks end before."""
        deadline = time.monotonic() + patience
        while not condition():
            if not self.alive():
                return bool(condition())
            assert time.monotonic() < deadline, f"waited in vain\n{self.output()}"
            time.sleep(0.002)
        return True

    def output(self):
        return self.log.read_text() if self.log.exists() else ""


def finish(config, *overrides, ranks=1, faults=None, arguments=(), code=0):
    """Run to the end and return the output; every rank must end with `code`."""
    fleet = Fleet(config, *overrides, ranks=ranks, faults=faults, arguments=arguments)
    codes = fleet.wait()
    assert codes == [code] * ranks, f"exit codes {codes}\n{fleet.output()}"
    return fleet.output()


def write_config(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(run_dir, name):
    """`{step: value}` of a metric."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written
    return {row["step"]: row[name] for row in rows if name in row}


@contextmanager
def timed():
    began, result = time.monotonic(), {}
    yield result
    result["seconds"] = time.monotonic() - began


def at_step(number, action, *arguments):
    """Do something in the middle of the `number`-th training step of this process."""
    from megatron_mixcpt.objectives.step import ForwardBackward

    original, seen = ForwardBackward._forward_step, 0

    def wrapped(self, *step, **options):
        nonlocal seen
        if torch.is_grad_enabled() and self.num_sources > 1:  # not validation
            seen += 1
            if seen == number:
                action(*arguments)
        return original(self, *step, **options)

    ForwardBackward._forward_step = wrapped
