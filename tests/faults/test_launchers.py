"""The same under torchrun, which kills its workers on a signal unless it is told otherwise (docs/reliability.md)."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from megatron_mixcpt.checkpoint.store import list_checkpoints, step_of
from tests.faults.conftest import run_settings
from tests.faults.fleet import FULL, PATIENCE, metrics, write_config

TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "--shutdown-timeout=120"]
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.mark.skipif(not FULL, reason="starts interpreters for half a minute each: make test-faults")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_torchrun_loses_no_step(tmp_path, mix, number, record):
    run = tmp_path / "run"
    values = run_settings(mix, run, train={"steps": 5000}, checkpoint={"every": 0})
    config = write_config(tmp_path / "train.yaml", values)
    command = [sys.executable, "-m", *TORCHRUN, HANDLED, "-m", "megatron_mixcpt.cli", "train", str(config)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not metrics(run, "train/loss"):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        time.sleep(random.Random(number).uniform(0.0, 2.0))
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0  # torchrun has codes of its own
    assert "stopped at step" in errors and "as asked, and saved" in errors
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert step_of(checkpoint) == max(metrics(run, "train/loss"))
    record(f"{signal.Signals(number).name} to torchrun, 2 ranks", "no step lost", "1/1")
