"""Ports for process groups of the tests, of which two workers of pytest never offer each other's."""

import contextlib
import itertools
import os
import socket

# Above those that `mixcpt --nproc` and launch/mixcpt.sbatch take for themselves and below those that Linux gives to
# outgoing connections, so that a port which a test was given is still free when its ranks come to listen on it.
FIRST, LAST = 30000, 32767
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_share = range(FIRST + _worker, LAST + 1, _workers)
# Processes of one worker and suites that run side by side on a machine begin at different places.
_offers = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A local port of this worker's share that nobody listens on and that this process has not been given yet."""
    for offer in itertools.islice(_offers, len(_share)):
        port = _share[offer % len(_share)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port of {FIRST}-{LAST} is free on this machine")
