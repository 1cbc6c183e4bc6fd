"""The process beside a run that gives the rows of metrics.jsonl to wandb: python -m ...wandb_writer SETTINGS.

Its standard input is its lifeline: a word and an end when the run is over, an end alone when the run died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

LOG = "mixcpt.log"  # in run_dir/wandb, with what wandb prints
SAYS = "mixcpt: "  # begins the lines that are for the user
POLL_SECONDS = 1.0
INIT_SECONDS = 15.0  # that the server may take to answer


class Rows:
    """Complete lines of a growing file, as dictionaries."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    def new(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in text[:end].splitlines()]


class Point:
    """Rows of one step are one point in wandb, where a later value replaces an earlier: their times are added up."""

    def __init__(self) -> None:
        self._step, self._times = -1, dict[str, float]()

    def values(self, step: int, row: dict[str, Any]) -> dict[str, Any]:
        """What to log for `row`."""
        if step != self._step:
            self._step, self._times = step, {}
        for name in row:
            if name.startswith("time/"):
                self._times[name] = row[name] + self._times.get(name, 0.0)
        return {name: value for name, value in row.items() if value is not None} | {
            name: self._times[name] for name in row if name in self._times
        }


class Lifeline(threading.Thread):
    """Notices the end of the run, and ends this process where wandb does not: in its main thread it may hang."""

    def __init__(self, timeout: float) -> None:
        super().__init__(name="lifeline", daemon=True)
        self.over, self.word = threading.Event(), ""
        self._timeout, self._done = timeout, threading.Event()

    def run(self) -> None:
        self.word = sys.stdin.readline().strip()
        self.over.set()
        if not self._done.wait(self._timeout):
            os.killpg(0, signal.SIGKILL)  # and wandb's own processes with it

    def finish(self) -> None:
        self._done.set()


def main(settings: dict[str, Any]) -> int:
    # SLURM sends its signals to every process of a job; the end of this one is the end of the run.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
    lifeline = Lifeline(settings["timeout"])
    lifeline.start()
    try:
        said = write(settings, lifeline)
        lifeline.finish()
        print(f"{SAYS}{said}", flush=True)
        return 0
    except BaseException as error:
        traceback.print_exc()
        reason = str(error).strip().splitlines()
        print(f"{SAYS}{type(error).__name__}: {reason[0] if reason else ''}", flush=True)
        return 1


def write(settings: dict[str, Any], lifeline: Lifeline) -> str:
    """Log rows until the run is over; returns what the user should know."""
    run_dir = Path(settings["run_dir"])
    mode, run = begin(settings["init"] | {"dir": str(run_dir), "config": settings["config"], "resume": "allow"})
    run.define_metric("train/tokens")
    run.define_metric("*", step_metric="train/tokens")
    artifact(run, "config", [run_dir / "config.yaml"])
    rows, over, point = Rows(run_dir / "metrics.jsonl", settings["offset"]), False, Point()
    while not over:
        over = lifeline.over.wait(POLL_SECONDS)
        for row in rows.new():
            step = row.pop("step")
            run.log(point.values(step, row), step=step)
            if "ckpt/seconds" in row:
                manifest = run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json"
                artifact(run, "checkpoint-manifest", [manifest], aliases=[f"step_{step}"])
    artifact(run, "report", [run_dir / "report.html"])
    folder = run.dir
    run.finish(exit_code=0 if lifeline.word in ("finished", "stopped") else 1)
    if mode == "offline":
        pieces = Path(folder).parent.parent / f"offline-run-*-{run.id}"  # each start of a run writes one
        return f"written offline; upload with: wandb sync {pieces}"
    return f"{run.url or folder}"


def begin(init: dict[str, Any]) -> tuple[str, Any]:
    """Its mode and the run: offline where the server does not answer, as on cluster nodes without a network."""
    import wandb

    quiet = wandb.Settings(console="off", init_timeout=INIT_SECONDS)
    if init["mode"] == "online":
        try:
            return "online", wandb.init(**init, settings=quiet)
        except Exception:
            traceback.print_exc()
            wandb.teardown()  # its service holds the id for the run that did not start
    return "offline", wandb.init(**init | {"mode": "offline"}, settings=quiet)


def artifact(run: Any, kind: str, files: list[Path], aliases: list[str] | None = None) -> None:
    """Keep files with the run; one that is not there (a checkpoint that was replaced) is left out."""
    import wandb

    files = [path for path in files if path.is_file()]
    if not files:
        return
    try:
        entry = wandb.Artifact(f"{run.id}-{kind}", type=kind)
        for path in files:
            entry.add_file(str(path))
        run.log_artifact(entry, aliases=aliases)
    except Exception:  # the metrics matter more
        traceback.print_exc()


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # without wandb's own exit hooks, which may wait for a network
