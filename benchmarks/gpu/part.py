"""One part: `python -m benchmarks.gpu.part NAME FOLDER [--small]`. `python -m benchmarks.gpu` starts it."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.parts import PARTS
from megatron_mixcpt.cli import silence_libraries
from megatron_mixcpt.quick_import import quicken


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part")
    parser.add_argument("name", choices=[part.name for part in PARTS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    silence_libraries()
    quicken()
    importlib.import_module(f"benchmarks.gpu.{options.name}").run(
        Findings(options.folder, options.name), small=options.small
    )


if __name__ == "__main__":
    main()
