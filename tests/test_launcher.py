import itertools
import socket
from pathlib import Path

from megatron_mixcpt import launcher
from megatron_mixcpt.launcher import LISTENING_PORTS, free_port


def test_ports_are_distinct_free_and_not_those_of_outgoing_connections():
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 1024 <= min(LISTENING_PORTS) <= min(ports) and max(ports) < first_outgoing


def test_a_port_in_use_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(launcher, "_offers", itertools.count(LISTENING_PORTS.index(port)))
        assert free_port() != port
