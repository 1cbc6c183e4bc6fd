"""A rank of the small problem: `python -m megatron_mixcpt.certify.rank FOLDER`, under a launcher (see subject.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_mixcpt.cli import silence_libraries
from megatron_mixcpt.quick_import import quicken
from megatron_mixcpt.runtime.stop import end_at_stop_signals


def main(folder: Path) -> None:
    end_at_stop_signals()
    silence_libraries()
    quicken()
    from megatron_mixcpt.certify.subject import observe_all  # which loads the libraries

    observe_all(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
