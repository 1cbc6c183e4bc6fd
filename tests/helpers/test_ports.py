"""Workers that run side by side are offered ports that they cannot take from each other, nor from what they start."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from megatron_mixcpt.runtime.launcher import LISTENING_PORTS
from tests.helpers import ports

OFFERED = """
import json
from tests.helpers.ports import free_port
print(json.dumps([free_port() for _ in range(200)]))
"""


def test_two_workers_share_no_port_and_take_none_of_the_product_s():
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", OFFERED],
            env=os.environ | {"PYTEST_XDIST_WORKER": f"gw{number}", "PYTEST_XDIST_WORKER_COUNT": "2"},
            stdout=subprocess.PIPE,
        )
        for number in range(2)
    ]
    first, second = (json.loads(worker.communicate(timeout=60)[0]) for worker in workers)
    assert len(set(first)) == len(set(second)) == 200 and not set(first) & set(second)
    sbatch = (Path(__file__).parents[2] / "launch/mixcpt.sbatch").read_text()
    begin, length = map(int, re.search(r"MASTER_PORT=\$\(\((\d+) \+ SLURM_JOB_ID % (\d+)\)\)", sbatch).groups())
    assert not {*first, *second} & {*LISTENING_PORTS, *range(begin, begin + length)}


def test_a_port_in_use_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        port = ports.free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(ports, "_offers", iter([ports._share.index(port), ports._share.index(port) + 1]))
        assert ports.free_port() != port
