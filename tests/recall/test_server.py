"""The engine that asks a server, against a real one in a process of its own."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mixcpt.config import validate
from megatron_mixcpt.errors import ConfigError, MixcptError, StoppedError
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.recall.run import recall
from megatron_mixcpt.runtime.launcher import free_port
from tests.recall.models import recall_values

pytestmark = pytest.mark.slow

AMOUNTS = {"instructions": 10, "text": 10}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("no_proxy", "*")
        yield


@contextmanager
def serving(model, port, log, mode="tokens"):
    with open(log, "ab") as file:
        command = [sys.executable, "-m", "tests.recall.completions", str(model), str(port), mode]
        process = subprocess.Popen(command, stdout=file, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def configured(folder, model, port, **engine):
    openai = {"url": f"http://127.0.0.1:{port}/v1", "model": "heron", "concurrency": 3, "block_size": 10}
    openai |= {"patience_seconds": 600.0, **engine}  # a loaded machine takes its time to start one
    return validate(RecallConfig, recall_values(folder, model, engine={"openai": openai}, n=AMOUNTS), "test")


def kept(config):
    return {name: (Path(config.out) / name).read_bytes() for name in ("instructions.jsonl", "text.jsonl")}


def asked(log):
    return [json.loads(line)[1] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(chat_model, tmp_path_factory):
    """An undisturbed run: what it kept, and the seeds of the requests that it took."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with serving(chat_model, port, folder / "log"):
        config = configured(folder, chat_model, port)
        recall(config)
    return kept(config), asked(folder / "log")


def test_a_server_that_dies_and_comes_back_costs_nothing_but_what_was_in_flight(whole, chat_model, tmp_path):
    port, log = free_port(), tmp_path / "log"
    config = configured(tmp_path, chat_model, port)
    result = {}
    with serving(chat_model, port, log):
        thread = threading.Thread(target=lambda: result.update(summary=recall(config)))
        thread.start()
        while len(log.read_text().splitlines()) < 8:
            time.sleep(0.01)
    with serving(chat_model, port, log):
        thread.join(600)
    assert kept(config) == whole[0]
    assert len(asked(log)) <= len(whole[1]) + config.engine.openai.concurrency


def test_a_server_that_is_gone_ends_with_75_and_the_next_run_asks_only_for_the_rest(whole, chat_model, tmp_path):
    port, log = free_port(), tmp_path / "log"
    config = configured(tmp_path, chat_model, port, patience_seconds=1.0)
    patient = configured(tmp_path, chat_model, port)
    stored = tmp_path / "out" / ".samples"
    with serving(chat_model, port, log) as process:
        _until(lambda: _answers(port))
        killer = threading.Thread(target=lambda: (_until(lambda: len(asked(log)) >= 8), process.kill()))
        killer.start()
        with pytest.raises(StoppedError, match="run the same command"):
            recall(config)
        killer.join()
    growing = next(stored.glob("*/*.growing"))
    with growing.open("ab") as file:
        file.write(b"0123 cut sho")  # as a kill in the middle of a write leaves it
    already = len(asked(log))
    with serving(chat_model, port, log):
        recall(patient)
    assert kept(patient) == whole[0]
    assert len(asked(log)) - already < len(whole[1])
    assert not list(stored.glob("*/*.growing"))


def test_a_server_that_answers_nonsense_is_named_and_nothing_is_lost(chat_model, tmp_path):
    port = free_port()
    with serving(chat_model, port, tmp_path / "log", "nonsense"):
        with pytest.raises(MixcptError, match=r"answers nonsense.*welcome"):
            recall(configured(tmp_path, chat_model, port))


def test_a_server_that_refuses_is_quoted(chat_model, tmp_path):
    port = free_port()
    with serving(chat_model, port, tmp_path / "log", "refuse"):
        with pytest.raises(ConfigError, match=r"HTTP 400.*no such model"):
            recall(configured(tmp_path, chat_model, port))


def test_prompts_may_go_as_text(chat_model, tmp_path):
    port = free_port()
    with serving(chat_model, port, tmp_path / "log", "text"):
        summary = recall(configured(tmp_path, chat_model, port, prompts="text"))
    assert summary["streams"]["text"]["kept"] > 0


def _until(ready):
    while not ready():
        time.sleep(0.01)


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
