"""Training on two nodes of a real SLURM: stopped, bereft of a node, and at the end what it is when nothing happens."""

import json

import pytest
import torch

from tests.faults.fleet import finish
from tests.helpers.corpus import write_mix
from tests.slurm.runs import STEPS, Launched, outcome, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("slurm-data") / "data", seq_length=16, vocab_size=120)


@pytest.fixture(scope="module")
def straight(mix, tmp_path_factory):
    """Outcome of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    finish(write_run(mix, folder), ranks=2)
    return outcome(folder / "run")


def assert_same_end(run_dir, straight):
    losses, tensors = outcome(run_dir)
    assert losses == straight[0] and sorted(losses) == list(range(1, STEPS + 1))
    assert tensors.keys() == straight[1].keys()
    for key in tensors:
        assert torch.equal(tensors[key], straight[1][key]), key


def test_a_run_that_is_preempted_and_loses_a_node_ends_as_if_nothing_had_happened(cluster, mix, tmp_path, straight):
    """`--signal` on request, then a node that is gone: both lead back into the queue, and the run resumes."""
    run = Launched(cluster, write_run(mix, tmp_path), "--nodes=2")
    code, output = run.launch()
    assert code == 2 and f"job {run.job} " in output and "does the same" in output  # submitted twice, run once

    run.until(lambda: run.steps() >= 7)
    assert (run.run_dir / "run.lock").exists()
    cluster.call("scancel", "--signal=USR1", "--batch", str(run.job))  # what --signal=B:USR1@ sends before the end
    run.until(lambda: run.restarts() == 1)
    stopped_at = run.steps()
    assert "told to stop" in run.log() and "stopped on request; requeued" in run.log()
    assert f"stopped at step {stopped_at} of" in run.rank_log(0)

    run.until(lambda: run.steps() >= stopped_at + 6)
    cluster.fail_node("n2")
    run.until(lambda: run.restarts() == 2)
    cluster.start_node("n2")
    run.ends_well()
    assert "restart 2;" in run.log() and run.rank_log(0).count("resumed from") == 2
    assert_same_end(run.run_dir, straight)

    assert "ranks" not in run.rank_log(1)[-200:] and run.log().rstrip().endswith("done")
    for name in ("launch/train.sbatch", "launch/train.yaml", "config.yaml"):
        assert (run.run_dir / name).is_file(), name
    starts = sorted((run.run_dir / "provenance").glob("start_*.json"))
    records = [json.loads(path.read_text()) for path in starts]
    assert [record["variables"].get("SLURM_RESTART_COUNT", "0") for record in records] == ["0", "1", "2"]
    assert not (run.run_dir / "run.lock").exists()


def test_torchrun_style_stops_requeues_and_resumes_too(cluster, mix, tmp_path, straight):
    run = Launched(cluster, write_run(mix, tmp_path), "--nodes=2", "--style=torchrun")
    run.until(lambda: run.steps() >= 3)
    cluster.call("scancel", "--signal=USR1", "--batch", str(run.job))
    run.ends_well()
    assert run.restarts() == 1 and "stopped on request; requeued" in run.log()
    assert "stopped at step" in run.rank_log(0) and "resumed from" in run.rank_log(0)
    assert_same_end(run.run_dir, straight)
