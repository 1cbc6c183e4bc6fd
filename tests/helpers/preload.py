"""Imported once by the fork server, so that every process of the tests starts with the libraries loaded."""

import signal
import warnings

from megatron_mixcpt.runtime.stop import STOP_SIGNALS

warnings.filterwarnings("ignore")

import tests.train.runs  # noqa: E402, F401

# As in the ranks that `mixcpt --nproc` starts: a stop signal that comes before anybody listens waits.
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
