"""Temporary folders of processes that are told to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixcpt.runtime.scratch import scratch_folder
from megatron_mixcpt.runtime.stop import STOP_SIGNALS

FILLS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
from megatron_mixcpt.runtime.scratch import scratch_folder

with scratch_folder("outer-") as outer, scratch_folder("inner-") as inner:
    for folder in (outer, inner):
        (folder / "model.safetensors").write_bytes(bytes(1000))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_nothing_stays_of_a_process_that_is_told_to_end(tmp_path, number):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", FILLS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n" and len(list(tmp_path.rglob("model.safetensors"))) == 2
        process.send_signal(number)
        assert process.wait(30) == -number
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


def test_signals_are_left_to_those_who_handle_them():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("ours"))
    try:
        others = [signal.getsignal(number) for number in STOP_SIGNALS]
        with scratch_folder("kept-") as folder:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == ["ours"] and folder.is_dir()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == others
    finally:
        signal.signal(signal.SIGUSR1, before)
