"""Around the runs of a study: stops, workers that start together, weights, devices, a report that fails."""

import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import load_config
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.run_lock import RunLock
from megatron_mixcpt.study import plan, run
from megatron_mixcpt.study.config import Study
from megatron_mixcpt.study.run import run_study
from tests.helpers.corpus import edit_mix
from tests.study.pretended import read

# A run that takes longer to save than a process has that was told to stop before its first step.
STOPPED = """
import os, signal, sys, threading, time
from megatron_mixcpt.config import load_config
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.runtime import stop
from megatron_mixcpt.study import run
from megatron_mixcpt.study.cells import Cells
from megatron_mixcpt.study.config import Study

stop.BLOCKED_SECONDS = stop.LEAVING_SECONDS = 0.2
save = "lambda *_: (time.sleep(3), print('saved'), sys.exit(75))"
child = f"import signal, sys, time; signal.signal(signal.SIGTERM, {save}); print('begun', flush=True); time.sleep(60)"
log = sys.argv[2]


def make(team, folder, environment, cell):
    from pathlib import Path
    team._process([sys.executable, "-c", child], Path(log), dict(os.environ))


run._Team._make = make
run.POLL_SECONDS = 0.05


def interrupt():
    while not os.path.exists(log) or "begun" not in open(log).read():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=interrupt, daemon=True).start()
try:
    run.run_study(Cells(load_config(Study, sys.argv[1]), sys.argv[1]), 1)
except StoppedError as error:
    print(error)
"""


def test_a_study_that_is_stopped_waits_until_its_runs_have_saved(write_study, tmp_path):
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", STOPPED, write_study(), str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "0 of 6 runs are done; the same command goes on" in done.stdout, done.stderr
    assert "saved" in log.read_text()


def test_workers_that_start_together_write_one_file_and_keep_to_their_own_version(write_study):
    cells = read(write_study())
    paths = []
    workers = [threading.Thread(target=lambda: paths.append(cells.write())) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(paths) == 16 and len(set(paths)) == 1 and list(paths[0].parent.iterdir()) == [paths[0]]
    assert load_config(Study, str(paths[0])) == cells.study
    other = read(write_study(measure={"max_samples": 3})).write()
    assert other != paths[0] and load_config(Study, str(paths[0])) == cells.study


def test_a_run_that_goes_on_after_its_study_was_killed_is_waited_for(write_study, pretend):
    cells = read(write_study())
    pretended, first = pretend(cells), cells.sweep("ce")[0]
    left = RunLock(first.run_dir)
    left.__enter__()

    def end():
        while not pretended.trained:
            time.sleep(0.02)
        left.__exit__()

    threading.Thread(target=end, daemon=True).start()
    now = run_study(cells, 1)
    names = [Path(name).parent.name for name in pretended.trained]
    assert not now.failed and names.index(first.folder.name) > 0 and len(set(names)) == len(names) == 6


def test_without_checkpoints_no_weights_stay_also_of_a_run_that_was_killed_before_it_removed_them(
    write_study, pretend, tmp_path
):
    path = write_study(keep_checkpoints=False)
    cells = read(path)
    pretend(cells)
    run_study(cells, 1)
    left = [cells.sweep("ce")[0].run_dir / name for name in ("checkpoints/step_00000004", "average/step_00000004")]
    for folder in left:
        folder.mkdir(parents=True)
    run_study(read(path), 1)
    assert not any(folder.exists() for folder in left)


def test_more_ranks_than_gpus_are_refused_in_place_of_training_on_the_cpu(monkeypatch):
    for devices, jobs, nproc in ((0, 9, 2), (4, 2, 2), (4, 4, 1)):
        monkeypatch.setattr(plan, "cuda_devices", lambda devices=devices: devices)
        plan.check_devices(nproc, jobs)
    with pytest.raises(ConfigError, match=r"--jobs 3: runs of nproc 2 take 6 GPUs, and there are 4"):
        plan.check_devices(2, 3)


def test_a_report_that_cannot_be_written_ends_no_run_and_is_told(write_study, pretend, monkeypatch, capsys):
    cells = read(write_study())
    pretended = pretend(cells)

    def fails(now):
        raise ConfigError("the models were not asked the same questions")

    monkeypatch.setattr(run, "write_report", fails)
    with pytest.raises(ConfigError, match="not asked the same questions"):
        run_study(cells, 1)
    assert len(pretended.trained) == 6
    assert "the report stays as it was: the models were not asked" in capsys.readouterr().err


def test_questions_that_changed_in_a_task_s_data_are_asked_anew(write_study, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    task = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data.name}}}
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    measure = {"tasks": [str(tmp_path / "sums.yaml")]}
    before = read(write_study(measure=measure)).file_name
    assert read(write_study(measure=measure)).file_name == before
    data.write_text('{"question": "1 + 2 =", "answer": "3"}\n')
    assert read(write_study(measure=measure)).file_name != before


@pytest.mark.parametrize(
    "kind, message", [("domain", r"choose\.gain domain: no domain"), ("instruction", r"choose\.within\.forgetting: no")]
)
def test_a_rule_that_nothing_measured_can_decide_is_refused(write_study, material, tmp_path, capsys, kind, message):
    shutil.copytree(material / "data", tmp_path / "data")
    mix = tmp_path / "data" / "mix.json"
    edit_mix(mix, lambda content: [one.update(valid=None) for one in content["sources"] if one["kind"] == kind])
    assert main(["study", write_study(), "--dry-run"]) == 0
    assert main(["study", write_study(measure={"mix": str(mix)}), "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)
