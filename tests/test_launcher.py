import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mixcpt.runtime import launcher
from megatron_mixcpt.runtime.forked import can_fork
from megatron_mixcpt.runtime.launcher import LISTENING_PORTS, free_port, unplaced


def test_ports_are_distinct_free_and_not_those_of_outgoing_connections():
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert set(ports) <= set(LISTENING_PORTS)
    first_outgoing = 32768  # of Linux, where nobody has changed it
    assert LISTENING_PORTS.start >= 1024 and LISTENING_PORTS.stop <= first_outgoing


def test_a_port_in_use_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(launcher, "_offers", itertools.count(LISTENING_PORTS.index(port)))
        assert free_port() != port


def test_what_torchrun_has_set_is_kept_from_ranks_of_our_own():
    """TORCHELASTIC_USE_AGENT_STORE above all: rank 0 would look for a store that nobody serves."""
    others = {"PATH": "/bin", "RANKS": "1", "SLURM_JOB_ID": "7"}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "0", "MASTER_PORT": "1"}
    assert unplaced(others | torchrun | {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}) == others


BLOCKED = """
import os, signal, time
from megatron_mixcpt.runtime.stop import StopRequest

heard = []
with StopRequest():
    signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert not heard
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(0.2)
    assert heard == ["SIGTERM"]
"""
FORKED = """
import os, signal, time
from megatron_mixcpt.runtime import stop as signals

signals.BLOCKED_SECONDS = 0.1
with signals.StopRequest():
    child = os.fork()
    if child == 0:
        time.sleep(30)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    time.sleep(0.5)
"""


@pytest.mark.parametrize("program", [BLOCKED, FORKED], ids=["blocked by the launcher", "of a child"])
def test_a_stop_request_takes_no_signals_that_are(program):
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    "asked, files, can",
    [("cpu", ["nvidia0"], True), ("", [], True), ("", ["nvidiactl"], False), ("", ["dxg"], False), ("cuda", [], False)],
)
def test_ranks_are_forked_only_where_no_gpu_can_be_meant(tmp_path, asked, files, can):
    for name in files:
        (tmp_path / name).touch()
    assert can_fork({"MIXCPT_DEVICE": asked} if asked else {}, tmp_path) is can


RANK = """
import atexit, os, sys
atexit.register(print, "left", flush=True)
print(__name__, sys.argv[1:], os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpgid(0) == os.getpid(), flush=True)
print("to stderr", file=sys.stderr, flush=True)
exec(sys.argv[1])
"""
ENDS = {"sys.exit(75)": 75, "raise ValueError('of a rank')": 1, "os.kill(os.getpid(), 9)": 137, "": 0}
LAUNCHES = f"""
from megatron_mixcpt.runtime.launcher import launch
print([launch(1, [end, "b c"], program="of_a_rank") for end in {list(ENDS)}])
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["forked", "started"])
def test_a_forked_rank_is_what_a_started_one_is(tmp_path, device):
    (tmp_path / "of_a_rank.py").write_text(RANK)
    environment = os.environ | {"MIXCPT_DEVICE": device, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True, timeout=180
    )
    expected = []
    for end, code in ENDS.items():
        expected += [f"__main__ {[end, 'b c']} 0 1 True", *(["left"] if code != 137 else [])]
    assert done.stdout.splitlines() == [*expected, str(list(ENDS.values()))], done.stderr
    assert done.stderr.count("to stderr") == len(ENDS)
    assert done.stderr.count("ValueError: of a rank") == 1
    assert "rank 0: killed by SIGKILL, as the kernel does where memory runs out\n" in done.stderr


ERRS = """
import os, sys
from megatron_mixcpt import cli
from megatron_mixcpt.errors import ConfigError, LostRankError

def run(args):
    rank = int(os.environ["RANK"])
    if rank == 1:
        raise LostRankError("lost contact with another rank")
    raise ConfigError(f"model.hf: gone on rank {rank}" if rank in (2, 3) else "train.lr: wrong")

cli.parse = lambda argv: type("Arguments", (), {"run": staticmethod(run)})
sys.exit(cli.main([]))
"""


def test_what_rank_0_does_not_know_is_told_by_the_rank_that_does_and_the_rest_once(tmp_path):
    (tmp_path / "errs.py").write_text(ERRS)
    environment = os.environ | {"MIXCPT_DEVICE": "cpu", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    launching = (
        "import sys; from megatron_mixcpt.runtime.launcher import launch; sys.exit(launch(5, [], program='errs'))"
    )

    def said(code, **variables):
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
        ).stderr.splitlines()

    of_others = [f"rank {rank}: error: model.hf: gone on rank {rank}" for rank in (2, 3)]
    assert said(launching) == ["error: train.lr: wrong", *of_others]
    assert said(ERRS, RANK="3") == of_others[1:]  # on a cluster, in a log of its own
    assert said(ERRS, RANK="1") == []


SAVES = """
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    os._exit(75)

signal.signal(signal.SIGTERM, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
pathlib.Path("ready").touch()
time.sleep(30)
"""
LOADING = "import pathlib, time; pathlib.Path('loading').touch(); time.sleep(1)"
TOLD_TO_STOP = """
import sys
from megatron_mixcpt.runtime import forked
from megatron_mixcpt.runtime.launcher import launch
forked.LOADED = "loading"
sys.exit(launch(2, [], program="saves"))
"""


@pytest.mark.parametrize("moment", ["loading", "ready"])
@pytest.mark.parametrize("whom", ["launcher", "group"])
def test_a_stop_signal_reaches_forked_ranks_whenever_it_comes_and_their_save_is_waited_for(tmp_path, moment, whom):
    (tmp_path / "saves.py").write_text(SAVES)
    (tmp_path / "loading.py").write_text(LOADING)
    environment = os.environ | {"MIXCPT_DEVICE": "cpu", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    command = [sys.executable, "-c", TOLD_TO_STOP]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (tmp_path / moment).exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # until the other rank is there too
        (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and out.count("saved") == 2


ENDS_BADLY = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(3)
time.sleep(3)
print("why it ended", flush=True)
time.sleep(60)
"""
PATIENT = """
from megatron_mixcpt.runtime import launcher
launcher.GRACE_SECONDS, launcher.FIRST_EXTRA_SECONDS = 0.5, 11.5
print("code", launcher.launch(2, [], program="ends_badly"))
"""


def test_rank_0_is_given_the_time_to_say_why_all_ranks_ended_and_no_more(tmp_path):
    (tmp_path / "ends_badly.py").write_text(ENDS_BADLY)
    environment = os.environ | {"MIXCPT_DEVICE": "cpu", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", PATIENT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.stdout.splitlines() == ["why it ended", "code 3"], done.stderr


def test_what_a_command_loads_is_loaded_before_its_ranks_are_forked():
    """Otherwise every rank loads it for itself, and the fork saves nothing."""
    ask = "import sys; sys.path.insert(0, ''); {first}before = set(sys.modules); import megatron_mixcpt.train.loop; "
    ask += "print(sum(not name.startswith('megatron_mixcpt') for name in set(sys.modules) - before))"
    counts = {}
    for first in ("", "import megatron_mixcpt.runtime.loaded; "):
        done = subprocess.run(
            [sys.executable, "-c", ask.format(first=first)], capture_output=True, text=True, check=True
        )
        counts[first] = int(done.stdout)
    without, after = counts.values()
    assert after < without / 20, counts
