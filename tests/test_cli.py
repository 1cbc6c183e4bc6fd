"""The command line: help for every command, and for every mistake a message that names it, with the right exit code."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from megatron_mixcpt.checkpoint.store import seal
from megatron_mixcpt.cli import COMMANDS, main
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.config.history import record_settings
from megatron_mixcpt.data_prep.mix import read_mix
from tests.helpers.checkpoints import checkpoint_info
from tests.helpers.corpus import write_mix
from tests.train.runs import settings


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("cli") / "data")


@pytest.fixture
def values(mix, tmp_path):
    return settings(mix, tmp_path / "run")


def fails(capsys, tmp_path, values, *arguments, code=2):
    """Run `mixcpt train` on `values`; returns what it says on standard error."""
    config = tmp_path / "train.yaml"
    config.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    assert main(["train", str(config), *arguments]) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "Traceback" not in errors
    return errors


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"mixcpt {command}" in capsys.readouterr().out


# Importing one of these takes longer than anyone waits for an answer.
LIBRARIES = ["torch", "transformers", "megatron", "deepspeed", "datasets", "pandas", "triton"]
ANSWERS = """
import json, sys
from megatron_mixcpt.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    print(json.dumps([code, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def answers(*command_lines):
    """`(exit codes, standard error)` of commands; fails where one of them has imported a library."""
    arguments = [json.dumps(command_lines), json.dumps(LIBRARIES)]
    done = subprocess.run([sys.executable, "-c", ANSWERS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(command_lines)
    assert [line for line, (_, libraries) in zip(command_lines, found) if libraries] == []
    return [code for code, _ in found], done.stderr


def test_help_comes_without_importing_a_library():
    codes, _ = answers(["--help"], *([command, "--help"] for command in COMMANDS))
    assert set(codes) == {0}


def test_mistakes_are_told_without_importing_a_library(values, tmp_path):
    config, nothing = tmp_path / "train.yaml", str(tmp_path / "nothing")
    config.write_text(yaml.safe_dump(values))
    start = ["train", str(config)]
    cached = ["cache-teacher", str(config), "teacher.source=cached", f"teacher.cache={tmp_path}/cache"]
    codes, errors = answers(
        ["trian"],
        [*start, f"data.mix={nothing}"],
        [*start, "model.preset=null", f"model.hf={nothing}"],
        [*start, "model.preset=null", f"model.checkpoint={nothing}"],
        [*start, "--nproc", "0"],
        [*cached, "--nproc", "0"],
        [*cached, f"data.mix={nothing}"],
    )
    assert set(codes) == {2}
    assert "trian is no command; did you mean train?" in errors
    assert "error: data.mix: " in errors and f"error: model.hf: {nothing} is not a directory" in errors
    assert f"error: model.checkpoint: {nothing}: no such directory; `mixcpt train`" in errors
    assert errors.count("error: --nproc 0: at least 1") == 2
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "options",
    [
        *(["plan", "x.yaml", "--tokens", number] for number in ("nan", "inf", "0")),
        *(["plan", "x.yaml", option, "-5"] for option in ("--memory", "--peak-tflops", "--nproc", "--mfu")),
        ["plan", "x.yaml", "--mfu", "1.1"],
        ["inspect", "x", "--sample", "-1"],
        ["inspect", "x", "--seed", "-1"],
        ["rehearse", "x.yaml", "--nproc", "0"],
    ],
    ids=" ".join,
)
def test_numbers_that_mean_nothing_are_refused_as_such(options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2 and f"argument {options[-2]}: must be" in capsys.readouterr().err


def test_runs_that_are_at_their_end_or_cannot_go_on_answer_without_importing_a_library(values, mix, tmp_path):
    """The first is told as such, whatever else is set now, and its record stays; the others name the key."""
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    same = read_mix(mix)
    info = checkpoint_info(4, seq_length=same.seq_length, tokenizer_hash=same.tokenizer_hash)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, info)
    record_settings(tmp_path / "run", 0, load_config(Config, str(config), []))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    start = ["train", str(config)]
    codes, errors = answers(
        start,
        [*start, "train.lr=0.5"],
        [*start, "train.steps=3"],
        [*start, "train.dtype=bf16"],
        [*start, "adapter.method=lora"],
    )
    assert codes == [0, 0, 2, 2, 2]
    assert "has 4 steps behind it, train.steps is 3: raise it" in errors
    assert "was trained with train.dtype=fp32, not bf16" in errors and "was trained with no adapter" in errors
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    shown = capsys.readouterr().err
    assert exit_.value.code == 2 and all(command in shown for command in COMMANDS)


def test_a_file_of_another_command_is_named_as_such(capsys, tmp_path, values):
    theirs = tmp_path / "preprocess.yaml"
    theirs.write_text("tokenizer: models/base\nseq_length: 128\nout: data\nsources:\n  - name: docs\n")
    assert main(["train", str(theirs)]) == 2
    assert f"{theirs}:4: sources: this file is for `mixcpt preprocess`" in capsys.readouterr().err
    ours = tmp_path / "train.yaml"
    ours.write_text(yaml.safe_dump(values))
    assert main(["preprocess", str(ours)]) == 2
    assert "this file is for `mixcpt train`" in capsys.readouterr().err


def test_an_unknown_key_names_the_nearest(capsys, tmp_path, values):
    values["train"]["warmup_step"] = 3
    assert "train.warmup_step: unknown key; did you mean train.warmup_steps?" in fails(capsys, tmp_path, values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=.inf", "train.lr: Input should be a finite number"),
        ("train.seed=4294967296", "train.seed: Input should be less than 4294967296"),
        ("data.mix=.", "data.mix: mix.json: no such file"),
        ("run_dir=README.md", "run_dir README.md is a file"),
        ("train.lr=-1", "train.lr: Input should be greater than 0"),
        ("train.schedule=cosin", "train.schedule: Input should be 'cosine', 'wsd' or 'constant'"),
        ("train.steps=many", "train.steps"),
        ("train.warmup_steps=9", "train.warmup_steps (9) must be below train.steps (4)"),
        ("train.global_batch_size=7", "train.global_batch_size (7) must be a multiple of train.micro_batch_size (2)"),
        ("loss.target=swapped", "loss.target"),
        ("loss.temperature=0", "loss.temperature"),
        ("loss.by_kind={domain: {ce: 0, kd: 0}, instruction: {ce: 0, kd: 0}}", "loss.by_kind leaves no weight on what"),
        ("teacher.source=none", "needs a teacher"),
        ("teacher.source=magic", "teacher.source"),
        ("model.preset=huge", "is none of"),
        ("model.hf=somewhere", "exactly one of model.hf, model.checkpoint and model.preset"),
        ("data.mix=nowhere/mix.json", "no such file; `mixcpt preprocess` writes it"),
        ("data.seq_length=64", "was packed for 32: set data.seq_length=32"),
        ("parallel.tensor=3", "parallel.tensor=3"),
        ("parallel.pipeline=5", "parallel.pipeline=5 makes 5 parts of 4 layers: use at most 4"),
        ("parallel.sequence=true", "parallel.sequence needs parallel.tensor > 1"),
        ("steps", "overrides are written key=value"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(capsys, tmp_path, values, override, message):
    assert message in fails(capsys, tmp_path, values, override)


def test_what_is_wrong_is_told_with_the_line_or_the_override_it_came_from(capsys, tmp_path, values):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    line = 1 + path.read_text().splitlines().index("train:")
    for override, place in (
        ("train.lr=-1", "command line, train.lr=-1: train.lr: "),
        ("train.warmup_steps=9", f"{path}:{line} with train.warmup_steps=9: train.warmup_steps (9) must be below"),
    ):
        assert main(["train", str(path), override]) == 2
        assert place in capsys.readouterr().err
    values["train"]["lr"] = -1
    path.write_text(yaml.safe_dump(values))
    line = 1 + path.read_text().splitlines().index("  lr: -1")
    assert main(["train", str(path)]) == 2
    assert f"{path}:{line}: train.lr: " in capsys.readouterr().err


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused_before_they_start(capsys, tmp_path, values):
    assert "2 x 3 data-parallel ranks = 6" in fails(capsys, tmp_path, values, "--nproc", "3")


@pytest.mark.parametrize("nproc", ["0", "-1"])
def test_too_few_processes_are_refused(capsys, tmp_path, values, nproc):
    assert f"--nproc {nproc}: at least 1" in fails(capsys, tmp_path, values, f"--nproc={nproc}")


def test_overrides_may_follow_an_option(capsys, tmp_path, values):
    message = "train.lr: Input should be greater than 0"
    assert message in fails(capsys, tmp_path, values, "--nproc", "2", "train.lr=-1")
    assert message in fails(capsys, tmp_path, values, "train.steps=3", "--nproc", "2", "train.lr=-1")


def test_an_unknown_option_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "train.yaml", "--nprocs", "2", "train.lr=1"])
    assert exit_.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_missing_or_malformed_file_is_named(capsys, tmp_path):
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml: no such configuration file" in capsys.readouterr().err
    assert "cannot be read as YAML" in fails(capsys, tmp_path, "train: [1, 2\n")
    assert "expected `key: value` lines, found a list" in fails(capsys, tmp_path, "- 1\n- 2\n")


def test_a_missing_data_file_is_named(capsys, tmp_path, values):
    mix = write_mix(tmp_path / "data")
    (tmp_path / "data" / "facts-train.flags.bin").unlink()
    values["data"]["mix"] = str(mix)
    assert "facts-train.flags.bin is missing; preprocess again" in fails(capsys, tmp_path, values)


def test_another_format_version_is_refused(capsys, tmp_path, values):
    mix = write_mix(tmp_path / "data")
    content = json.loads(mix.read_text())
    values["data"]["mix"] = str(mix)
    content["format"] = "mixcpt-mix/0"
    mix.write_text(json.dumps(content))
    assert "format 'mixcpt-mix/0'" in fails(capsys, tmp_path, values)


def test_an_error_of_a_rank_is_told_once_with_its_exit_code(tmp_path, values):
    """A mistake that only the ranks can see: the Hugging Face directory has no weights."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    values["model"] = {"hf": str(folder)}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    result = subprocess.run(
        [sys.executable, "-m", "megatron_mixcpt.cli", "train", str(path), "--nproc", "2"],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode in (1, 2, 3), result.stderr
    assert result.stderr.count("error: ") == 1 and "safetensors" in result.stderr, result.stderr
