"""docs/reliability.md: the table between its markers is written by `make test-faults`."""

import datetime
import os
import platform
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


class Figures:
    def __init__(self):
        self.rows = []

    def add(self, test, aim, result):
        self.rows.append((test, aim, result))

    def write(self):
        import torch

        python = f"Python {platform.python_version()}, torch {torch.__version__}"
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {python}"
        lines = [
            f"Written by `make test-faults` on {datetime.date.today()}: {machine}, gloo.",
            "",
            "| what was done | aim | result |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        page = PAGE.read_text()
        block = f"{BEGIN}\n" + "\n".join(lines) + f"\n{END}"
        PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, page, flags=re.S))
