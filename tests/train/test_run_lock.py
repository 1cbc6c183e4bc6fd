"""Two runs never work in one run directory, and a dead one does not block the next."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime import run_lock
from megatron_mixcpt.runtime.run_lock import LEASE_SECONDS, LOCK, Owner, RunLock, hold
from tests.helpers.spawn import run_distributed


def leave_lock(folder, age=0.0, **changes):
    """As if another process had taken the lock and beaten `age` seconds ago."""
    owner = dataclasses.replace(Owner.this_process(), **changes)
    path = folder / LOCK
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))
    return owner


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_owner_is_refused_until_the_first_is_gone(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .* choose another folder"):
            RunLock(tmp_path).__enter__()
        assert left_over(tmp_path) == [LOCK]
    assert left_over(tmp_path) == []
    with RunLock(tmp_path):
        pass


def test_a_killed_owner_on_this_machine_is_followed_at_once(tmp_path):
    program = "import sys, time, pathlib; from megatron_mixcpt.runtime.run_lock import RunLock\n"
    program += f"RunLock(pathlib.Path({str(tmp_path)!r})).__enter__(); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid}"):
        RunLock(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunLock(tmp_path):
        assert left_over(tmp_path) == [LOCK]


def test_a_reused_process_number_is_not_the_owner(tmp_path):
    leave_lock(tmp_path, started=1)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(("age", "dead"), [(LEASE_SECONDS - 30, False), (LEASE_SECONDS + 30, True)])
def test_an_owner_on_another_machine_lives_as_long_as_its_lease(tmp_path, age, dead):
    leave_lock(tmp_path, age, machine="another", host="n7", job="12")
    if dead:
        with RunLock(tmp_path):
            pass
    else:
        with pytest.raises(ConfigError, match="on n7, SLURM job 12, which gave a sign of life 9"):
            RunLock(tmp_path).__enter__()


def test_an_earlier_start_of_the_same_slurm_job_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave_lock(tmp_path, machine="another", job="12", restart=1)
    with pytest.raises(ConfigError):  # two steps of one start
        RunLock(tmp_path).__enter__()
    leave_lock(tmp_path, machine="another", job="12", restart=0)
    with RunLock(tmp_path):
        pass


def test_a_lock_that_nobody_can_read_blocks_for_the_lease_alone(tmp_path):
    (tmp_path / LOCK).touch()
    with pytest.raises(ConfigError, match="another run"):
        RunLock(tmp_path).__enter__()
    old = time.time() - LEASE_SECONDS - 30
    os.utime(tmp_path / LOCK, (old, old))
    with RunLock(tmp_path):
        pass


def _contend(folder, barrier, results):
    barrier.wait()
    try:
        RunLock(folder).__enter__()
        results.put(True)
    except ConfigError:
        results.put(False)
    barrier.wait()


def test_of_many_that_find_a_dead_owner_one_follows(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(10):
        folder = tmp_path / str(round_)
        folder.mkdir()
        leave_lock(folder, started=1)
        barrier, results = context.Barrier(4), context.Queue()
        contenders = [context.Process(target=_contend, args=(folder, barrier, results)) for _ in range(4)]
        for process in contenders:
            process.start()
        outcomes = [results.get(timeout=60) for _ in contenders]
        for process in contenders:
            process.join(timeout=60)
        assert sum(outcomes) == 1, outcomes


def test_an_owner_that_was_taken_over_ends(tmp_path):
    program = "import sys, time, pathlib; from megatron_mixcpt.runtime import run_lock as r\n"
    program += f"r.BEAT_SECONDS = 0.05; r.RunLock(pathlib.Path({str(tmp_path)!r})).__enter__()\n"
    program += "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    leave_lock(tmp_path, machine="another", host="n7")
    assert process.wait(timeout=30) == 1
    assert "was taken over by" in process.stderr.read()


def test_beats_keep_the_lock_young(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunLock(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _told(rank, world_size, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        with hold(folder):
            return "held"
    except ConfigError as error:
        return str(error)


@pytest.mark.distributed
def test_every_rank_is_told(tmp_path):
    with RunLock(tmp_path):
        assert all("is in use by" in answer for answer in run_distributed(_told, 2, tmp_path, timeout=60))
