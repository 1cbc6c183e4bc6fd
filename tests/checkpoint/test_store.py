"""Names, order, retention and the manifest, without a model."""

import errno
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.checkpoint import find_checkpoint, manifest, newest_checkpoint
from megatron_mixcpt.checkpoint.manifest import find_damage, hash_file, read_manifest, write_manifest
from megatron_mixcpt.checkpoint.store import (
    choose_result,
    commit,
    list_checkpoints,
    list_quarantined,
    new_directory,
    prune,
    quarantine,
    require_space,
    result_of,
    seal,
    size_of,
    step_of,
)
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.plan.estimate import kept_checkpoints
from tests.helpers.checkpoints import checkpoint_info


def save(parent, step, content=b"weights", **entries):
    folder = new_directory(parent, step)
    (folder / "__0_0.distcp").write_bytes(content)
    return commit(folder, checkpoint_info(step, **entries))


@given(st.binary(max_size=10_000_000 // 512))
def test_a_files_hash_is_that_of_its_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    assert hash_file(path) == {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_files_larger_than_a_block_are_hashed_whole(tmp_path):
    content = random.Random(1).randbytes((4 << 20) + 12345)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file")["xxh3_128"] == xxhash.xxh3_128_hexdigest(content)


def test_checkpoints_are_listed_newest_first_and_latest_names_the_newest(tmp_path):
    for step in (2, 100, 30):
        save(tmp_path, step)
    new_directory(tmp_path, 200)
    quarantine(tmp_path / "step_00000030")
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100, 2]
    assert [path.name.split(".")[0] for path in list_quarantined(tmp_path)] == ["step_00000030"]
    save(tmp_path, 201)
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": "step_00000201", "step": 201}


def test_the_next_save_removes_what_a_dead_one_left_and_overwrites_nothing(tmp_path):
    left = new_directory(tmp_path, 4)
    save(tmp_path, 4)
    assert not left.exists()
    with pytest.raises(MixcptError, match="never overwritten"):
        new_directory(tmp_path, 4)


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 0, [60]), (2, 0, [50, 60]), (1, 20, [20, 40, 60]), (2, 30, [30, 50, 60]), (9, 0, None)],
)
def test_retention(tmp_path, keep, every, left):
    for step in range(10, 70, 10):
        save(tmp_path, step)
    prune(tmp_path, keep, every)
    assert sorted(step_of(path) for path in list_checkpoints(tmp_path)) == (left or [10, 20, 30, 40, 50, 60])
    assert not list(tmp_path.glob("*.tmp.*"))


def test_a_result_is_spared_and_named_until_the_next_checkpoint(tmp_path):
    parent = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(parent, step)
    assert result_of(parent) is None
    prune(parent, 1, spared=10)
    assert [step_of(path) for path in list_checkpoints(parent)] == [30, 10]
    choose_result(parent, parent / "step_00000010", {"budget": 0.1})
    assert result_of(parent) == parent / "step_00000010" == find_checkpoint(tmp_path) == newest_checkpoint(tmp_path)
    assert json.loads((parent / "latest.json").read_text())["result"] == {"budget": 0.1}
    save(parent, 40)
    assert result_of(parent) is None and find_checkpoint(tmp_path) == parent / "step_00000040"


def test_pruning_by_hand_spares_the_result_of_a_budget_and_the_best_so_far(tmp_path, capsys):
    ended = tmp_path / "ended" / "checkpoints"
    for step in (10, 20, 30):
        save(ended, step)
    choose_result(ended, ended / "step_00000010", {"budget": 0.1})
    assert main(["checkpoint", "prune", str(ended.parent)]) == 0
    assert [step_of(path) for path in list_checkpoints(ended)] == [30, 10]
    assert result_of(ended) == ended / "step_00000010"

    at_work = tmp_path / "at-work" / "checkpoints"
    for step in (10, 20, 30):
        save(at_work, step, forget={"controller": {"best_step": 20}})
    (at_work / "step_00000020" / "__0_0.distcp").write_bytes(b"other")
    assert main(["checkpoint", "prune", str(at_work.parent)]) == 3  # it would be kept, and is damaged
    assert "step_00000020, which would be kept, is damaged; nothing removed" in capsys.readouterr().err
    (at_work / "step_00000020" / "__0_0.distcp").write_bytes(b"weights")
    assert main(["checkpoint", "prune", str(at_work.parent)]) == 0
    assert [step_of(path) for path in list_checkpoints(at_work)] == [30, 20]


def test_the_size_of_a_checkpoint_is_told_while_it_is_removed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "step" / name).mkdir(parents=True)
        (tmp_path / "step" / name / "shard").write_bytes(b"1234")
    assert size_of(tmp_path / "step") == 8
    walk = os.walk

    def removed_meanwhile(path):
        for folder in walk(path):
            shutil.rmtree(path, ignore_errors=True)
            yield folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "walk", lambda path: removed_meanwhile(path))
        assert size_of(tmp_path / "step") == 0
    assert size_of(tmp_path / "step") == 0


def test_a_result_may_lie_beside_the_checkpoints_and_one_that_is_gone_is_none(tmp_path):
    parent = tmp_path / "checkpoints"
    save(parent, 10)
    average = save(tmp_path / "average", 10)
    choose_result(parent, average, {})
    assert result_of(parent) == average == find_checkpoint(tmp_path)
    shutil.rmtree(average)
    assert result_of(parent) is None and find_checkpoint(tmp_path) == parent / "step_00000010"


def test_the_manifest_says_what_wrote_it(tmp_path):
    checkpoint = save(tmp_path, 7)
    manifest = read_manifest(checkpoint)
    assert manifest["step"] == 7 and manifest["layout"] == {"world_size": 1, "tensor": 1}
    assert {"torch", "megatron-core", "python"} <= manifest["libraries"].keys()
    assert set(manifest["files"]) == {"__0_0.distcp", "checkpoint.json"}


def test_hashes_taken_while_writing_are_those_of_the_files(tmp_path):
    (tmp_path / "a").write_bytes(b"right")
    write_manifest(tmp_path, {}, {"a": hash_file(tmp_path / "a")})
    assert find_damage(tmp_path) == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"in a folder")
    seal(tmp_path, checkpoint_info(1))
    assert find_damage(tmp_path) == [] and "b/c" in read_manifest(tmp_path)["files"]


@pytest.mark.parametrize(("failures", "damaged"), [(2, False), (3, True)])
def test_what_cannot_be_read_for_a_moment_is_no_damage(tmp_path, monkeypatch, failures, damaged):
    """A shared file system that fails over: the checkpoint would be set aside."""
    checkpoint, left = save(tmp_path, 1), [failures]

    def read(path, amount=None):
        if path.suffix == ".distcp" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return hash_file(path, amount)

    monkeypatch.setattr(manifest, "hash_file", read)
    monkeypatch.setattr(manifest, "PAUSES", (0.0, 0.0))
    assert bool(find_damage(checkpoint)) is damaged and left == [0]


def test_another_spelling_of_a_manifest_is_refused(tmp_path):
    checkpoint = save(tmp_path, 1)
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content))  # the same content
    with pytest.raises(VerificationError, match="its own hash"):
        read_manifest(checkpoint)


def test_a_reader_refuses_damage_passes_over_it_where_allowed_and_changes_nothing(tmp_path):
    older, newer = save(tmp_path / "checkpoints", 1), save(tmp_path / "checkpoints", 2)
    assert find_checkpoint(tmp_path) == newer
    (newer / "__0_0.distcp").write_bytes(b"weighty")
    told = []
    with pytest.raises(VerificationError, match=r"step_00000002/__0_0\.distcp: content.*step_00000001.*--allow-older"):
        find_checkpoint(tmp_path, tell=told.append)
    assert not told
    assert find_checkpoint(tmp_path, allow_older=True, tell=told.append) == older and newer.exists()
    assert "step_00000002 is damaged, falling back to step_00000001" in told[0]
    with pytest.raises(VerificationError, match="content differs"):
        find_checkpoint(newer)
    with pytest.raises(ConfigError, match="no such directory"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run directory that has saved one"):
        find_checkpoint(tmp_path / "empty")


def test_missing_room_is_told_with_numbers(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(MixcptError, match=r"needs 1048576\.00 GiB.*lower checkpoint\.keep"):
        require_space(tmp_path, 1 << 50)


@given(st.integers(1, 30), st.integers(0, 8), st.integers(1, 4), st.integers(0, 8))
def test_as_many_are_kept_as_the_plan_says(steps, every, keep, keep_every):
    checkpoint = {"every": every, "every_minutes": 0, "keep": keep, "keep_every": keep_every}
    values = {"data": {"mix": "mix.json"}, "model": {"preset": "tiny"}, "train": {"steps": steps}, "run_dir": "run"}
    config = Config.model_validate(values | {"checkpoint": checkpoint})
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        for step in range(1, steps + 1):
            if step == steps or (every and step % every == 0):
                (parent / f"step_{step:08d}").mkdir()
                prune(parent, keep, keep_every)
        assert len(list_checkpoints(parent)) == kept_checkpoints(config)
