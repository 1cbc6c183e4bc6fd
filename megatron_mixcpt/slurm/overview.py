"""What would be submitted, to read before it is."""

from __future__ import annotations

import shlex

from megatron_mixcpt.slurm.submit import Job, sbatch_command

COLUMNS = ("job", "size", "time", "after", "command")


def overview(jobs: list[Job]) -> str:
    """A line a job, then their scripts, each under its path."""
    before = ["-", *(job.stage for job in jobs)]
    rows = [COLUMNS, *((job.stage, job.size, job.time, after, job.command) for job, after in zip(jobs, before))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    scripts = [f"\n######## {job.path}\n{job.script}" for job in jobs]
    return "\n".join([*lines, *scripts])


def submissions(jobs: list[Job]) -> str:
    """The calls that would submit them; the number of a job before stands as its name."""
    lines = ["nothing was submitted or written; without --dry-run each script goes where this finds it:"]
    for number, job in enumerate(jobs):
        after = f"JOB-OF-{jobs[number - 1].stage}" if number else None
        lines.append(f"  {shlex.join(sbatch_command(job, after))}")
    return "\n".join(lines)
