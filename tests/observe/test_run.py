"""What a real run leaves: every documented metric, times that add up, a trace, a report. Watching it is free."""

import gzip
import json
from types import SimpleNamespace

import pytest

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.objectives.dpo import DPOObjective, DPOTask
from megatron_mixcpt.observe import wandb_process
from megatron_mixcpt.observe.names import METRICS, documented
from megatron_mixcpt.train import loop
from tests.helpers.corpus import write_mix
from tests.train.runs import settings

# In no run on this machine: a device with a known peak, a disk that fails. In tests/train/test_forgetting.py: a budget.
# In tests/train/test_experts.py: a mixture of experts.
BUDGET = {
    f"forget/{name}"
    for name in ("budget", "forgotten", "noise", "expected", "gain", "kd_weight", "lr_factor", "decision")
}
EXPERTS = {f"moe/{name}" for name in ("balance", "z", "load_max", "idle", "changed")}
EXPERTS |= {f"moe/{name}/<layer>" for name in ("load_max", "load_min", "changed")}
ELSEWHERE = {"speed/mfu", "ckpt/failed", "run/resumed"} | BUDGET | EXPERTS


def train(mix, run_dir, **train):
    sections = {"checkpoint": {"every": 2}, "eval": {"every": 2, "max_samples": 2}, "train": train}
    values = settings(mix, run_dir, **sections)
    values["train"] = {"steps": 4, "global_batch_size": 4, "lr": 1e-3, "dtype": "fp32"} | train
    loop.train(validate(Config, values, "test"))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("runs") / "data", seq_length=16, vocab_size=120)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, mix):
    """`(run_dir, rows)` of a run with a profile."""
    run_dir = tmp_path_factory.mktemp("watched") / "run"
    return run_dir, train(mix, run_dir, profile={"start": 2, "steps": 2})


def test_every_metric_is_documented_and_every_documented_one_is_there(watched):
    found = {name for row in watched[1] for name in row} - {"step"}
    assert [name for name in found if not documented(name)] == []
    dpo = SimpleNamespace()
    sums = [1.0] * len(DPOObjective.statistics)
    found |= set(DPOTask.metrics(dpo, sums, {"facts": sums}))
    found |= {f"val/facts/{name}" for name in DPOTask.validation_metrics(dpo, sums)}
    assert [name for name in found if not documented(name)] == []
    written = {name: name.replace("<source>", "facts").replace("<kind>", "domain") for name in METRICS}
    assert {name for name in METRICS if written[name] not in found} == ELSEWHERE


def test_the_parts_of_a_step_are_the_step(watched):
    steps = [row for row in watched[1] if "train/loss" in row]
    assert len(steps) == 4
    for row in steps:
        parts = {name: value for name, value in row.items() if name.startswith("time/")}
        for name in ("data", "teacher", "forward", "loss", "backward", "optimizer", "communication"):
            assert parts[f"time/{name}"] > 0.0
        whole = sum(parts.values()) - parts.get("time/checkpoint", 0.0)
        assert whole == pytest.approx(row["speed/step_seconds"])
        assert row["speed/data_pct"] == pytest.approx(100 * parts["time/data"] / whole)


def test_validation_and_saving_have_rows_of_their_own(watched):
    for row in watched[1]:
        if "val/facts/loss" in row:
            assert row["time/validation"] > 0 and "time/forward" not in row
        if "ckpt/seconds" in row:
            assert row["time/checkpoint"] >= row["ckpt/blocked_seconds"] * 0.99 and "time/forward" not in row
        assert "train/tokens" in row


def test_forgetting_is_the_change_since_before_training(watched):
    rows = [row for row in watched[1] if "val/facts/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4] and rows[0]["forget/facts/delta"] == 0.0
    assert rows[2]["forget/tasks/delta"] == rows[2]["val/tasks/loss"] - rows[0]["val/tasks/loss"] != 0.0


def test_the_trace_has_the_steps_with_their_parts(watched):
    run_dir, _ = watched
    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "steps_2-3.rank0.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("optimizer") == names.count("data") == 2
    assert {"forward", "teacher", "loss", "backward", "aten::mm"} <= set(names)


def test_neither_clock_nor_profiler_changes_a_loss_by_a_bit(tmp_path, mix, watched, monkeypatch):
    """Also a run that ends while it is traced, one that is resumed, and a profiler that fails."""
    expected = {row["step"]: row["train/loss"] for row in watched[1] if "train/loss" in row}
    monkeypatch.setattr(loop.Bookkeeping, "start_clock", lambda self: None)

    def broken(*args, **kwargs):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr("megatron_mixcpt.observe.profile.profile", broken)
    rows = train(mix, tmp_path / "plain", profile={"start": 1, "steps": 9})
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == expected
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_resumed_run_knows_what_was_before_training_and_writes_what_it_traced(tmp_path, mix, watched):
    train(mix, tmp_path / "run", steps=2, schedule="constant")
    rows = train(mix, tmp_path / "run", steps=4, schedule="constant", profile={"start": 4, "steps": 9})
    before = next(row["val/facts/loss"] for row in rows if "val/facts/loss" in row)
    last = [row for row in rows if "forget/facts/delta" in row][-1]
    assert last["step"] == 4 and last["forget/facts/delta"] == last["val/facts/loss"] - before
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir()] == ["steps_4-4.rank0.json.gz"]


def test_a_run_leaves_its_report_and_no_wandb_where_that_is_off(watched):
    run_dir, _ = watched
    page = (run_dir / "report.html").read_text()
    assert "finished, 4 steps" in page and str(list_checkpoints(run_dir / "checkpoints")[0]) in page
    assert not (run_dir / wandb_process.FOLDER).exists()
