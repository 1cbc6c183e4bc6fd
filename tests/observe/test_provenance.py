"""A run directory says which code, libraries and variables every start had."""

import json
import subprocess
import sys

import pytest

import megatron_mixcpt
from megatron_mixcpt.observe.provenance import _packages, record_provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that the package seems to lie in, with one commit."""
    package = tmp_path / "checkout" / "megatron_mixcpt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    git = ["git", "-C", str(package.parent), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(megatron_mixcpt, "__file__", str(package / "__init__.py"))
    return package


def starts(folder):
    return sorted(path.name for path in folder.iterdir())


def test_commit_changes_libraries_and_variables_are_kept_and_secrets_are_not(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("MIXCPT_API_KEY", "hidden")
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    folder = tmp_path / "provenance"
    record_provenance(folder)
    record_provenance(folder)
    assert starts(folder) == ["start_0001.json"]
    text = (folder / "start_0001.json").read_text()
    record = json.loads(text)
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (record["code"]["commit"], record["code"]["changed"]) == (head, False)
    assert record["variables"]["NCCL_DEBUG"] == "INFO" and record["variables"]["SLURM_JOB_ID"] == "12"
    assert "hidden" not in text and any(name.startswith("torch==") for name in record["packages"])

    (checkout / "__init__.py").write_text("one = 2\n")
    (checkout / "new.py").write_text("")
    record_provenance(folder)
    assert starts(folder) == ["start_0001.json", "start_0002.diff", "start_0002.json"]
    assert "-one = 1\n+one = 2" in (folder / "start_0002.diff").read_text()
    code = json.loads((folder / "start_0002.json").read_text())["code"]
    assert code["changed"] and code["untracked"] == ["megatron_mixcpt/new.py"]


def test_a_change_that_is_no_text_is_kept_as_far_as_it_is(checkout, tmp_path):
    (checkout / "__init__.py").write_bytes(b"one = '\xe9'\n")  # Latin-1
    record_provenance(tmp_path / "provenance")
    assert "+one = '\ufffd'" in (tmp_path / "provenance" / "start_0001.diff").read_text()


def test_an_installed_package_has_its_version_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_mixcpt, "__file__", str(tmp_path / "site" / "megatron_mixcpt" / "__init__.py"))
    record_provenance(tmp_path / "provenance")
    code = json.loads((tmp_path / "provenance" / "start_0001.json").read_text())["code"]
    assert code == {"version": megatron_mixcpt.__version__, "path": str(tmp_path / "site" / "megatron_mixcpt")}


def test_of_a_library_that_is_there_twice_the_imported_one_is_named(checkout, tmp_path, monkeypatch):
    about = tmp_path / "earlier" / "torch-0.0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(about.parent)
    _packages.cache_clear()
    try:
        record_provenance(tmp_path / "provenance")
    finally:
        _packages.cache_clear()
    packages = json.loads((tmp_path / "provenance" / "start_0001.json").read_text())["packages"]
    assert [package for package in packages if package.startswith("torch==")] == ["torch==0.0.1"]


def test_shards_that_start_at_the_same_moment_have_a_record_each(checkout, tmp_path):
    folder = tmp_path / "provenance"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_mixcpt.observe import provenance\n"
        "provenance._packages()\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for start in range(10): sys.argv = ['shard', sys.argv[1], str(start)]; "
        "provenance.record_provenance(Path('{folder}'))\n"
    ).replace("{folder}", str(folder))
    shards = [
        subprocess.Popen([sys.executable, "-c", code, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    for shard in shards:
        assert shard.stdout.readline() == "ready\n"
    for shard in shards:
        shard.stdin.write("go\n")
        shard.stdin.flush()
    assert [shard.wait(60) for shard in shards] == [0] * 4
    commands = [json.loads(path.read_text())["command"] for path in folder.glob("start_*.json")]
    assert sorted(commands) == sorted(["shard", str(n), str(start)] for n in range(4) for start in range(10))
