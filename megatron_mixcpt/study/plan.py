"""What a study will take, and what would stop it, before anything starts."""

from __future__ import annotations

import math
import shutil

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.measure import check_models, check_questions
from megatron_mixcpt.observe.run_data import read_run
from megatron_mixcpt.plan.estimate import kept_checkpoints, make_plan
from megatron_mixcpt.runtime.devices import cuda_devices
from megatron_mixcpt.study.cells import Cells
from megatron_mixcpt.study.status import standing
from megatron_mixcpt.train.setup import check as check_run
from megatron_mixcpt.train.setup import check_settings, existing_parent
from megatron_mixcpt.units import duration, number, size


def check_devices(nproc: int, jobs: int) -> None:
    """Raise ConfigError where there are GPUs, but too few for `jobs` runs of `nproc` ranks at a time."""
    ranks, devices = jobs * nproc, cuda_devices()
    if 0 < devices < ranks:
        raise ConfigError(
            f"--jobs {jobs}: runs of nproc {nproc} take {ranks} GPUs, and there are {devices}: the others would "
            "train on the CPU. Give fewer jobs, or MIXCPT_DEVICE=cpu for all"
        )


def check(cells: Cells) -> None:
    """Raise ConfigError for what a run or a measurement would refuse, naming the arm."""
    check_questions(cells.settings)
    check_models([cells.base], cells.settings)
    rule, kinds = cells.study.choose, {source.kind for source in open_mix(cells.mix_path).sources if source.valid}
    if rule.gain == "domain" and "domain" not in kinds:
        raise ConfigError(f"choose.gain domain: no domain source of {cells.mix_path} has held-out text (measure.mix)")
    if rule.within.forgetting is not None and not kinds - {"domain"}:
        raise ConfigError(
            f"choose.within.forgetting: no source of {cells.mix_path} but the domain's has held-out text (measure.mix)"
        )
    for arm in cells.study.arms:
        try:
            check_run(cells.sweep(arm)[0].config, cells.study.nproc)
        except ConfigError as error:
            raise ConfigError(f"arms.{arm}: {error}") from None


def foretold(cells: Cells, jobs: int) -> list[str]:
    """Runs, tokens, disk and, from the runs that are there, time with `jobs` at a time: lines for people."""
    study = cells.study
    now = standing(cells)
    stages = sum(len(study.rates(arm)) for arm in study.arms)
    runs = {arm: len(study.rates(arm)) + len(study.seeds) - 1 for arm in study.arms}
    plans = {arm: _plan(cells.sweep(arm)[0].config, study.nproc) for arm in study.arms}
    tokens = sum(runs[arm] * plans[arm][0] for arm in study.arms)
    kept = sum(runs[arm] * plans[arm][1] for arm in study.arms) if study.keep_checkpoints else 0
    disk = kept + jobs * max(saved for _, saved in plans.values())
    free = shutil.disk_usage(existing_parent(cells.out)).free
    models = sum(count * (1 + len(study.average) * cells.sweep(arm)[0].is_averaged) for arm, count in runs.items())
    lines = [
        f"runs        {cells.num_runs} = {stages} (every learning rate of {len(study.arms)} arms, seed "
        f"{study.seeds[0]}) + {cells.num_runs - stages} (other seeds at the chosen ones); {now.num_ended} are done",
        f"measured    {models} models and the base",
        f"data        {number(tokens, 3)} tokens in all",
        f"disk        {size(disk)} of checkpoints in {cells.out}; {size(free)} are free here"
        + (": too little; keep_checkpoints: false keeps none" if free < disk else ""),
    ]
    seconds = [run for cell in now.runs if not cells.missing(cell) and (run := read_run(cell.run_dir).seconds())]
    if seconds:
        each = sum(seconds) / len(seconds)
        left = math.ceil((cells.num_runs - now.num_ended) / jobs) * each
        lines.append(
            f"time        {duration(each)} of training a run so far, {duration(left)} left with {jobs} at a time, "
            "without measuring"
        )
    else:
        lines.append("time        `mixcpt plan` tells it for a run on a GPU; here the first run will")
    return lines


def _plan(config: Config, nproc: int) -> tuple[int, int]:
    """Tokens of a run, and the most bytes of checkpoints that it has at a time."""
    arch, mix = check_settings(config, nproc)
    plan = make_plan(config, arch, mix, nproc)
    return plan.tokens(config.train.steps), plan.checkpoint * (kept_checkpoints(config) + 1)
