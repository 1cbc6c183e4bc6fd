"""The command line: exit codes, signals, progress."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.commands import preprocess as cli
from megatron_mixcpt.commands.options import parse_shard
from megatron_mixcpt.errors import ConfigError
from tests.data_prep.helpers import digests

MAIN = "import sys; from megatron_mixcpt.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def config_file(config_values, tmp_path) -> Path:
    path = tmp_path / "preprocess.yaml"
    path.write_text(yaml.safe_dump(config_values))
    return path


def mixcpt(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", MAIN, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_success_prints_the_mix_and_returns_0(config_file, config_values):
    done = mixcpt("preprocess", config_file, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Path(config_values["out"]) / "mix.json")
    assert "tokenize: " in done.stderr and "source docs: engine" in done.stderr
    assert f"next: mixcpt verify {config_values['out']}" in done.stderr
    assert mixcpt("verify", config_values["out"]).returncode == 0
    missing = mixcpt("verify", config_values["out"] + "-nowhere")
    assert missing.returncode == 2 and "-nowhere" in missing.stderr


def test_a_wrong_config_returns_2(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("tokenizer: x\nout: y\nseq_len: 3\nsources: []\n")
    done = mixcpt("preprocess", path)
    assert done.returncode == 2
    assert f"{path}:3: seq_len: unknown key; did you mean seq_length?" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_many_bad_records_return_4(config_file, corpus):
    with open(corpus["domain"], "a") as file:
        file.write("broken\n" * 5)
    done = mixcpt("preprocess", config_file)
    assert done.returncode == 4
    assert "5 of 405 records are bad" in done.stderr and "domain.jsonl:401" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_it_with_its_code_and_it_resumes(config_file, config_values, corpus, tmp_path, number, code):
    slow = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job ignores
        "import time; from megatron_mixcpt.data_prep import pipeline, plan; plan.CHUNK_BYTES = 4096\n"
        "real = pipeline.process_chunk\n"
        "def process_chunk(*args): time.sleep(0.2); return real(*args)\n"
        "pipeline.process_chunk = process_chunk\n"
    )
    command = [sys.executable, "-c", slow + MAIN, "preprocess", str(config_file), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts = Path(config_values["out"]) / ".parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*/*.part"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not (Path(config_values["out"]) / "mix.json").exists()
    fast = "from megatron_mixcpt.data_prep import plan; plan.CHUNK_BYTES = 4096\n"
    assert subprocess.run([sys.executable, "-c", fast + MAIN, *command[3:]]).returncode == 0
    got = digests(Path(config_values["out"]))
    config_file.write_text(yaml.safe_dump({**config_values, "out": str(tmp_path / "fresh")}))
    assert subprocess.run([sys.executable, "-c", fast + MAIN, *command[3:]]).returncode == 0
    assert got == digests(tmp_path / "fresh")


@pytest.mark.parametrize("text, want", [("1/4", (0, 4)), ("4/4", (3, 4))])
def test_shards_count_from_one(text, want):
    assert parse_shard(text) == want


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0"])
def test_wrong_shards_are_explained(text):
    with pytest.raises(ConfigError, match="--shard"):
        parse_shard(text)


def test_a_wrong_number_of_workers_is_explained(config_file):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(ConfigError, match="at least 1"):
        cli.run(parser.parse_args([str(config_file), "--workers", "0"]))


def test_progress_on_a_terminal_is_a_bar(config_file):
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "preprocess", str(config_file), "--workers", "2"],
        stderr=follower,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    assert process.wait(timeout=60) == 0
    assert b"tokenize" in shown and b"MB/s" in shown and "━".encode() in shown


def test_manifest_lists_everything_and_repeats_byte_for_byte(config_file, config_values):
    assert mixcpt("preprocess", config_file, "--workers", 1).returncode == 0
    out = Path(config_values["out"])
    first = digests(out)
    listed = set(json.loads((out / "manifest.json").read_text())["files"])
    assert set(first) == listed | {"manifest.json", "mix.json"}
    assert mixcpt("preprocess", config_file, "--workers", 2).returncode == 0
    assert digests(out) == first
