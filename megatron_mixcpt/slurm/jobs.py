"""From a mixcpt command and what it asks for to the jobs that run it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from omegaconf import OmegaConf

from megatron_mixcpt.config import Config, load_config, rendered
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.slurm.render import render, template
from megatron_mixcpt.slurm.resources import SAVE_MARGIN, Resources
from megatron_mixcpt.slurm.submit import Job, job_name
from megatron_mixcpt.study.config import Study

DISTRIBUTED = ("train", "align", "select", "cache-teacher", "recall", "study")
"""Commands that share their work among ranks; all others get one process."""
PREPROCESS_GRACE = "B:TERM@60"


def command_jobs(stage: str, words: list[str], ask: Resources, folder: Path) -> list[Job]:
    """The job that runs `mixcpt WORDS`.

    Args:
        stage: short name of what it does.
        folder: where script and logs go when the command has no run directory; with one they go there.

    Raises ConfigError for a configuration of `train` or `align` that is wrong.
    """
    if words[0] in ("train", "align"):
        config_path, overrides, flags = _split(words)
        config = load_config(Config, config_path, overrides)
        run_dir = Path(config.run_dir).resolve()
        # A copy: what was submitted is what runs, after every restart too, whatever becomes of the file meanwhile.
        frozen = run_dir / "launch" / f"{stage}.yaml"
        arguments = [words[0], str(frozen), *flags]
        return [_job(stage, words, arguments, ask, run_dir / "launch", run_dir / "logs", {frozen: rendered(config)})]
    run_folder = _run_dir(words)
    if run_folder:
        return [_job(stage, words, words, ask, run_folder / "launch", run_folder / "logs", {})]
    return [_job(stage, words, words, ask, folder.resolve() / stage, folder.resolve() / stage / "logs", {})]


def certify_job(words: list[str], ask: Resources) -> Job:
    """The job that certifies the run of `words`, a `train` or `align` command line, before that run's own job starts.

    Raises ConfigError as `command_jobs`.
    """
    (job,) = command_jobs("certify", words, ask, Path())
    (frozen,) = job.files
    arguments = ["certify", str(frozen), "--nproc", str(ask.world_size)]
    return _job("certify", ["certify", *words[1:]], arguments, ask, job.folder, job.logs, job.files)


def study_job(study: Study, words: list[str], ask: Resources, stage: str = "study") -> Job:
    """The job that works on a study: one process a node, each with as many runs at a time as its ranks allow.

    Args:
        words: the `study` command line, as it was asked for.

    Raises ConfigError where a run has more ranks than a node.
    """
    jobs = ask.ranks_per_node // study.nproc
    if jobs == 0:
        raise ConfigError(
            f"{words[1]}: nproc: a run has {study.nproc} ranks, which share a node, and a node is asked for "
            f"{ask.ranks_per_node}: set --gpus-per-node or --tasks-per-node"
        )
    out = Path(study.out).resolve()
    frozen = out / "launch" / "study.yaml"
    cores = ask.cpus_per_task * ask.ranks_per_node
    alone = ask.model_copy(update={"tasks_per_node": 1, "cpus_per_task": cores})
    arguments = ["study", str(frozen), "--jobs", str(jobs)]
    return _job(stage, words, arguments, alone, out / "launch", out / "logs", {frozen: rendered(study)})


def preprocess_jobs(stage: str, config: str, tasks: int, ask: Resources, folder: Path) -> list[Job]:
    """Two jobs after launch/preprocess.sbatch: an array that tokenizes, and one that assembles and verifies."""
    folder = folder.resolve() / stage
    settings = {
        "PYTHON": ask.python or sys.executable,
        "MODULES": " ".join(ask.modules),
        "MAX_RESTARTS": str(ask.max_restarts),
    }
    if ask.container:
        raise ConfigError(f"stage {stage}: an array preprocesses without a container; leave one of the two out")
    jobs = []
    for step, array in (("tokenize", f"1-{tasks}"), ("assemble", "1-1")):
        name = job_name(f"{stage}-{step}", folder)
        options = _common_options(name, ask) | {
            "array": array,
            "nodes": "1",
            "ntasks": "1",
            "cpus-per-task": str(ask.cpus_per_task),
            "signal": PREPROCESS_GRACE,
            "output": str(folder / "logs" / "%A_%a.log"),
        }
        script = render(template("preprocess.sbatch"), options | ask.options, settings, [config, step])
        command = f"preprocess {config} ({step})"
        size = f"{array.partition('-')[2]} tasks"
        jobs.append(Job(f"{stage}-{step}", name, script, folder, folder / "logs", command, size, ask.time, True))
    return jobs


def _job(
    stage: str,
    words: list[str],
    arguments: list[str],
    ask: Resources,
    folder: Path,
    logs: Path,
    files: dict[Path, str],
) -> Job:
    """`words`: the command as it was asked for; `arguments`: as the job runs it."""
    # Whatever a chain calls its stage, two jobs that train one run have one name, and so never run at once.
    name = job_name(words[0] if words[0] in ("train", "align") else stage, folder.parent)
    if words[0] not in DISTRIBUTED:
        ask = ask.model_copy(update={"nodes": 1, "tasks_per_node": 1})
    options = _common_options(name, ask) | {
        "nodes": str(ask.nodes),
        "ntasks-per-node": str(ask.ranks_per_node),
        "gpus-per-node": str(ask.gpus_per_node) if ask.gpus_per_node else None,
        "cpus-per-task": str(ask.cpus_per_task),
        "signal": f"B:USR1@{ask.grace}",
        "output": str(logs / "%j.log"),
    }
    settings = {
        "PYTHON": ask.python or ("python" if ask.container else sys.executable),
        "STYLE": ask.style,
        "MODULES": " ".join(ask.modules),
        "CONTAINER": ask.container or "",
        "CONTAINER_MOUNTS": ",".join(ask.container_mounts),
        "LOGS": str(logs),
        "MAX_RESTARTS": str(ask.max_restarts),
        "SAVE_SECONDS": str(ask.grace - SAVE_MARGIN),
    }
    script = render(template("mixcpt.sbatch"), options | ask.options, settings, arguments)
    return Job(stage, name, script, folder, logs, shlex.join(words), ask.size, ask.time, files=files)


def _common_options(name: str, ask: Resources) -> dict[str, str | None]:
    options: dict[str, str | None] = {"job-name": name, "time": ask.time, "chdir": str(Path.cwd())}
    if ask.partition:
        options["partition"] = ask.partition
    if ask.account:
        options["account"] = ask.account
    if ask.mem:
        options["mem"] = ask.mem
    return options


def _split(words: list[str]) -> tuple[str, list[str], list[str]]:
    """Configuration, overrides and flags of a `train` or `align` command line."""
    flags = [word for word in words[1:] if word.startswith("-")]
    plain = [word for word in words[1:] if not word.startswith("-")]
    if not plain or set(flags) - {"--trust"}:
        raise ConfigError(f"mixcpt {' '.join(words)}: a job takes `{words[0]} CONFIG [--trust] [key=value ...]`")
    return plain[0], plain[1:], flags


def _run_dir(words: list[str]) -> Path | None:
    """`run_dir` of the YAML file that the command names, if it has one; `run_dir=...` goes before."""
    for word in reversed(words[1:]):
        if word.startswith("run_dir="):
            return Path(word.removeprefix("run_dir=")).resolve()
    for word in words[1:]:
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            run_dir = OmegaConf.select(OmegaConf.load(word), "run_dir")  # with what it refers to
            if run_dir:
                return Path(str(run_dir)).resolve()
    return None
