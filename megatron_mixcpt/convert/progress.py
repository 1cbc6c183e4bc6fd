"""Progress of conversions: a bar on a terminal, one line at the end in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def tensor_progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the name of each finished tensor."""
    console = Console(file=sys.stderr, highlight=False)
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda name: progress.update(task, advance=1)
    console.print(f"{title}: {total} tensors in {time.monotonic() - began:.1f} s", markup=False)
