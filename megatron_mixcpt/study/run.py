"""Make the runs of a study, several at a time, on one machine or on many that share its folder.

Whoever works on a study takes the next run that nobody holds, so that workers come, go and die as they like. Each run
is the ordinary command `mixcpt train` on its own file, and a process that measures it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.files import check_writable, write_json
from megatron_mixcpt.progress import Progress
from megatron_mixcpt.runtime.launcher import unplaced
from megatron_mixcpt.runtime.run_lock import RunLock
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.study.cells import BASE, Cell, Cells
from megatron_mixcpt.study.report import outcome_words, write_report
from megatron_mixcpt.study.status import FAILED, Standing, standing

POLL_SECONDS = 2.0  # between looks at what others do
STOPPED = StoppedError.exit_code


def run_study(cells: Cells, jobs: int) -> Standing:
    """Make all runs that are missing, `jobs` at a time, and keep the report up to date.

    Runs that failed before are tried again.

    Raises StoppedError on a stop signal, which also stops the runs: they save.
    """
    check_writable(cells.out)
    for cell in standing(cells).runs:
        (cell.folder / FAILED).unlink(missing_ok=True)
        if not cells.study.keep_checkpoints and not cells.missing(cell):
            cell.remove_weights()  # of one that was killed before it did
    team = _Team(cells, jobs)
    with StopRequest() as stop:
        try:
            return team.work()
        except StoppedError:
            stop.taken()  # each run ends its step and saves
            team.stop()
            now = standing(cells)
            _report(now)
            raise StoppedError(
                f"stopped as asked: {now.num_ended} of {cells.num_runs} runs are done; the same command goes on"
            ) from None
        finally:
            team.stop()


class _Team:
    """Threads that each make one run after another."""

    def __init__(self, cells: Cells, jobs: int) -> None:
        self._cells, self._jobs = cells, jobs
        self._study = cells.write()
        self._lock = threading.Lock()
        self._stopping = False
        self._taken: set[str] = set()
        self._processes: set[subprocess.Popen] = set()
        self._errors: list[BaseException] = []

    def work(self) -> Standing:
        """Until there is nothing left to do, here or elsewhere."""
        now = standing(self._cells)
        with Progress("study", self._cells.num_runs, "runs", done=now.num_ended) as progress:
            workers = [
                threading.Thread(target=self._worker, args=(number,), name=f"study {number}", daemon=True)
                for number in range(self._jobs)
            ]
            for worker in workers:
                worker.start()
            told = {cell.folder.name for cell in now.runs} - {cell.folder.name for cell in now.open}
            while working := [worker for worker in workers if worker.is_alive()]:
                working[0].join(POLL_SECONDS)
                now = self._tell(told, progress)
            now = self._tell(told, progress)
        if self._errors:
            raise self._errors[0]
        _report(now)
        return now

    def stop(self) -> None:
        """Ask all processes to stop, and wait for them."""
        with self._lock:
            self._stopping = True
            running = list(self._processes)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait()

    def _tell(self, told: set[str], progress: Progress) -> Standing:
        """Say which runs have ended since, and write the report where some have."""
        now = standing(self._cells)
        still_open = {cell.folder.name for cell in now.open}
        new = [cell for cell in now.runs if cell.folder.name not in told | still_open]
        for cell in new:
            told.add(cell.folder.name)
            progress.message(_sentence(now, cell))
            progress.advance()
        if new:
            try:
                _report(now)
            except ConfigError as error:  # what is measured is not lost: the end of the study raises it
                progress.message(f"the report stays as it was: {error}")
        return now

    def _worker(self, number: int) -> None:
        environment = _environment(number, self._jobs, self._cells.study.nproc)
        try:
            while not self._stopping:
                now = standing(self._cells)
                if not now.open and now.cells.base_measured:
                    return
                if not self._next(now, environment):
                    time.sleep(POLL_SECONDS)
        except BaseException as error:  # told by the main thread
            self._errors.append(error)

    def _next(self, now: Standing, environment: dict[str, str]) -> bool:
        """Make one run that nobody holds, or measure the base; whether there was one."""
        if not self._cells.base_measured and self._alone(BASE, self._cells.base_file.parent, environment, None):
            return True
        return any(self._alone(cell.folder.name, cell.folder, environment, cell) for cell in now.open)

    def _alone(self, name: str, folder: Path, environment: dict[str, str], cell: Cell | None) -> bool:
        with self._lock:
            if name in self._taken or self._stopping:
                return False
            self._taken.add(name)
        try:
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(RunLock(folder))
                    if cell is not None:
                        with RunLock(cell.run_dir):
                            pass
                except ConfigError:  # another machine's, or it goes on after its study was killed
                    return False
                if self._is_done(folder, cell):  # since we looked
                    return False
                self._make(folder, environment, cell)
        finally:
            with self._lock:
                self._taken.discard(name)
        return True

    def _is_done(self, folder: Path, cell: Cell | None) -> bool:
        if cell is None:
            return bool(self._cells.base_measured)
        return (folder / FAILED).is_file() or not self._cells.missing(cell)

    def _make(self, folder: Path, environment: dict[str, str], cell: Cell | None) -> None:
        measure = [str(self._study), folder.name if cell else BASE]
        steps = [["megatron_mixcpt.study.measuring", *measure]]
        if cell is not None:
            nproc = ["--nproc", str(self._cells.study.nproc)]
            steps.insert(0, ["megatron_mixcpt.cli", cell.config.command, str(cell.write()), *nproc])
        for module, *arguments in steps:
            code, reason = self._process([sys.executable, "-m", module, *arguments], folder / "log.txt", environment)
            if code and not self._stopping:
                if cell is None:
                    raise MixcptError(f"the base model could not be measured: {reason}")
                write_json(folder / FAILED, {"reason": reason, "exit_code": code})
            if code:
                return

    def _process(self, command: list[str], log: Path, environment: dict[str, str]) -> tuple[int, str]:
        """Exit code, and the last that was said where it is not 0."""
        with open(log, "ab") as file:
            begin = file.tell()
            with self._lock:
                if self._stopping:
                    return STOPPED, ""
                # A session of its own: the terminal's ^C reaches it once, through `stop`.
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        if code < 0:
            lost = ", as the kernel does where memory runs out" if code == -signal.SIGKILL else ""
            return code, f"killed by {signal.Signals(-code).name}{lost}; log: {log}"
        lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return code, (errors or lines or [f"exit code {code}"])[-1].removeprefix("error: ")


def _report(now: Standing) -> None:
    """Write the report, unless another machine is at it: it will do so again when its runs end."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(RunLock(now.cells.out))
        except ConfigError:
            return
        write_report(now)


def _environment(number: int, jobs: int, nproc: int) -> dict[str, str]:
    """Of a worker's processes: cores and GPUs are shared out among the workers of a machine."""
    environment, share = unplaced(os.environ), max(1, len(os.sched_getaffinity(0)) // (jobs * nproc))
    # A batch script gives all cores of its job to each process.
    environment["OMP_NUM_THREADS"] = str(min(int(environment.get("OMP_NUM_THREADS", share)), share))
    if jobs > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(jobs * nproc)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number * nproc : (number + 1) * nproc])
    return environment


def _sentence(now: Standing, cell: Cell) -> str:
    """What came of a run."""
    if cell.folder.name in now.failed:
        return f"{cell}: failed: {now.failed[cell.folder.name]}"
    return f"{cell}: {outcome_words(now.of(cell) or {})}"
