"""The demo runs real commands: failures are shown with the log, progress is read, interruptions reach the child."""

import json
import signal
import subprocess
import sys
import time

import pytest

from megatron_mixcpt.demo import commands
from megatron_mixcpt.demo.commands import run_mixcpt, training_progress
from megatron_mixcpt.errors import MixcptError


def test_a_failing_command_is_reported_with_exit_code_and_the_end_of_its_log(tmp_path):
    log = tmp_path / "logs/a.log"
    with pytest.raises(MixcptError, match="exit code 2") as caught:
        run_mixcpt(["no-such-command"], log, threads=1)
    assert "no-such-command" in str(caught.value) and str(log) in str(caught.value)
    assert "is no command" in str(caught.value)


def test_a_command_that_succeeds_appends_to_its_log(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("earlier\n")
    run_mixcpt(["--version"], log, threads=1)
    assert log.read_text().startswith("earlier\n\n$ mixcpt --version\nmixcpt ")


def test_progress_is_read_from_the_newest_complete_line(tmp_path):
    seen = []
    poll = training_progress(tmp_path, 40, lambda share, detail: seen.append((share, detail)))
    poll()  # no file yet
    (tmp_path / "metrics.jsonl").write_text("")
    poll()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 2.5}) + "\n")
    poll()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tra')  # being written
    poll()
    assert seen == [(0.25, "step 10/40, loss 2.50")]


def test_an_interruption_stops_the_running_command(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def sleeper(command, **kwargs):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **kwargs))
        return started[0]

    monkeypatch.setattr(commands.subprocess, "Popen", sleeper)

    def interrupt():
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_mixcpt(["train"], tmp_path / "a.log", threads=1, poll=interrupt)
    assert started[0].returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 60
