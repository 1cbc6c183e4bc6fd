import itertools
import socket
import subprocess
import sys

import pytest

from megatron_mixcpt.runtime import launcher
from megatron_mixcpt.runtime.launcher import LISTENING_PORTS, free_port


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
