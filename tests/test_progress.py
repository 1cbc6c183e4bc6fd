"""What long work shows: lines in a log, a bar on a terminal that is never wider than it, and always the time left."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys

import pytest

from megatron_mixcpt import progress as module
from megatron_mixcpt.observe.console import TrainConsole
from megatron_mixcpt.progress import Display, Progress, fit
from megatron_mixcpt.units import duration, number, size


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_has_lines_with_amounts_rates_and_the_time_left(capsys, clock):
    with Progress("tokenize", 10_000_000, "B", done=2_000_000) as progress:
        for _ in range(4):
            clock.now += 3
            progress.advance(1_000_000, tokens=500_000)
    # A line at 6 s (4 of 10 MB done, 2 in this run) and at 12 s; resumed bytes do not count as speed.
    assert capsys.readouterr().err.splitlines() == [
        "tokenize 40% | 4M of 10MB | 333kB/s | 167k tokens/s | ETA 18s",
        "tokenize 60% | 6M of 10MB | 333kB/s | 167k tokens/s | ETA 12s",
        "tokenize: 4MB in 12s, 333kB/s, 167k tokens/s",
    ]


def test_work_that_was_done_before_takes_no_time_and_other_ranks_are_silent(capsys, clock):
    with Progress("scoring", 100, "tokens") as progress, Progress("same", 100, "tokens", shown=False) as silent:
        progress.skip(90)
        silent.advance(50)
        clock.now += 6
        progress.reach(95)
    assert capsys.readouterr().err.splitlines() == [
        "scoring 95% | 95 of 100 tokens | 0.833 tokens/s | ETA 6s",
        "scoring: 5 tokens in 6s, 0.833 tokens/s",
    ]


def test_before_anything_is_done_nobody_knows_how_long_it_takes(capsys, clock):
    with Progress("drawing", 192, "samples") as progress:
        clock.now += 6
        progress.advance(0, tokens=240)
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "drawing 0% | 0 of 192 samples | 0 samples/s | 40 tokens/s | ETA ?"


def test_a_failure_is_not_told_as_done(capsys):
    with pytest.raises(ValueError), Progress("work", 3, "parts"):
        raise ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", range(1, 60))
def test_a_narrow_line_drops_the_least_important_and_never_the_time_left(width):
    parts = ["step 3/40", "loss 2.13", "lr 1e-5", "mem 1.2 GiB", "ETA 3m12s"]
    line = fit(parts, width)
    assert len(line) <= width and line.endswith("ETA 3m12s"[-width:])
    *kept, _ = line.split(" | ")
    assert kept == parts[: len(kept)]
    assert len(kept) == 4 or len(" | ".join([*parts[: len(kept) + 1], parts[-1]])) > width  # no more would fit


DRAW = """
import time
from megatron_mixcpt.progress import Display
display = Display()
display.message("first")
for step in range(1, 4):
    time.sleep(0.11)
    display.show(step / 3, [f"step {step}/3", "loss 2.1", "a detail that needs room", "ETA 3s"], keep=step == 2)
display.close()
"""


@pytest.mark.parametrize("columns", [40, 140])
def test_a_terminal_shows_a_bar_of_its_width_and_keeps_a_history(columns):
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen([sys.executable, "-c", DRAW], stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    assert process.wait(60) == 0
    lines = [line.strip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()))]
    history = "step 2/3 | loss 2.1 | a detail that needs room | ETA 3s"
    assert "first" in lines and history in lines
    pictures = [line for line in lines if re.search(r"step [13]/3", line)]
    assert len(pictures) >= 2 and all(len(line) < columns and line.endswith("ETA 3s") for line in pictures)
    assert all(("━" in line, "a detail" in line) == ((columns == 140),) * 2 for line in pictures)


def test_training_leaves_a_line_a_step_in_a_log(capsys):
    console = TrainConsole(steps=3, start_step=0)
    metrics = {"train/loss": 2.0, "optim/lr": 1e-5, "optim/grad_norm": 1.0, "speed/tok_per_s_gpu": 10.0}
    for step in (1, 2, 3):
        console.step(step, {**metrics, "speed/data_pct": 1.0, "mem/peak_gib": 1.0})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(re.search(r"ETA \d+s$", line) for line in lines)


def test_text_with_brackets_is_printed_as_it_is():
    output = io.StringIO()
    Display(output).message("[bold] 1 [/x]")
    assert output.getvalue() == "[bold] 1 [/x]\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"), (3600, "1h00m")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_numbers_and_sizes_are_short():
    assert [number(value) for value in (0, 0.25, 12_500, 3e-5, 1_000_000)] == ["0", "0.25", "12.5k", "3e-5", "1M"]
    assert [size(value) for value in (0, 1023, 1536, 3 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3 TiB"]


def test_a_full_disk_or_a_closed_terminal_ends_no_work():
    with open("/dev/full", "w") as full:
        display = Display(full)
        for _ in range(3):
            display.message("of a step")
            display.show(0.5, ["half"], keep=True)
        display.close()
        with contextlib.suppress(OSError):
            full.close()  # Python's own last try
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        display = Display(terminal)
        display.show(0.1, ["a tenth"])
        assert display.is_terminal
        os.close(ours)
        display.message("of a step")
        display.show(1.0, ["all"], keep=True)
        display.close()
        with contextlib.suppress(OSError):
            terminal.close()
