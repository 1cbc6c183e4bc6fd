"""`mixcpt launch CONFIG [options] [key=value ...]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

NAME = "launch"
HELP = """Submit a training run, a study or a chain of stages to SLURM. The job runs on a copy of the configuration,
keeps a log a rank, and goes back into the queue when it is preempted, reaches its time limit or loses a node, to
resume. Example: mixcpt launch train.yaml --nodes 2 --gpus-per-node 8 --partition gpu --time 12:00:00"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options without a value here take the default of slurm/resources.py."""
    parser.add_argument(
        "config",
        help="YAML file that `mixcpt train`, `mixcpt align` or `mixcpt study` takes, or a chain (with `stages`)",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the training file's"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of a node, 0 without (default 8)")
    parser.add_argument("--tasks-per-node", type=int, metavar="R", help="ranks of a node (default: one a GPU)")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of a rank (default 8)")
    parser.add_argument("--mem", metavar="SIZE", help="memory of a node, as 64G (default: all that it has)")
    parser.add_argument("--time", metavar="HH:MM:SS", help="time limit of the job (default 24:00:00)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image (pyxis/enroot)")
    parser.add_argument("--container-mounts", nargs="+", metavar="A:B", help="folders it sees beside the working one")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="environment modules to load")
    parser.add_argument("--style", choices=("srun", "torchrun"), help="who starts the ranks of a node (default srun)")
    parser.add_argument("--python", metavar="PATH", help="interpreter of the job (default: this one)")
    parser.add_argument("--max-restarts", type=int, metavar="N", help="times the job may be requeued (default 20)")
    parser.add_argument("--grace", type=int, metavar="SECONDS", help="time to save before the time limit (default 300)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option, as qos=high"
    )
    parser.add_argument(
        "--certify", action="store_true", help="a job before it that proves what it computes; see `mixcpt certify`"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")


def run(args: argparse.Namespace) -> int:
    from megatron_mixcpt.config import Config, load_config, validate
    from megatron_mixcpt.data.mix import open_mix
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.slurm.chain import chain_jobs, describes
    from megatron_mixcpt.slurm.jobs import certify_job, command_jobs, study_job
    from megatron_mixcpt.slurm.overview import overview, submissions
    from megatron_mixcpt.slurm.resources import Resources
    from megatron_mixcpt.train.ended import check_run_dir, ending, finished
    from megatron_mixcpt.train.setup import check

    _give_back_overrides(args)
    options = _resources(args)
    kind = describes(args.config)
    if kind == "study":
        if args.certify:
            raise ConfigError(f"{args.config} is a study: certify its training file before, with `mixcpt certify`")
        from megatron_mixcpt.study.cells import Cells
        from megatron_mixcpt.study.config import Study
        from megatron_mixcpt.study.plan import check as check_study

        study = load_config(Study, args.config, args.overrides)
        words = ["study", args.config, *args.overrides]
        jobs = [study_job(study, words, validate(Resources, options, "mixcpt launch"))]
        check_study(Cells(study, args.config))
    elif kind == "chain":
        if args.overrides:
            raise ConfigError(f"{args.config} is a chain: write {args.overrides[0]} into the command of its stage")
        if args.certify:
            raise ConfigError(f"{args.config} is a chain: write a stage of its own: certify CONFIG --nproc RANKS")
        jobs = chain_jobs(args.config, options)
    else:
        ask = validate(Resources, options, "mixcpt launch")
        config = load_config(Config, args.config, args.overrides)
        words = [config.command, args.config, *args.overrides]
        jobs = [certify_job(words, ask)] * args.certify + command_jobs(config.command, words, ask, Path())
        if args.certify:
            from megatron_mixcpt.certify.scope import refuse_what_cannot_be_certified

            refuse_what_cannot_be_certified(config)
        # What the command would refuse is refused before anything waits in a queue.
        check(config, ask.world_size)
        check_run_dir(config, open_mix(config.data.mix, config.data.seq_length))
        if finished(config) and not args.certify and not args.dry_run:
            print(ending(config))
            return 0
    if args.dry_run:
        print(overview(jobs) if len(jobs) > 1 or kind == "chain" else jobs[0].script)
        print(submissions(jobs), file=sys.stderr)  # the script alone can go into a file
        return 0

    from megatron_mixcpt.slurm.submit import refuse_queued, submit_all

    refuse_queued(jobs)
    for job, number in submit_all(jobs):
        print(f"job {number}: {job.stage}, {job.path}; logs in {job.logs}", flush=True)
    return 0


def _give_back_overrides(args: argparse.Namespace) -> None:
    """`--modules cuda/12.8 train.lr=1e-5`: what argparse took for a module is a setting."""
    for option in ("modules", "container_mounts"):
        words = getattr(args, option) or []
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        if settings:
            setattr(args, option, [word for word in words if word not in settings])
            args.overrides = [*args.overrides, *settings]


def _resources(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    from megatron_mixcpt.errors import ConfigError
    from megatron_mixcpt.slurm.resources import Resources

    given = {key: value for key, value in vars(args).items() if key in Resources.model_fields and value is not None}
    extra = {}
    for option in args.option:
        key, _, value = option.removeprefix("--").partition("=")
        if not key:
            raise ConfigError(f"--option {option!r}: written KEY=VALUE, as qos=high, or KEY for one without a value")
        extra[key] = value
    return given | ({"options": extra} if extra else {})
