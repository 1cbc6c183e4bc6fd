"""The signals that ask a run to stop and save; the launcher, the trainer and its helper processes agree on them."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
