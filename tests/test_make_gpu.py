"""`make gpu`: no part takes another along, what was found stays, and the whole program runs in small on a CPU."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.all_parts import LOG, run_parts
from benchmarks.gpu.findings import FILE_NAME, Findings, LeftOut, read_findings
from benchmarks.gpu.parts import PARTS, TOTAL_SECONDS, Part, in_all
from benchmarks.gpu.processes import MARK, OUT_OF_TIME, run_within
from benchmarks.gpu.summary import PartEnded, went_well, write_summary

ROOT = Path(__file__).parents[1]
FINDS = """
import sys
from pathlib import Path
from benchmarks.gpu.findings import Findings
findings = Findings(Path(sys.argv[2]), sys.argv[1])
findings.plan("first", "second")
findings.add("first", "ok", "", speed=2.5)
"""
# In C, beside a rank with a session of its own that would outlive it and hears of nothing.
HANGS = (
    FINDS
    + """
import os, signal, subprocess, threading
rank = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
subprocess.Popen(rank, start_new_session=True)
def waits_for_ever():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
waits_for_ever()
"""
)
CRASHES = FINDS + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
FAILS = FINDS + "raise RuntimeError('of its own')"
WORKS = FINDS + "findings.add('second', 'ok')"


def run(folder, *parts, began=None):
    """`parts`: (name, program, seconds)."""
    programs = {name: source for name, source, _ in parts}
    return run_parts(
        [Part(name, seconds, f"what {name} does") for name, _, seconds in parts],
        lambda part: [sys.executable, "-c", programs[part.name], part.name, str(folder)],
        folder,
        "A machine.",
        time.monotonic() if began is None else began,
        lambda text: None,
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def living(mark):
    return [path for path in Path("/proc").glob("[0-9]*/environ") if is_marked(path, mark)]


def is_marked(path, mark):
    try:
        return f"{MARK}={mark}".encode() in path.read_bytes()
    except OSError:
        return False


def test_a_part_that_hangs_ends_at_its_time_with_all_that_it_started_and_leaves_its_stacks(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, "this-test")
    hung, after = run(tmp_path, ("hangs", HANGS, 8.0), ("works", WORKS, 60.0))
    assert hung.ended.how == OUT_OF_TIME and after.ended.how == "done"
    assert "waits_for_ever" in (tmp_path / LOG).read_text()
    assert living("this-test") == []
    text = (tmp_path / "summary.md").read_text()
    assert "| hangs | what hangs does | out of time |" in text and "- not reached: second" in text
    assert "| first | 2.5 |" in text  # what it had found


@pytest.mark.parametrize(("source", "how"), [(CRASHES, "signal 11"), (FAILS, "exit code 1")])
def test_a_part_that_dies_takes_nothing_along(tmp_path, source, how):
    dead, after = run(tmp_path, ("dies", source, 60.0), ("works", WORKS, 60.0))
    assert (dead.ended.how, after.ended.how) == (how, "done")
    assert [f.state for f in read_findings(tmp_path)] == ["ok", "planned", "ok", "ok"]
    assert not went_well(tmp_path, [dead, after]) and went_well(tmp_path, [after]) is False  # what dies left unreached


def test_what_a_part_leaves_of_its_time_the_next_may_use_and_what_it_has_not_it_does_not_take(tmp_path):
    first, second = run(tmp_path, ("works", WORKS, 120.0), ("later", WORKS, 0.0))
    assert (first.ended.how, second.ended.how) == ("done", "done")
    # As if what came before had used up all the time but the last part's own.
    late, last = run(tmp_path, ("late", WORKS, 60.0), ("last", WORKS, 120.0), began=time.monotonic() - 60.0)
    assert (late.ended.how, last.ended.how) == (OUT_OF_TIME, "done")


def test_the_shares_are_the_nine_minutes():
    assert sum(part.seconds for part in PARTS) == TOTAL_SECONDS == 540
    assert sum(part.seconds for part in in_all(PARTS[3:5])) == pytest.approx(TOTAL_SECONDS)


def test_a_program_that_cannot_be_started_is_no_end(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    parts = [Part("absent", 60.0, ""), Part("works", 60.0, "")]
    commands = {"absent": ["/no/such/program"], "works": [sys.executable, "-c", WORKS, "works", str(folder)]}
    ended = run_parts(parts, lambda part: commands[part.name], folder, "", time.monotonic(), lambda text: None)
    assert [part.ended.how.split(":")[0] for part in ended] == ["FileNotFoundError", "done"]


def test_a_limit_within_a_part_ends_what_is_in_it_alone(tmp_path):
    inner = f"import time; print('{'x' * 10}', flush=True); time.sleep(600)"
    ended = run_within(4.0, [sys.executable, "-c", inner], tmp_path / "log", {"SOME": "thing"})
    assert ended.how == OUT_OF_TIME and "xxxxxxxxxx" in (tmp_path / "log").read_text()


def test_findings_are_kept_one_by_one(tmp_path):
    findings = Findings(tmp_path, "part")
    findings.plan("right", "wrong", "absent", "unreached")
    with findings.tried("right") as values:
        values |= {"GB/s": 3.0, "told": "a word"}
    with findings.tried("wrong"):
        raise ValueError("off by\none")
    with findings.tried("absent"):
        raise LeftOut("no device")
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"part": "cut')  # by a machine that went away
    found = {f.name: f for f in read_findings(tmp_path)}
    assert {name: f.state for name, f in found.items()} == {
        "right": "ok",
        "wrong": "failed",
        "absent": "left out",
        "unreached": "planned",
    }
    assert found["wrong"].told == "ValueError: off by" and found["right"].values == {"GB/s": 3.0}
    text = write_summary(
        tmp_path, "A machine.", [PartEnded("part", "about it", program.run_within(9, ["true"], tmp_path / LOG))]
    )
    assert "- **failed**: wrong: ValueError: off by" in text and "- left out: absent (no device)" in text
    assert "| right | 3 | a word |" in text and "- not reached: unreached" in text


def wheel(folder, name):
    """The smallest that pip installs."""
    folder.mkdir()
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "VALUE = 7\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_wheels_are_installed_from_their_folder_for_one_run(tmp_path, capsys):
    wheel(tmp_path / "wheels", "mixcpt_of_a_wheel")
    (tmp_path / "site").mkdir()
    assert program._install(tmp_path / "wheels", tmp_path / "site", tmp_path / LOG)
    assert (tmp_path / "site" / "mixcpt_of_a_wheel.py").read_text() == "VALUE = 7\n"
    (tmp_path / "none").mkdir()
    assert not program._install(tmp_path / "none", tmp_path / "site", tmp_path / LOG)
    (tmp_path / "none" / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    assert not program._install(tmp_path / "none", tmp_path / "site", tmp_path / LOG)
    told = capsys.readouterr().err
    assert "no wheels there" in told and "pip: exit code" in told


def test_what_cannot_begin_says_why(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MIXCPT_DEVICE", "")
    assert "no CUDA device" in program._obstacle(small=True)
    monkeypatch.setenv("MIXCPT_DEVICE", "cpu")
    assert "add --small" in program._obstacle(small=False)
    monkeypatch.setitem(program.NEEDED, "no_such_module.part", "no-such-package")
    assert "not installed: no-such-package" in program._obstacle(small=True)


def test_a_file_of_tests_that_cannot_be_imported_is_a_failed_finding(tmp_path):
    (tmp_path / "test_works.py").write_text("def test_one():\n    pass\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_findings", "-p", "no:cacheprovider"]
    environment = os.environ | {"MIXCPT_GPU_FINDINGS": str(tmp_path)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["--continue-on-collection-errors", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    states = {found.name: (found.state, found.told) for found in read_findings(tmp_path)}
    assert states["test_works.py::test_one"] == ("ok", "")
    state, told = states["test_broken.py"]
    assert state == "failed" and "No module named 'no_such_module'" in told


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert program.main(["--small", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_all_of_it_runs_in_small(tmp_path):
    """The very program that a GPU runs, in tiny sizes on the CPU."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"MIXCPT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    log = (out / LOG).read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    assert {path.name for path in out.iterdir()} <= set(program.WRITTEN) and len(program.WRITTEN) <= 8
    found = read_findings(out)
    assert {f.part for f in found} == {part.name for part in PARTS}
    assert {f.state for f in found} <= {"ok", "left out"}
    records = json.loads((out / "lssd_gpu.json").read_text())
    assert any(record["name"] == "ours" and record["both"] > 0 for record in records)
    certified = next(f for f in found if f.part == "certification")
    assert 0 < certified.values["bf16 error / bound"] <= 1
    resumed = next(f for f in found if f.part == "resumption")
    assert resumed.values["resumed: tensors that differ"] == 0  # as everywhere on the CPU
    speeds = [f.values["tokens/s"] for f in found if f.part in ("training", "peers")]
    assert len(speeds) == 5 and min(speeds) > 0
    assert "a trial of the program, no measurement" in (out / "summary.md").read_text()
