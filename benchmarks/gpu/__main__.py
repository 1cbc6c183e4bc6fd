"""Everything that one GPU can tell of this project, in at most nine minutes, without network.

    make gpu                                         # or, without make:
    python -m benchmarks.gpu --out runs/gpu          # with the Python that has torch and the other packages
    python -m benchmarks.gpu --wheels wheels         # installs those in a folder for itself (docs/gpu.md has the list)
    MIXCPT_DEVICE=cpu python -m benchmarks.gpu --small   # tries the program out where there is no GPU

Writes log.txt, results.jsonl, summary.md and what some parts add into one folder of eight files at most. Exit code 0
where every part came to its end and everything that was tried is right, else 1; 2 where it cannot begin.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.all_parts import LOG, run_parts
from benchmarks.gpu.findings import FILE_NAME as RESULTS
from benchmarks.gpu.parts import PARTS, command_of, in_all
from benchmarks.gpu.processes import run_within
from benchmarks.gpu.summary import FILE_NAME as SUMMARY
from benchmarks.gpu.summary import went_well, write_summary

ROOT = Path(__file__).parents[2]
INSTALL_SECONDS = 120.0
NEEDED = {  # module: package; without these nothing runs, without others a part says what it misses
    "torch": "torch",
    "transformers": "transformers",
    "megatron.core": "megatron-core",
    "pydantic": "pydantic",
    "omegaconf": "omegaconf",
    "orjson": "orjson",
    "yaml": "pyyaml",
    "xxhash": "xxhash",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "psutil": "psutil",
}
WRITTEN = (LOG, RESULTS, SUMMARY, "profile.md", "trace.json.gz", "lssd_gpu.md", "lssd_gpu.json", "lssd_gpu.png")


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the parts' own cleaning up
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:
            (options.out / name).unlink(missing_ok=True)
    except OSError as error:
        print(f"error: --out {options.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mixcpt-wheels-") as site:
        paths = [str(ROOT), *([site] if options.wheels else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ |= {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        if options.wheels and not _install(options.wheels, Path(site), options.out / LOG):
            return 2
        sys.path[:0] = paths
        problem = _obstacle(options.small)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        chosen = in_all([part for part in PARTS if not options.only or part.name in options.only])
        machine = f"Made by `make gpu` on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}."
        if options.small:
            machine += " **In small: a trial of the program, no measurement.**"
        ended = run_parts(
            chosen,
            lambda part: command_of(part, options.out, options.small),
            options.out,
            machine,
            began,
            lambda text: print(text, flush=True),
        )
    print(
        f"\n{write_summary(options.out, machine, ended)}\n\nall of it: {options.out} ({time.monotonic() - began:.0f} s)"
    )
    return 0 if went_well(options.out, ended) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), default=Path("runs/gpu").resolve())
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install what lies there first, for this run alone")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program out")
    return parser.parse_args(arguments)


def _install(wheels: Path, site: Path, log: Path) -> bool:
    """Put the wheels of a folder into `site`, without asking any index."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        print(f"error: --wheels {wheels}: no wheels there; docs/gpu.md says how to fetch them", file=sys.stderr)
        return False
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    ended = run_within(INSTALL_SECONDS, [*command, "--target", str(site), *files], log)
    if not ended.well:
        print(f"error: --wheels {wheels}: pip: {ended.how}:\n{log.read_text()[-2000:]}", file=sys.stderr)
    return ended.well


def _obstacle(small: bool) -> str:
    """Why nothing can run here; empty where something can."""
    missing = [package for module, package in NEEDED.items() if not _is_there(module)]
    if missing:
        return f"not installed: {', '.join(missing)}. `make install`, or --wheels (docs/gpu.md has the list)"
    import torch

    wanted = os.environ.get("MIXCPT_DEVICE", "").lower()
    if wanted != "cpu" and not torch.cuda.is_available():
        return "no CUDA device; MIXCPT_DEVICE=cpu with --small tries the program out without one"
    if wanted == "cpu" and not small:
        return "MIXCPT_DEVICE=cpu is for trying the program out: add --small"
    os.environ["MIXCPT_DEVICE"] = wanted or "cuda"
    return ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


if __name__ == "__main__":
    sys.exit(main())
