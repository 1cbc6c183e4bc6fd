"""A mix.json that was edited or damaged gets the same verdict from every command that reads it."""

import json
import shutil

import pytest
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.data_prep.mix import fingerprint, read_mix
from megatron_mixcpt.errors import ConfigError, VerificationError
from tests.helpers.corpus import edit_mix, write_mix

COMMANDS = ["train", "plan", "cache-teacher", "rehearse", "align", "select", "eval", "verify", "inspect", "mix"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("verdict") / "data")


@pytest.fixture
def mix(prepared, tmp_path):
    shutil.copytree(prepared.parent, tmp_path / "data")
    return tmp_path / "data" / prepared.name


def arguments(command, mix, folder):
    """A call of `command` that reads `mix` and can find nothing else wrong before it has."""
    values = {"model": {"preset": "tiny"}, "data": {"mix": str(mix)}, "run_dir": str(folder / "run")}
    values["train"] = {"steps": 1, "micro_batch_size": 2, "global_batch_size": 2}
    if command == "cache-teacher":
        values["teacher"] = {"source": "cached", "cache": str(folder / "cache")}
    if command == "align":
        values["align"] = {"method": "sft"}
    if command == "select":
        values = {"model": {"preset": "tiny"}, "data": {"mix": str(mix)}, "out": str(folder / "selected")}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "config.json").write_text("{}")
    own = {
        "eval": [str(folder / "hf"), "--mix", str(mix), "--out", str(folder / "eval")],
        "verify": [str(mix)],
        "inspect": [str(mix)],
        "mix": [str(mix), "--out", str(folder / "view")],
    }
    return [command, *own.get(command, [str(folder / "config.yaml")])]


def edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


EDITS = {
    "another weight": (edited(lambda mix: mix["sources"][0].update(weight=0.9)), 3, "not by hand"),
    "a source less": (edited(lambda mix: mix["sources"].pop()), 3, "not by hand"),
    "other data": (edited(lambda mix: mix["sources"][0]["train"].update(prefix="tasks-train")), 3, "not by hand"),
    "a weight in words": (edited(lambda mix: mix["sources"][0].update(weight="half")), 3, "not by hand"),
    "no fingerprint": (edited(lambda mix: mix.pop("fingerprint")), 3, "not by hand"),
    "a number too large": (edited(lambda mix: mix.update(seed=2**70)), 3, "not by hand"),
    "sealed without a key": (lambda path: edit_mix(path, lambda mix: mix.pop("tokenizer")), 3, "'tokenizer'"),
    "cut off": (lambda path: path.write_text(path.read_text()[:-9]), 3, "not valid JSON"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe"), 3, "not valid JSON"),
    "of another version": (edited(lambda mix: mix.update(format="mixcpt-mix/9")), 2, "this version reads"),
    "something else": (lambda path: path.write_text("[]"), 2, "not a mixture"),
    "gone": (lambda path: path.unlink(), 2, "`mixcpt preprocess` writes it"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_what_was_edited_by_hand(command, mix, tmp_path, capsys):
    EDITS["another weight"][0](mix)
    assert main(arguments(command, mix, tmp_path)) == 3
    assert "change mixtures with `mixcpt mix`, not by hand" in capsys.readouterr().err


@pytest.mark.parametrize("name", EDITS)
def test_the_verdict_is_the_same_for_the_trainer_and_for_the_data_commands(name, mix, tmp_path, capsys):
    edit, code, message = EDITS[name]
    edit(mix)
    for command in ("plan", "align", "verify", "inspect", "mix"):
        assert main(arguments(command, mix, tmp_path)) == code, command
        assert message in capsys.readouterr().err, command


def test_a_mixture_of_the_first_version_reads_as_before(mix):
    now = read_mix(mix)
    content = json.loads(mix.read_text())
    content["format"] = "mixcpt-mix/1"
    mix.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))
    before = read_mix(mix)
    assert before.sources == now.sources and before.tokenizer == now.tokenizer


def test_a_folder_stands_for_its_mixture(mix):
    assert read_mix(mix.parent) == read_mix(mix)
    with pytest.raises(ConfigError, match="no such file"):
        read_mix(mix.parent / "elsewhere")
    mix.write_text("{")
    with pytest.raises(VerificationError, match="not valid JSON"):
        read_mix(mix.parent)
