"""kill -9 at any point of a save, and again and again during a long run: nothing that was saved is lost."""

import json
import os
import random
import signal
import sys

import pytest

from megatron_mixcpt.checkpoint.info import read_info
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, list_quarantined
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import Fleet, count, finish, metrics, write_config

# What Python reports of a process that touches the disk.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def die_at(folder, number):
    """Kill this process at its `number`-th operation on files of `folder`."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def announced(checkpoints):
    """Step that latest.json names; 0 before there is one."""
    path = checkpoints / "latest.json"
    return json.loads(path.read_text())["step"] if path.exists() else 0


def test_a_kill_at_any_operation_of_a_save_loses_nothing(tmp_path, mix, straight, record):
    """Each process resumes where the one before was killed, does its operations and is killed in turn."""
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    kills, generator = count(50, 4), random.Random(1)
    good = 0
    for kill in range(kills):
        # The number of steps is far away: each process saves until it dies.
        config = write_config(tmp_path / "train.yaml", run_settings(mix, run, train={"steps": 10_000}))
        before = announced(checkpoints)
        fleet = Fleet(config, faults={0: (die_at, checkpoints, generator.randint(12, 75))})
        assert fleet.wait() == [-signal.SIGKILL], fleet.output()
        found = list_checkpoints(checkpoints)
        assert all(find_damage(path) == [] for path in found), f"kill {kill}"
        newest = read_info(found[0]).step if found else 0
        assert newest >= announced(checkpoints) >= before, f"kill {kill}: what was announced is gone"
        good += 1
    assert not list_quarantined(checkpoints)
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run, train={"steps": newest + 1}))
    assert f"step_{newest:08d}" in finish(config).split("resumed from")[-1].splitlines()[0]
    record("kill -9 at random points of a save", "50/50 resume from the newest valid", f"{good}/{kills}")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path, mix, record):
    steps, kills, generator = count(500, STEPS), 0, random.Random(2)
    # The schedule depends on the number of steps, so the uninterrupted run is as long.
    whole = write_config(tmp_path / "whole.yaml", run_settings(mix, tmp_path / "whole", train={"steps": steps}))
    finish(whole, "checkpoint.every=0")
    run = tmp_path / "run"
    overrides = ["checkpoint.every=2", "checkpoint.async=true"]
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run, train={"steps": steps}))
    reached, goals = 0, sorted(generator.sample(range(2, steps), count(20, 2)))
    for goal in goals:
        fleet = Fleet(config, *overrides)
        if not fleet.until(lambda goal=goal: max(metrics(run, "train/loss"), default=0) >= goal):
            break
        fleet.send(signal.SIGKILL)
        fleet.wait()
        kills += 1
        reached = goal
    finish(config, *overrides)
    expected, found = metrics(tmp_path / "whole", "train/loss"), metrics(run, "train/loss")
    assert sorted(found) == list(range(1, steps + 1)) and found == expected, f"differs after {kills} kills at {reached}"
    streams = [metrics(folder, "data/stream") for folder in (tmp_path / "whole", run)]
    assert streams[0] == streams[1]
    record(
        f"soak: {steps} steps, async saves, killed {kills} times", "every loss bitwise equal", f"{len(found)}/{steps}"
    )
