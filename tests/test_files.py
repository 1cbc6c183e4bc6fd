"""What is written appears whole or not at all, and a disk that fills up is named by what was being written."""

import json
import os
import subprocess

import pytest

from megatron_mixcpt import cli
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import WriteError, new_directory, write_json, write_whole, writing


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    path = write_whole(tmp_path / "new" / "a.txt", "old")
    with writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.txt"]
    assert json.loads(write_json(tmp_path / "b.json", {"ü": [1.5]}).read_text()) == {"ü": [1.5]}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(2, "gone", "input.txt")])
def test_what_fails_leaves_what_was_there_and_passes_the_error_on(tmp_path, error):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)), writing(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise error
    with pytest.raises(type(error)), new_directory(tmp_path / "out") as out:
        (out / "half").write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_directory_appears_whole_and_never_over_something_else(tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    (tmp_path / "deep" / "out.partial").mkdir()
    (tmp_path / "deep" / "out.partial" / "litter").touch()  # of a process that was killed
    with new_directory(out) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
        assert os.listdir(out) == []
    assert [p.name for p in sorted((tmp_path / "deep").rglob("*"))] == ["out", "inner", "a"]
    for taken in (out, out / "inner" / "a"):
        with pytest.raises(ConfigError, match="exists and is not empty"), new_directory(taken):
            pytest.fail("it began")


def test_a_full_disk_is_told_of_what_was_written_and_gets_its_room_back(small_disk):
    write_whole(small_disk / "a.bin", b"old")
    with pytest.raises(WriteError, match=r"a\.bin: cannot be written: No space left on device; free some space"):
        write_whole(small_disk / "a.bin", bytes(2 << 20))
    with pytest.raises(WriteError, match=r"out: cannot be written: No space"), new_directory(small_disk / "out") as out:
        try:
            (out / "weights").write_bytes(bytes(2 << 20))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None  # as torch puts it
    assert os.listdir(small_disk) == ["a.bin"] and (small_disk / "a.bin").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/a\.txt: cannot be written: "):
        write_whole(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(WriteError, match=r"file/out: cannot be written: "), new_directory(tmp_path / "file" / "out"):
        pytest.fail("it began")


def test_a_command_that_meets_a_full_disk_says_so_in_one_line(small_disk, capsys, monkeypatch):
    def run(args):
        (small_disk / "x").write_bytes(bytes(2 << 20))

    monkeypatch.setattr("megatron_mixcpt.commands.doctor.run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
