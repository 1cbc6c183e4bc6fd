"""One rank of benchmarks/checkpoint_cpu.py: what a save and a resume cost it. Runs on older versions too.

`python checkpoint_ranks.py CONFIG OUT`, in the environment of a rank; writes `OUT/<rank>.json`.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from megatron_mixcpt.checkpoint import Saver, load_checkpoint
from megatron_mixcpt.checkpoint.store import list_checkpoints
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.train.setup import build

try:
    from megatron_mixcpt.runtime.parallel import parallel_context
except ImportError:  # an older version
    from megatron_mixcpt.parallel import parallel_context  # type: ignore[import-not-found, no-redef]


def read_so_far() -> int:
    """Bytes that this process has read from files; gloo's sockets do not count."""
    rows = Path("/proc/self/io").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("rchar"))


def resident(name: str) -> int:
    """Bytes of memory: VmRSS now, VmHWM at most."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith(name))


class Measured:
    """What a rank does in a `with` block: seconds, bytes read, and memory above what it had."""

    def __enter__(self) -> Measured:
        gc.collect()
        torch.distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._read, self._before = read_so_far(), resident("VmRSS")
        self._began = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        self.values = {
            "seconds": time.monotonic() - self._began,
            "read": read_so_far() - self._read,
            "memory": resident("VmHWM") - self._before,
        }


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config, out = validate(Config, json.loads(Path(sys.argv[1]).read_text()), "benchmark"), Path(sys.argv[2])
    grid = config.parallel
    with parallel_context(grid.tensor, grid.pipeline) as state:
        parts = build(config, state)
        found = {}
        # The whole model is an argument of `begin` in older versions.
        description = [parts.arch] if "arch" in inspect.signature(Saver.begin).parameters else []
        for name in ("foreground", "background"):
            saver = Saver(out / name, background=name == "background")
            for step in (1, 2):  # the second save into memory that the first has allocated
                with Measured() as save:
                    saver.begin(step, parts.model, *description, parts.optimizer)
                    outcome = saver.finish() if name == "foreground" else None
                    standstill = time.monotonic() - save._began
                    outcome = outcome or saver.finish()
                assert outcome is not None and outcome.path is not None, outcome
                share = outcome.path / f"__{state.rank}_0.distcp"
                written = share.stat().st_size if share.exists() else 0
                found[f"{name} {step}"] = save.values | {"standstill": standstill, "written": written}
        checkpoint = list_checkpoints(out / "foreground")[0]
        load_checkpoint(checkpoint, parts.model, parts.optimizer)  # brings the libraries' pages in
        with Measured() as resumed:
            load_checkpoint(checkpoint, parts.model, parts.optimizer)
        found["resume"] = resumed.values
        (out / f"{state.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
