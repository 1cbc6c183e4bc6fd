"""wandb gets every row under the documented names, keeps its id, and can do what it likes without changing a run."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from megatron_mixcpt.checkpoint import list_checkpoints, read_info
from megatron_mixcpt.config import Config, WandbConfig, validate
from megatron_mixcpt.observe.wandb_process import WandbProcess, choose_mode, run_id_of
from megatron_mixcpt.train.loop import train
from tests.helpers.corpus import write_mix
from tests.train.runs import settings

FAKE = Path(__file__).parent / "fake_wandb"


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [row["train/loss"] for row in rows(run_dir) if "train/loss" in row]


def records(path):
    """Records of a .wandb file: blocks of 32 KiB (LevelDB's log format, after 7 bytes), each a protobuf message."""
    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def history(folder):
    """`{step: {metric: value}}` of an offline directory."""
    steps = {}
    for record in records(next(folder.glob("*.wandb"))):
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            steps.setdefault(record.history.step.num or items["_step"], {}).update(items)
    return steps


def offline_folders(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("wandb") / "data", seq_length=16, vocab_size=120)


def config(mix, run_dir, **sections):
    values = settings(mix, run_dir, checkpoint={"every": 2}, eval={"every": 2, "max_samples": 1}, **sections)
    values["train"] |= {"micro_batch_size": 1, "global_batch_size": 2}
    return validate(Config, values, "test")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mix):
    """A run without wandb."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(config(mix, run_dir, wandb={"mode": "disabled"}))
    assert not (run_dir / "wandb").exists()
    return run_dir


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`fake(behaviour)`: let the writer import tests/observe/fake_wandb; returns a function that reads its calls."""

    def choose(behaviour):
        calls = tmp_path / "calls.jsonl"
        monkeypatch.setenv("PYTHONPATH", str(FAKE))
        monkeypatch.setenv("FAKE_WANDB", behaviour)
        monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return choose


def start(run_dir, timeout=60.0, mode="offline"):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").touch()
    values = {"train": {"lr": 1}}
    return WandbProcess(WandbConfig(), run_dir, mode=mode, run_id="abc", values=values, timeout=timeout)


def append(run_dir, *new):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in new)


def test_a_run_and_its_resume_are_one_offline_run_that_wandb_can_read(tmp_path, mix, straight):
    run_dir = tmp_path / "run"
    wandb_settings = {"mode": "offline", "project": "tests", "timeout_seconds": 120}
    train(config(mix, run_dir, wandb=wandb_settings, train={"steps": 2, "schedule": "constant"}))
    number = (run_dir / "wandb" / "run_id").read_text().strip()
    (run_dir / "wandb" / "run_id").unlink()  # then the checkpoint knows it
    train(config(mix, run_dir, wandb=wandb_settings, train={"schedule": "constant"}))
    assert (run_dir / "wandb" / "run_id").read_text().strip() == number
    assert read_info(list_checkpoints(run_dir / "checkpoints")[0]).training.wandb_id == number

    first, second = offline_folders(run_dir)
    logged = {}
    for folder in (first, second):
        messages = list(records(next(folder.glob("*.wandb"))))
        (started,) = [record.run for record in messages if record.HasField("run")][:1]
        assert started.run_id == number and started.project == "tests"
        defined = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in messages if r.HasField("metric")}
        assert defined["*"] == "train/tokens"
        assert [record.exit.exit_code for record in messages if record.HasField("exit")] == [0]
        artefacts = [record.artifact.type for record in messages if record.HasField("artifact")]
        assert artefacts == ["config", "checkpoint-manifest", "report"]
        for step, values in history(folder).items():
            logged.setdefault(step, {}).update(values)
    expected = {}
    for row in rows(run_dir):
        point = expected.setdefault(row.pop("step"), {})
        point |= {
            name: value + point.get(name, 0.0) if name.startswith("time/") else value for name, value in row.items()
        }
    found = {step: {name: logged[step][name] for name in point} for step, point in expected.items()}
    assert found == expected


@pytest.mark.parametrize("behaviour", ["raise in init", "hang in log"])
def test_a_broken_wandb_changes_no_loss_by_a_bit(tmp_path, mix, straight, fake, capsys, behaviour):
    fake(behaviour)
    run_dir = tmp_path / "run"
    train(config(mix, run_dir, wandb={"mode": "online", "timeout_seconds": 1.0}))
    assert losses(run_dir) == losses(straight) and len(losses(run_dir)) == 4
    said = capsys.readouterr().out
    assert "finished: 4 of 4" in said and "warning: wandb" in said and "metrics.jsonl is whole" in said


def test_rows_settings_and_files_are_handed_over(tmp_path, fake):
    calls, run_dir = fake("note"), tmp_path / "run"
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000002" / "manifest.json").write_text("{}")
    (run_dir / "config.yaml").write_text("a: 1")
    append(run_dir, {"step": 0, "train/tokens": 0})  # of an earlier process
    process = start(run_dir)
    append(run_dir, {"step": 1, "train/loss": 2.5, "optim/grad_norm": None}, {"step": 2, "ckpt/seconds": 1.0})
    (run_dir / "report.html").write_text("<p>")
    assert process.close("finished") == "wandb: written offline; upload with: wandb sync offline-run-*-fake"
    by_name = {}
    for name, args, keywords in calls():
        by_name.setdefault(name, []).append((args, keywords))
    ((_, init),) = by_name["init"]
    assert init["id"] == "abc" and init["resume"] == "allow" and init["mode"] == "offline" and init["name"] == "run"
    assert init["config"] == {"train": {"lr": 1}} and init["dir"] == str(run_dir)
    assert (["*"], {"step_metric": "train/tokens"}) in by_name["define"]
    assert by_name["log"] == [([{"train/loss": 2.5}], {"step": 1}), ([{"ckpt/seconds": 1.0}], {"step": 2})]
    assert [Path(args[1]).name for args, _ in by_name["file"]] == ["config.yaml", "manifest.json", "report.html"]
    assert by_name["finish"] == [([0], {})]


def test_without_a_network_it_goes_on_offline(tmp_path, fake):
    calls = fake("no network")
    process = start(tmp_path / "run", mode="online")
    append(tmp_path / "run", {"step": 1, "train/loss": 1.0})
    assert "written offline" in process.close("finished")
    assert ["log", [{"train/loss": 1.0}], {"step": 1}] in calls()


def test_a_run_that_dies_is_told_to_wandb_as_failed(tmp_path, fake):
    calls = fake("note")
    process = start(tmp_path / "run")
    append(tmp_path / "run", {"step": 1, "train/loss": 1.0})
    process._process.stdin.close()  # as the kernel does for a killed trainer
    assert process._process.wait(60) == 0
    assert ["finish", [1], {}] in calls() and ["log", [{"train/loss": 1.0}], {"step": 1}] in calls()


def test_signals_to_the_whole_job_do_not_end_the_writer(tmp_path, fake):
    calls = fake("note")
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 60
    while not calls():  # it blocks signals before anything else
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(process._process.pid, number)
    append(tmp_path / "run", {"step": 7, "train/loss": 1.0})
    assert process.close("stopped").startswith("wandb:")
    assert ["log", [{"train/loss": 1.0}], {"step": 7}] in calls()


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("absent", "No module named 'wandb'"),
        ("raise in init", "ValueError: bad key"),
        ("raise in log", "RuntimeError: the server said no ("),
        ("no artefacts", "wandb: written offline"),
    ],
)
def test_what_fails_is_named(tmp_path, fake, behaviour, said):
    fake(behaviour)
    process = start(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    append(tmp_path / "run", {"step": 1, "train/loss": 1.0})
    assert said in process.close("finished")


def test_a_writer_that_hangs_is_ended_with_all_its_processes(tmp_path, fake):
    fake("hang in init")
    process = start(tmp_path / "run", timeout=0.5)
    said = process.close("finished")
    assert "did not finish within 0.5 s (wandb.timeout_seconds)" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process._process.pid, 0)


def test_offline_unless_logged_in_or_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    auto = WandbConfig()
    assert choose_mode(auto, {}) == "offline"
    assert choose_mode(auto, {"WANDB_API_KEY": "x"}) == "online"
    assert choose_mode(auto, {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}) == "disabled"
    assert choose_mode(auto, {"WANDB_MODE": "dryrun"}) == "offline"
    assert choose_mode(WandbConfig(mode="offline"), {"WANDB_API_KEY": "x"}) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert choose_mode(auto, {}) == "online"
    assert choose_mode(auto, {"WANDB_BASE_URL": "https://wandb.example"}) == "offline"


def test_the_id_is_the_directorys_then_the_checkpoints_then_new(tmp_path):
    assert run_id_of(tmp_path / "a", "old") == "old"
    new = run_id_of(tmp_path / "b", None)
    assert len(new) == 8 and run_id_of(tmp_path / "b", "old") == new != run_id_of(tmp_path / "c", None)


def test_the_real_library_takes_our_settings():
    assert wandb.Settings(console="off", init_timeout=20.0).console == "off"
