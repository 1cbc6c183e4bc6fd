"""A rank under torchrun on SLURM: `mixcpt` with the log and the exit code of its own that srun would give it.

torchrun turns the exit codes of its workers into 1; the batch script must tell a stopped run (75) from a failed one.
"""

import os
import sys


def main() -> int:
    """`mixcpt sys.argv`; logs to $MIXCPT_WORKER_LOGS<rank>.log, leaves the code in $MIXCPT_WORKER_CODES<rank>."""
    rank = int(os.environ["RANK"])
    log = os.open(f"{os.environ['MIXCPT_WORKER_LOGS']}{rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from megatron_mixcpt.cli import main as mixcpt

    code = 1
    try:
        code = mixcpt()
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        with open(f"{os.environ['MIXCPT_WORKER_CODES']}{rank}", "w") as file:
            file.write(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
