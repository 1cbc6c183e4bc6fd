"""A full disk ends no run and harms no checkpoint; neither does any other failure of a save behind the training."""

import os
import subprocess

import pytest

from megatron_mixcpt.checkpoint.info import read_info
from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import Fleet, finish, metrics, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB: two checkpoints of 9 MiB fit, three do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def ignore_free_space():
    """The disk fills up between the check and the write."""
    from megatron_mixcpt.checkpoint import saver

    saver.require_space = lambda parent, needed: None


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("when", ["before", "during"])
def test_training_goes_on_over_a_full_disk(small_disk, tmp_path, mix, straight, when, background, record):
    """Nothing is pruned, so the third save finds no room; room is made at the end, and the last save succeeds."""
    run = small_disk / "run"
    values = run_settings(mix, run, checkpoint={"every": 4, "keep": 9, "async": background}, train={"steps": 400})
    fault = {0: (ignore_free_space,)} if when == "during" else None
    fleet = Fleet(write_config(tmp_path / "train.yaml", values), faults=fault)
    fleet.until(lambda: metrics(run, "ckpt/failed") or "was not saved" in fleet.output())
    failed = min(metrics(run, "ckpt/failed"))
    fleet.until(lambda: max(metrics(run, "train/loss")) > failed + 1)  # it trains on
    assert ("GiB are free: free some space" if when == "before" else "No space left on device") in fleet.output()
    kept = list_checkpoints(run / "checkpoints")
    assert [read_info(path).step for path in kept] == [8, 4] and all(find_damage(path) == [] for path in kept)
    assert "step_00000008" in (run / "checkpoints" / "latest.json").read_text()
    subprocess.run(["rm", "-rf", str(kept[1])], check=True)
    fleet.send(15)
    assert fleet.wait() == [75], fleet.output()
    assert max(metrics(run, "train/loss")) == read_info(list_checkpoints(run / "checkpoints")[0]).step
    if when == "during":
        record(
            f"disk full during a save ({'async' if background else 'sync'})",
            "clear error, training goes on, old checkpoints intact",
            "No space left on device, named; 2/2 intact",
        )


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(small_disk, tmp_path, mix):
    run = small_disk / "run"
    values = run_settings(mix, run, checkpoint={"every": 4, "keep": 9})
    output = finish(write_config(tmp_path / "train.yaml", values), code=1)
    assert f"error: the checkpoint of step {STEPS} was not saved" in output and "Traceback" not in output
    assert len(list_checkpoints(run / "checkpoints")) == 2
    subprocess.run(["rm", "-rf", str(run / "checkpoints" / "step_00000004")], check=True)
    finish(write_config(tmp_path / "train.yaml", values))  # room was made: the same command finishes


def break_writer(times):
    """The first saves fail on this rank, as a broken file system would make them."""
    from megatron_mixcpt.checkpoint.writer import ShareWriter

    original = ShareWriter.write

    def write(self):
        nonlocal times
        times -= 1
        if times >= 0:
            raise OSError(5, os.strerror(5), str(self.checkpoint_dir))
        return original(self)

    ShareWriter.write = write


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_on_one_rank_is_known_to_all_and_moves_nothing(tmp_path, mix, background):
    run = tmp_path / "run"
    values = run_settings(mix, run, checkpoint={"every": 3, "async": background})
    output = finish(write_config(tmp_path / "train.yaml", values), ranks=2, faults={1: (break_writer, 2)})
    assert output.count("was not saved, training goes on") == 2 and "rank 1: [Errno 5]" in output
    assert sorted(metrics(run, "ckpt/failed")) == [3, 6]
    assert [read_info(path).step for path in list_checkpoints(run / "checkpoints")] == [12, 9]
    assert not list((run / "checkpoints").glob("*.tmp.*"))


def test_no_room_for_one_checkpoint_is_refused_before_anything_starts(tmp_path, mix):
    folder = tmp_path / "tiny"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        output = finish(write_config(tmp_path / "train.yaml", run_settings(mix, folder / "run")), code=2)
        assert "one checkpoint takes 0.01 GiB" in output and not (folder / "run").exists()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
