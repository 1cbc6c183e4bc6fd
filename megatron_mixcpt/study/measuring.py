"""Measure one run of a study with its averages, or the base model: a process of its own, which frees all it took.

`python -m megatron_mixcpt.study.measuring STUDY base|NAME-OF-A-RUN`
"""

from __future__ import annotations

import sys

from megatron_mixcpt.cli import silence_libraries
from megatron_mixcpt.config import load_config
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.files import write_json
from megatron_mixcpt.quick_import import quicken
from megatron_mixcpt.runtime.scratch import scratch_folder
from megatron_mixcpt.study.cells import BASE, Cell, Cells
from megatron_mixcpt.study.config import Study


def measure_base(cells: Cells) -> None:
    """Write the base model's measurements."""
    from megatron_mixcpt.evaluate.measure import measure_model
    from megatron_mixcpt.evaluate.stored import rows_of

    write_json(cells.base_file, {"1": rows_of(measure_model(cells.base, cells.settings))})


def measure_run(cells: Cells, cell: Cell) -> None:
    """Write the measurements of a run and its averages, each as it is made; what was measured before stays.

    Raises ConfigError or VerificationError where the run has no checkpoint that is whole.
    """
    from megatron_mixcpt.convert.average import average
    from megatron_mixcpt.evaluate.measure import measure_model
    from megatron_mixcpt.evaluate.stored import rows_of
    from megatron_mixcpt.evaluate.target import as_hf_directory

    path = cells.measured_file(cell)
    measured = dict(cells.measured(cell))
    with as_hf_directory(cells.base) as base, as_hf_directory(cell.run_dir) as tuned:
        for alpha in cells.missing(cell):
            with scratch_folder("mixcpt-study-") as made:
                model = cell.run_dir if alpha == 1.0 else made / f"alpha-{alpha:g}"
                if alpha != 1.0:
                    average(base, tuned, alpha, model)
                measured[f"{alpha:g}"] = rows_of(measure_model(model, cells.settings))
            write_json(path, measured)
    if not cells.study.keep_checkpoints:
        cell.remove_weights()


def main(study: str, name: str) -> int:
    """Measure; returns the exit code of the command line (docs/commands.md)."""
    silence_libraries()
    quicken()
    try:
        cells = Cells(load_config(Study, study), study)
        from megatron_mixcpt.evaluate.loading import quiet_libraries

        quiet_libraries()
        if name == BASE:
            measure_base(cells)
        else:
            measure_run(cells, cells.named(name))
    except MixcptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
