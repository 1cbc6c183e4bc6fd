"""Finished runs of a study, kept with the project, without weights: `python -m benchmarks.study.kept STUDY`.

STUDY is a file beside this one.

    benchmarks/results/study/STUDY/study.md, study.json, study.html
    benchmarks/results/study/STUDY/runs.tar.xz      measurements, metrics and settings of every finished run

`make study` puts them back before it starts, and so computes nothing twice: the name of a run's folder follows from its
settings, data and model, and where they are others nobody looks at it.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mixcpt.config import load_config
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.files import write_whole
from megatron_mixcpt.study.cells import Cells
from megatron_mixcpt.study.config import Study
from megatron_mixcpt.study.status import standing

STUDIES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
RESULTS = Path(__file__).parents[1] / "results" / "study"
PAGES = ("study.md", "study.json", "study.html")
ARCHIVE = "runs.tar.xz"
OF_A_RUN = ("train.yaml", "measured-*.json", "run/config.yaml", "run/settings.jsonl", "run/metrics.jsonl")


def keep(configuration: Path, results: Path) -> int:
    """Write the finished runs of a study into `results`; returns their number. The same runs give the same bytes."""
    cells = Cells(load_config(Study, configuration), str(configuration))
    finished = [cell.folder for cell in standing(cells).runs if not cells.missing(cell)]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for path in sorted(_files(cells.out, finished)):
            entry = tarfile.TarInfo(path.relative_to(cells.out).as_posix())
            entry.size = path.stat().st_size
            with open(path, "rb") as file:
                archive.addfile(entry, file)
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / ARCHIVE, content.getvalue())
    for name in PAGES:
        shutil.copyfile(cells.out / name, results / name)
    return len(finished)


def _files(out: Path, folders: Sequence[Path]) -> Iterator[Path]:
    yield from out.glob("base/measured-*.json")
    for folder in folders:
        for pattern in OF_A_RUN:
            yield from folder.glob(pattern)


def put_back(results: Path, out: Path) -> int:
    """Unpack what `out` does not have; returns the number of files. Nothing happens where nothing was kept."""
    if not (results / ARCHIVE).is_file():
        return 0
    with tarfile.open(results / ARCHIVE) as archive:
        missing = [entry for entry in archive if not (out / entry.name).exists()]
        archive.extractall(out, missing, filter="data")
    return len(missing)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    args = parser.parse_args(argv)
    try:
        count = keep(STUDIES[args.study], RESULTS / args.study)
    except MixcptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{count} finished runs: {RESULTS / args.study}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
