"""A chain on a real SLURM: text is prepared by an array, trained on and exported, each job after the one before."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from tests.data_prep.conftest import config_values, corpus, tokenizer_dir  # noqa: F401
from tests.data_prep.helpers import digests
from tests.slurm.runs import mixcpt
from tests.train.runs import settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(config_values, tmp_path):  # noqa: F811
    """Path of a preprocessing configuration with the folder `array` as its result, and what it must hold."""
    preprocess(parse_config(config_values))
    config = tmp_path / "preprocess.yaml"
    config.write_text(yaml.safe_dump({**config_values, "out": str(tmp_path / "array")}))
    return config, digests(Path(config_values["out"]))


def write_chain(folder, config, **changes):
    train = folder / "train.yaml"
    values = settings(folder / "array" / "mix.json", folder / "run", train={"steps": 2}, loss={"by_kind": {}})
    train.write_text(yaml.safe_dump(values))
    stages = [
        {"name": "data", "command": f"preprocess {config}", "array": 2},
        {"name": "train", "command": f"train {train} train.seed=3"},
        {"name": "export", "command": f"export {folder}/run --out {folder}/hf"},
    ]
    defaults = {"gpus_per_node": 0, "cpus_per_task": 1, "time": "30", "options": {"mem": "1G"}}
    chain = folder / "chain.yaml"
    chain.write_text(yaml.safe_dump({"out": str(folder / "chain"), "defaults": defaults, "stages": stages} | changes))
    return chain


def test_a_chain_prepares_trains_and_exports(cluster, prepared, tmp_path):
    config, expected = prepared
    code, output = mixcpt(cluster, tmp_path, "launch", str(write_chain(tmp_path, config)))
    assert code == 0, output
    jobs = {line.split()[2].rstrip(","): line.split()[1].rstrip(":") for line in output.splitlines()}
    assert list(jobs) == ["data-tokenize", "data-assemble", "train", "export"]
    code, again = mixcpt(cluster, tmp_path, "launch", str(tmp_path / "chain.yaml"))
    assert code == 2 and "does the same" in again
    logs = lambda: "\n".join(p.read_text() for p in sorted(tmp_path.rglob("logs/*.log")))  # noqa: E731
    state = cluster.wait_for(jobs["export"], "COMPLETED", "CANCELLED", "FAILED")["JobState"]
    assert state == "COMPLETED", logs()
    assert digests(tmp_path / "array") == expected
    assert yaml.safe_load((tmp_path / "run" / "launch" / "train.yaml").read_text())["train"]["seed"] == 3
    assert "finished: 2 of 2 steps" in logs()
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_when_a_stage_fails_those_after_it_do_not_run(cluster, prepared, tmp_path):
    config, _ = prepared
    broken = yaml.safe_load(config.read_text())
    broken["sources"][0]["paths"] = [str(tmp_path / "nowhere.jsonl")]
    config.write_text(yaml.safe_dump(broken))
    code, output = mixcpt(cluster, tmp_path, "launch", str(write_chain(tmp_path, config)))
    assert code == 0, output
    last = output.splitlines()[-1].split()[1].rstrip(":")
    assert cluster.wait_for(last, "CANCELLED")["Reason"] in ("DependencyNeverSatisfied", "Dependency")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# python -m megatron_mixcpt.cli, but the first task waits to be told to stop when it runs for the first time.
STOPPED_ONCE = """#!/bin/bash
if [ "$7 $8" = "--shard 1/2" ] && ! [ -e stopped ]; then
    trap 'touch stopped; exit 75' TERM
    touch waiting
    while true; do sleep 0.1; done
fi
exec {python} "$@"
"""


def test_preprocess_sh_submits_the_same_array_whose_stopped_tasks_continue(cluster, prepared, tmp_path):
    config, expected = prepared
    stand_in = tmp_path / "python"
    stand_in.write_text(STOPPED_ONCE.format(python=sys.executable))
    stand_in.chmod(0o755)
    script = [str(ROOT / "launch" / "preprocess.sh"), str(config), "--array=1-2", "--cpus-per-task=1", "--mem=1G"]
    environment = cluster.environment | {"PYTHON": str(stand_in)}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, last = (word.rstrip(",") for word in done.stdout.split() if word.rstrip(",").isdigit())
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.call("scancel", "--signal=TERM", "--batch", f"{first}_1")
    state = cluster.wait_for(last, "COMPLETED", "CANCELLED", "FAILED")["JobState"]
    assert state == "COMPLETED", [path.read_text() for path in tmp_path.glob("*.out")]
    assert (tmp_path / "stopped").exists() and digests(tmp_path / "array") == expected
