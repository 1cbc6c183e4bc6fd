"""`python -m megatron_mixcpt.demo --model smollm2|tiny --out runs/demo`: the main job in miniature, docs/demo.md."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from megatron_mixcpt.demo.settings import MODELS
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.evaluate.loading import quiet_libraries


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code of the command line (docs/commands.md)."""
    parser = argparse.ArgumentParser(prog="python -m megatron_mixcpt.demo", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo; default: %(default)s")
    parser.add_argument("--arm", choices=["recall"], help="one more arm: rehearsal of what the model wrote itself")
    parser.add_argument("--fresh", action="store_true", help="start anew instead of continuing an earlier run")
    args = parser.parse_args(argv)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # so that a running command is stopped with us
    quiet_libraries()  # before any library is imported: some read the environment only then
    from megatron_mixcpt.demo.driver import run_demo

    try:
        run_demo(MODELS[args.model], args.out, fresh=args.fresh, with_recall=args.arm == "recall")
    except MixcptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
