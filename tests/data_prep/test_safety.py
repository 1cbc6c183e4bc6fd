"""Nothing is lost, mixed up or taken for good: kills, damage, changed inputs, full disks, memory."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mixcpt.data_prep import plan as plan_module
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.errors import ConfigError, MixcptError
from tests.data_prep.helpers import digests

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from megatron_mixcpt.data_prep import plan
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.errors import MixcptError
"""


@pytest.fixture
def many_chunks(monkeypatch):
    monkeypatch.setattr(plan_module, "CHUNK_BYTES", 1 << 13)


def parts_of(out: Path) -> list[Path]:
    return sorted((out / ".parts").rglob("*.part"))


def stamps(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in parts_of(out)}


def test_killed_anywhere_and_run_again_gives_the_same_bytes(config_values, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_values))
    done = subprocess.run(
        [sys.executable, "-m", "tests.data_prep.crashes", str(path), "20"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    rounds = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]
    assert len(rounds) == 20
    for each in rounds:
        # A killed worker must be told from a finished one: exit code 75 and no result, never a hang.
        assert each["killed"] == (-9 if each["victim"] == "parent" else 75), each
        assert each["again"] == 0 and each["same"], each


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "remove", "receipt", "no receipt"])
def test_a_damaged_part_is_noticed_and_made_again(config_values, many_chunks, damage):
    out = Path(config_values["out"])
    preprocess(parse_config(config_values))
    want, before = digests(out), stamps(out)
    part = parts_of(out)[3]
    receipt = part.with_name(part.name.split("-")[0] + ".json")
    data = part.read_bytes()
    if damage == "flip":
        part.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    elif damage == "truncate":
        part.write_bytes(data[:-64])
    elif damage == "extend":
        part.write_bytes(data + bytes(64))
    elif damage == "remove":
        part.unlink()
    elif damage == "receipt":
        receipt.write_bytes(receipt.read_bytes().replace(b'"records":', b'"recorts":'))
    else:
        receipt.unlink()
    for path in out.glob("docs-*"):
        path.unlink()
    preprocess(parse_config(config_values))
    assert digests(out) == want
    after = stamps(out)
    made_again = {path for path in after if after[path] != before.get(path)}
    assert made_again == {part}


def test_finished_parts_are_not_made_again(config_values, many_chunks):
    out = Path(config_values["out"])
    preprocess(parse_config(config_values))
    before = stamps(out)
    config_values["sources"][0]["weight"] = 0.1  # only the mixture changes
    preprocess(parse_config(config_values))
    assert stamps(out) == before


@pytest.mark.parametrize("change", ["input", "same size", "template", "tokenizer", "seq_length"])
def test_old_parts_are_never_taken_for_new_ones(config_values, corpus, tokenizer_dir, tmp_path, many_chunks, change):
    out = Path(config_values["out"])
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    config_values["tokenizer"] = str(tokenizer)
    preprocess(parse_config(config_values))
    text = corpus["instruction"].read_text()
    if change == "input":
        corpus["instruction"].write_text(text + json.dumps({"instruction": "new", "response": "new"}) + "\n")
    elif change == "same size":
        corpus["instruction"].write_text(text.replace("patient", "teacher", 1))
    elif change == "template":
        config_values["sources"][1]["prompt"] = "Q: {instruction}"
    elif change == "tokenizer":
        path = tokenizer / "tokenizer.json"
        path.write_text(path.read_text().replace('"version"', ' "version"'))
    else:
        config_values["seq_length"] = 64
        config_values["sources"][1]["max_bad_fraction"] = 1.0
        config_values["sources"][2]["max_bad_fraction"] = 1.0
    preprocess(parse_config(config_values))
    got, folders = digests(out), len(list((out / ".parts").iterdir()))
    shutil.rmtree(out)
    preprocess(parse_config(config_values))
    fresh = digests(out)
    assert {name: got[name] for name in fresh} == fresh
    assert folders > 3, "the change must have led to parts of its own"


def test_an_input_that_changes_during_the_run_is_an_error(config_values, corpus, monkeypatch, many_chunks):
    from megatron_mixcpt.data_prep import pipeline

    real = pipeline.choose_engines

    def meddle(*args):
        with open(corpus["domain"], "a") as file:
            file.write('{"text": "late"}\n')
        return real(*args)

    monkeypatch.setattr(pipeline, "choose_engines", meddle)
    with pytest.raises(MixcptError, match="changed during the run"):
        preprocess(parse_config(config_values))


def test_two_runs_in_one_folder_are_refused(config_values):
    import fcntl

    out = Path(config_values["out"])
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(MixcptError, match="another mixcpt preprocess"):
            preprocess(parse_config(config_values))


@pytest.mark.parametrize("limit", [20_000, 60_000])
def test_a_full_disk_is_explained_and_the_next_run_finishes(config_values, tmp_path, limit):
    """A file-size limit makes every long write fail half-way, in workers and in the parent, as a full disk does."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_values))
    code = (
        "import sys\n"
        "from megatron_mixcpt.cli import main\n"
        "from megatron_mixcpt.data_prep import plan\n"
        "plan.CHUNK_BYTES = 1 << 14\n"
        "sys.exit(main(['preprocess', sys.argv[1], '--workers', '2']))\n"
    )

    def limited():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    run = [sys.executable, "-c", code, str(path)]
    full = subprocess.run(run, preexec_fn=limited, stderr=subprocess.PIPE, text=True)
    last = full.stderr.splitlines()[-1]
    assert full.returncode == 1 and re.match(
        f"error: {config_values['out']}/.+: cannot be written: .+; free some", last
    )
    out = Path(config_values["out"])
    assert not (out / "mix.json").exists()
    subprocess.run(run, check=True)
    got = digests(out)
    shutil.rmtree(out)
    subprocess.run(run, check=True)
    assert got == digests(out)


def test_worker_memory_does_not_grow_with_the_input(config_values, tmp_path):
    """Peak memory of a worker stays under 250 MB although one gzip file (one chunk) unpacks to much more."""
    import gzip

    big = tmp_path / "big.jsonl.gz"
    line = json.dumps({"text": "a line of ordinary words about the liver and its diseases " * 40}) + "\n"
    with gzip.open(big, "wt", compresslevel=1) as file:
        for _ in range(150):
            file.write(line * 1000)
    config_values["sources"] = [{**config_values["sources"][0], "paths": [str(big)]}]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_values))
    code = RUN + (
        "from megatron_mixcpt.data_prep.pipeline import prepare, tokenize\n"
        "from pathlib import Path\n"
        "config = parse_config(json.load(open(sys.argv[1])))\n"
        "Path(config.out).mkdir()\n"
        "tokenize(prepare(config, Path(config.out)), workers=1)\n"
        # Not ru_maxrss: that still counts the process this one was started from.
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout.split()[-1]) < 250 * 1024


@pytest.mark.parametrize("wrong", ["tokenizer", "the last source's path"])
def test_a_refusal_leaves_no_trace(config_values, wrong):
    if wrong == "tokenizer":
        config_values["tokenizer"] = "nowhere"
    else:
        config_values["sources"][-1]["paths"] = ["absent.jsonl"]
    with pytest.raises(ConfigError):
        preprocess(parse_config(config_values))
    assert not Path(config_values["out"]).exists()
