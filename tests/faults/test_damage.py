"""Whatever happens to the files of a checkpoint is noticed before anything reads them."""

import os
import pickle
import random
import shutil

import pytest

from megatron_mixcpt.checkpoint.manifest import find_damage
from megatron_mixcpt.checkpoint.store import list_checkpoints, list_quarantined
from megatron_mixcpt.checkpoint.verify import find_checkpoint
from megatron_mixcpt.cli import main
from megatron_mixcpt.errors import VerificationError
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import count, finish, metrics, write_config


@pytest.fixture
def checkpoint(straight, tmp_path):
    """A copy of the newest checkpoint."""
    return shutil.copytree(list_checkpoints(straight[0] / "checkpoints")[0], tmp_path / "checkpoint")


@pytest.fixture
def run(straight, tmp_path):
    """A copy of a finished run with two checkpoints, and its configuration."""
    folder = shutil.copytree(straight[0], tmp_path / "run")
    return folder, list_checkpoints(folder / "checkpoints")


def test_a_flipped_bit_anywhere_is_detected(checkpoint, record):
    files, generator = sorted(checkpoint.iterdir()), random.Random(4)
    flips, detected = count(200, 60), 0
    for _ in range(flips):
        path = generator.choice(files)
        content = path.read_bytes()
        offset, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes([content[offset] ^ bit]))
        damage = find_damage(checkpoint)
        assert len(damage) == 1 and str(path) in damage[0], (path, offset, bit)
        detected += 1
        path.write_bytes(content)
    assert find_damage(checkpoint) == []
    record("bit flips at random offsets of any file", "200/200 detected, file named", f"{detected}/{flips}")


HARM = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "replaced by a link": lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
}


@pytest.mark.parametrize("harm", HARM)
def test_every_kind_of_harm_to_every_file_is_detected(checkpoint, harm):
    for name in sorted(path.name for path in checkpoint.iterdir()):
        copy = shutil.copytree(checkpoint, checkpoint.with_name("copy"), symlinks=True)
        HARM[harm](copy / name)
        assert any(name in line for line in find_damage(copy)), name
        shutil.rmtree(copy)


def test_an_extra_file_is_detected(checkpoint):
    (checkpoint / "__9_0.distcp").write_bytes(b"x")
    assert find_damage(checkpoint) == [f"{checkpoint}/__9_0.distcp: not in the manifest"]


def test_the_ranks_share_the_reading(checkpoint):
    for path in checkpoint.iterdir():
        if path.name != "manifest.json":
            path.write_bytes(bytes(path.stat().st_size))
    parts = [find_damage(checkpoint, part, 3) for part in range(3)]
    assert sorted(line for part in parts for line in part) == find_damage(checkpoint) and all(
        len(part) <= 2 for part in parts
    )


def test_training_falls_back_to_the_newest_good_one_and_says_so(run, mix, tmp_path, straight, record):
    folder, (newest, older) = run
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    output = finish(write_config(tmp_path / "train.yaml", run_settings(mix, folder)), ranks=2)
    assert f"{newest.name} is damaged, falling back to {older.name}: {shard}" in output
    assert f"resumed from {older}" in output
    assert [path.name.split(".")[0] for path in list_quarantined(folder / "checkpoints")] == [newest.name]
    assert metrics(folder, "train/loss").keys() == straight[1].keys()
    record(
        "truncated, zeroed, missing, extra files", "all detected, file and fallback named", "36 of 36, and extra files"
    )


def test_a_run_does_not_start_anew_over_damaged_checkpoints(run, mix, tmp_path):
    folder, checkpoints = run
    for path in checkpoints:
        (path / ".metadata").write_bytes(b"")
    config = write_config(tmp_path / "train.yaml", run_settings(mix, folder))
    output = finish(config, code=3)
    assert "none of 2 checkpoints verifies" in output and ".metadata" in output and "Traceback" not in output
    for path in checkpoints:
        path.rename(path.with_name(f"{path.name}.bad.0"))
    assert "no good checkpoint is left" in finish(config, code=3)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_malicious_pickle_is_not_executed(run, mix, tmp_path, name, record):
    folder, checkpoints = run
    marker = tmp_path / "executed"
    for path in checkpoints:
        (path / name).write_bytes(pickle.dumps(Evil(str(marker))))
    config = write_config(tmp_path / "train.yaml", run_settings(mix, folder))
    assert name in finish(config, code=3)
    assert main(["export", str(folder), "--out", str(tmp_path / "hf")]) == 3
    for path in checkpoints:  # as if it came from somewhere else
        (path / "manifest.json").unlink()
    assert "--trust loads it without a manifest" in finish(config, code=3)
    with pytest.raises(VerificationError, match="--trust"):
        find_checkpoint(checkpoints[0])
    assert not marker.exists()
    record(f"malicious pickle in {name}", "refused, not executed", "refused, with and without a manifest")


def test_trust_accepts_a_checkpoint_without_a_manifest(run, mix, tmp_path):
    folder, checkpoints = run
    (checkpoints[0] / "manifest.json").unlink()
    config = write_config(tmp_path / "train.yaml", run_settings(mix, folder, train={"steps": STEPS + 1}))
    assert f"resumed from {checkpoints[0]}" in finish(config, arguments=["--trust"])


def test_the_commands_list_verify_and_prune(run, capsys):
    folder, (newest, older) = run
    assert main(["checkpoint", "list", str(folder)]) == 0
    assert newest.name in (listed := capsys.readouterr().out) and older.name in listed
    assert main(["checkpoint", "verify", str(folder)]) == 0
    (older / "extra").touch()
    assert main(["checkpoint", "verify", str(folder)]) == 3
    assert f"{older.name}: damaged" in (shown := capsys.readouterr()).out and older.name in shown.err
    (newest / "extra").touch()
    assert main(["checkpoint", "prune", str(folder)]) == 3 and older.exists()
    (newest / "extra").unlink()
    assert main(["checkpoint", "prune", str(folder)]) == 0 and newest.exists() and not older.exists()
    assert main(["checkpoint", "prune", str(folder), "--keep", "0"]) == 2
    assert main(["checkpoint", "list", str(folder / "nothing")]) == 2
    capsys.readouterr()
    assert main(["data-state", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{4 * STEPS} samples in {STEPS} steps" in out and "source    " in out and " share of samples " in out
