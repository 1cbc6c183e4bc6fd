"""A chain as it would be submitted, to read before it is."""

from __future__ import annotations

from megatron_mixcpt.slurm.submit import Job

COLUMNS = ("job", "size", "time", "after", "command")


def overview(jobs: list[Job]) -> str:
    """A line a job, then their scripts, each under its path."""
    before = ["-", *(job.stage for job in jobs)]
    rows = [COLUMNS, *((job.stage, job.size, job.time, after, job.command) for job, after in zip(jobs, before))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    scripts = [f"\n######## {job.folder / job.stage}.sbatch\n{job.script}" for job in jobs]
    return "\n".join([*lines, *scripts])
