"""Stop signals at random moments: two ranks, all of them signalled as srun does, from the first moment on."""

import os
import random
import signal
import time

from megatron_mixcpt.checkpoint.store import list_checkpoints, step_of
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import STACKS, Fleet, count, finish, metrics, write_config

NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


def test_signals_at_random_moments_lose_no_step(tmp_path, mix, record):
    """Each stopped run is resumed and stopped again; in the end every loss is that of the run nobody stopped."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    finish(write_config(tmp_path / "whole.yaml", run_settings(mix, whole)), ranks=2)
    expected = metrics(whole, "train/loss")
    values = run_settings(mix, run, checkpoint={"every": 3}, eval={"every": 2})
    config = write_config(tmp_path / "train.yaml", values)
    signals, generator, clean = count(20, 3), random.Random(3), 0
    longest, early = 1.0, 0
    for index in range(signals):
        began = time.monotonic()
        done = max(metrics(run, "train/loss"), default=0)
        if done >= STEPS - 1:  # finished too early to be signalled: begin anew
            assert metrics(run, "train/loss").items() <= expected.items()
            values["run_dir"] = str(run := tmp_path / f"run{index}")
            config, done = write_config(tmp_path / "train.yaml", values), 0
        fleet = Fleet(config, ranks=2)
        if index % 2:  # somewhere in set-up, loading, the first validation
            time.sleep(generator.uniform(0.0, longest))
        else:  # in the steps: forward, backward, validation, save
            fleet.until(lambda done=done: max(metrics(run, "train/loss"), default=0) > done)
            longest = max(longest, time.monotonic() - began)
            time.sleep(generator.uniform(0.0, 1.0))
        fleet.send(NUMBERS[index % len(NUMBERS)])
        codes = fleet.wait()
        assert codes in ([75, 75], [0, 0]), f"signal {index}: exit codes {codes}\n{fleet.output()}"
        steps, saved = metrics(run, "train/loss"), list_checkpoints(run / "checkpoints")
        assert max(steps, default=0) == (step_of(saved[0]) if saved else 0), f"signal {index}: steps were lost"
        early += max(steps, default=0) == done
        clean += 1
    finish(config, ranks=2)
    assert metrics(run, "train/loss") == expected
    record(
        "SIGTERM, SIGUSR1, SIGINT, SIGHUP at random moments of set-up, step, eval, save (2 ranks)",
        "20/20, no step lost, losses bitwise equal",
        f"{clean}/{signals} ({early} of them before a step)",
    )


def _dawdle():
    from megatron_mixcpt.train import loop

    loop.dry_run = lambda *args: time.sleep(60)


def test_ranks_that_are_told_one_after_another_all_stop(tmp_path, mix):
    """In set-up: the second has lost the first by the time it is told."""
    fleet = Fleet(
        write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run")), ranks=2, faults={0: (_dawdle,)}
    )
    fleet.until(lambda: "loss    1 CE" in fleet.output())
    for process in fleet.processes:
        time.sleep(1.0)
        fleet.send(signal.SIGTERM, process)
    assert fleet.wait() == [75, 75], fleet.output()


def _leave():
    os._exit(0)


def test_a_rank_that_waits_for_one_that_has_left_stops(tmp_path, mix):
    """It waits in C++, where no handler written in Python runs."""
    fleet = Fleet(
        write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run")), ranks=2, faults={1: (_leave,)}
    )
    waiting, left = fleet.processes
    left.join()

    def waits():
        fleet.send(STACKS, waiting)
        time.sleep(0.5)
        return "in _create_c10d_store" in fleet.output()

    fleet.until(fleet.log.exists)
    time.sleep(0.5)  # until it prints stacks on demand
    fleet.until(waits)
    fleet.send(signal.SIGTERM)
    assert fleet.wait(60) == [75, 0]
    assert "stopped as asked before the first step" in fleet.output()
