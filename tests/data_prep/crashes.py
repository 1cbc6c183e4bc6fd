"""Run by test_safety in a process of its own: kill the pipeline at many points, run it again, compare the bytes.

Usage: python -m tests.data_prep.crashes CONFIG.json ROUNDS. Prints one JSON line per round.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from megatron_mixcpt.data_prep import plan
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.errors import StoppedError
from tests.data_prep.helpers import digests

real_replace = os.replace


def run_forked(values: dict, kill_at: int | None, victim: str) -> int:
    """Run the pipeline in a child; just before its `kill_at`-th rename the victim kills itself. Returns the status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    parent = os.getpid()
    calls = 0

    def replace(source, target):
        nonlocal calls
        is_victim = (os.getpid() == parent) == (victim == "parent")
        calls += is_victim
        if is_victim and calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(source, target)

    if kill_at is not None:
        os.replace = replace
    try:
        preprocess(parse_config(values), workers=2)
    except StoppedError:
        os._exit(75)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    plan.CHUNK_BYTES = 1 << 13
    out = Path(values["out"])
    assert run_forked(values, None, "parent") == 0
    want = digests(out)
    rng = random.Random(4)
    for number in range(int(sys.argv[2])):
        shutil.rmtree(out)
        victim = ("parent", "worker")[number % 2]
        kill_at = rng.randint(1, 24 if victim == "parent" else 12)
        killed = run_forked(values, kill_at, victim)
        again = run_forked(values, None, "parent")
        same = digests(out) == want
        print(json.dumps({"victim": victim, "kill_at": kill_at, "killed": killed, "again": again, "same": same}))


if __name__ == "__main__":
    main()
