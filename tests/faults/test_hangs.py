"""A rank that hangs or dies takes the others with it, in time, and every rank says where it stood."""

import os
import signal
import subprocess
import sys
import time

from megatron_mixcpt.checkpoint.store import list_checkpoints
from tests.faults.conftest import run_settings
from tests.faults.fleet import Fleet, at_step, finish, metrics, timed, write_config

TIMEOUT = 8.0  # seconds without progress


def hang():
    time.sleep(3600)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_slowly(seconds):
    """Take so many seconds over each mebibyte of a checkpoint."""
    from megatron_mixcpt.checkpoint.writer import _Hashing

    original = _Hashing.write

    def wrapped(self, data):
        time.sleep(seconds * memoryview(data).nbytes / 2**20)
        return original(self, data)

    _Hashing.write = wrapped


def test_a_save_that_takes_longer_than_the_timeout_but_gets_on_is_left_alone(tmp_path, mix):
    values = run_settings(
        mix, tmp_path / "run", train={"timeout_minutes": TIMEOUT / 60, "steps": 3}, parallel={"tensor": 2}
    )
    config = write_config(tmp_path / "train.yaml", values | {"checkpoint": {"every": 0}})
    fleet = Fleet(config, ranks=2, faults={1: (write_slowly, 3.0)})  # about 5 MiB
    fleet.until(lambda: 2 in metrics(tmp_path / "run", "train/loss"))
    with timed() as took:
        codes = fleet.wait()
    assert codes == [0, 0], fleet.output()
    assert took["seconds"] > TIMEOUT and list_checkpoints(tmp_path / "run" / "checkpoints")


def read_slowly(seconds):
    """Take so many seconds over each file of a checkpoint, a little at a time."""
    from megatron_mixcpt.checkpoint import manifest

    original = manifest.hash_file

    def wrapped(path, amount=None):
        for _ in range(10 if amount is not None else 0):
            time.sleep(seconds / 10)
            amount.done += 1
        return original(path, amount)

    manifest.hash_file = wrapped


def test_a_resume_that_reads_for_longer_than_the_timeout_but_gets_on_is_left_alone(tmp_path, mix):
    """Also the rank that has read its share, and waits for the other."""
    values = run_settings(
        mix, tmp_path / "run", train={"timeout_minutes": TIMEOUT / 60, "steps": 3}, parallel={"tensor": 2}
    )
    finish(write_config(tmp_path / "train.yaml", values | {"checkpoint": {"every": 3}}), ranks=2)
    values["train"]["steps"] = 4
    with timed() as took:
        fleet = Fleet(write_config(tmp_path / "train.yaml", values), ranks=2, faults={1: (read_slowly, 1.5 * TIMEOUT)})
        codes = fleet.wait()
    assert codes == [0, 0], fleet.output()
    assert took["seconds"] > 1.5 * TIMEOUT and "resumed from" in fleet.output()


def test_a_save_that_stands_still_ends_all_ranks(tmp_path, mix):
    values = run_settings(
        mix, tmp_path / "run", train={"timeout_minutes": TIMEOUT / 60, "steps": 3}, parallel={"tensor": 2}
    )
    config = write_config(tmp_path / "train.yaml", values | {"checkpoint": {"every": 0}})
    fleet = Fleet(config, ranks=2, faults={1: (write_slowly, 1e8)})
    assert fleet.wait() == [1, 1], fleet.output()
    assert "in saving step 3" in fleet.output()
    assert "in wrapped" in (tmp_path / "run" / "stacks" / "rank_00001.txt").read_text()


def test_a_hanging_rank_ends_all_ranks_and_leaves_all_stacks(tmp_path, mix, record):
    values = run_settings(mix, tmp_path / "run", train={"timeout_minutes": TIMEOUT / 60})
    fleet = Fleet(write_config(tmp_path / "train.yaml", values), ranks=2, faults={1: (at_step, 9, hang)})
    fleet.until(lambda: metrics(tmp_path / "run", "train/loss"))
    with timed() as took:
        codes = fleet.wait()
    assert codes == [1, 1], fleet.output()
    assert "rank 1: no progress for" in fleet.output()
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert sorted(stacks) == ["rank_00000.txt", "rank_00001.txt"]
    assert "in hang" in stacks["rank_00001.txt"] and "in hang" not in stacks["rank_00000.txt"]
    assert all("loop.py" in text for text in stacks.values())
    record("one rank hangs", "all end, stacks of every rank", f"2/2 ranks, {took['seconds']:.0f} s at a timeout of 8 s")


def test_a_dead_rank_ends_the_others_in_time(tmp_path, mix, record):
    values = run_settings(mix, tmp_path / "run")
    fleet = Fleet(write_config(tmp_path / "train.yaml", values), ranks=2, faults={1: (at_step, 9, die)})
    fleet.until(lambda: fleet.processes[1].exitcode is not None)
    with timed() as took:
        codes = fleet.wait(60)
    assert codes == [1, -signal.SIGKILL], fleet.output()
    assert "error: lost contact with another rank" in fleet.output() and "Traceback" not in fleet.output()
    assert "loop.py" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    record("one rank is killed", "all end within the timeout", f"after {took['seconds']:.1f} s")


WORKS = """
import os, signal, sys, time
from pathlib import Path
from megatron_mixcpt.runtime.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 5.0) as watchdog:
    watchdog.heartbeat("a step")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1.5)  # more than the second between two looks: the watchdog sees how late it is
"""


def test_time_in_which_the_whole_process_was_stopped_does_not_count(tmp_path):
    """As by `scontrol suspend`: afterwards the step goes on, and takes no longer than it may."""
    command = [sys.executable, "-c", WORKS, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(7.0)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "no progress" not in errors, errors
