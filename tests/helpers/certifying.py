"""Small problems for `mixcpt certify` in the tests, and ranks that compute them with mistakes planted."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import torch

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.certify.axes import variants, whole_run
from megatron_mixcpt.certify.problem import START, STUDENT, pose
from megatron_mixcpt.certify.trial import compute
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.huggingface.config import config_dict
from megatron_mixcpt.rehearse.scale import write_random_model
from megatron_mixcpt.rehearse.size import Grid
from megatron_mixcpt.train.setup import check_settings
from tests.helpers.spawn import run_distributed
from tests.teacher.runs import fill
from tests.train.runs import settings

ARCH = Architecture(
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=192,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=16,
    vocab_size=250,
    model_type="qwen2",
    qkv_bias=True,
)
EXPERTS = dataclasses.replace(
    ARCH,
    model_type="qwen3_moe",
    qkv_bias=False,
    qk_norm=True,
    num_experts=8,
    experts_per_token=4,
    expert_ffn_size=48,
    normalize_routing=True,
)


def posed(folder, mix, arch=None, data=1, **sections):
    """The problem of a small configuration; `arch`: of the real model, else the tiny preset. A teacher's cache and its
    model are made in `folder`, whatever they are called."""
    folder.mkdir(parents=True)
    teacher = sections.get("teacher", {})
    if "cache" in teacher:
        sections["teacher"] = teacher | {"cache": str(folder / "cache")}
    elif "hf" in teacher:
        mix = _with_teacher(mix, folder / "data", arch or ARCH)
        sections["teacher"] = teacher | {"hf": str(folder / "data" / "teacher")}
    if arch is not None:
        write_random_model(arch, folder / "model", torch.float32, seed=0)
        if "hf" in teacher:
            save_tiny_tokenizer(["the heron waits"], folder / "model")
        sections |= {"model": {"hf": str(folder / "model"), "preset": None}}
    values = settings(mix, folder / "run", **sections)
    config = validate(Config, values, "test")
    if config.teacher.source == "cached":
        fill(values | {"parallel": {}}, top_k=4)  # of the real run, which is refused without
    real, _ = check_settings(config, config.parallel.replica * data)
    grid = Grid(config.parallel.tensor, config.parallel.pipeline, data, config.parallel.context)
    return pose(config, real, open_mix(config.data.mix), grid, data, folder / "problem")


def _with_teacher(mix, folder, arch):
    """A copy of the mixture in `folder`, and beside it `teacher`, a model with its tokenizer; returns the copy."""
    shutil.copytree(mix.parent, folder)
    for name in ("tokenizer", "teacher"):
        save_tiny_tokenizer(["the heron waits"], folder / name)
    (folder / "teacher" / "config.json").write_text(json.dumps(config_dict(arch)))
    return folder / mix.name


def beside(problem, folder):
    """The same problem, whose ranks write into another folder."""
    folder.mkdir(parents=True)
    for path in problem.folder.iterdir():
        if path.name.endswith((START, STUDENT)):
            (folder / path.name).symlink_to(path)
    return dataclasses.replace(problem, folder=folder)


def with_fault(fault):
    """In place of trial.on_this_machine: ranks of the tests' own, with a mistake planted."""

    def run(folder, ranks):
        run_distributed(_observe, ranks, [(fault, str(folder))], timeout=400)

    return lambda device: run


def computed(problem, faults, folder, choose=lambda fault, others: others):
    """`{fault: its problem}` after the ranks have computed the run and its variants, each with one fault planted.

    `choose(fault, variants)`: those that are computed.
    """
    problems, queue = {}, []
    for number, fault in enumerate(faults):
        problems[fault] = own = beside(problem, folder / str(number))
        dtype = problem.values["train"]["dtype"]
        runs = [whole_run(own, "fp32"), whole_run(own, "bf16")]
        if fault != "nothing":
            runs = [whole_run(own, dtype), *choose(fault, variants(own, dtype))]
        compute(own, runs, lambda path, ranks: queue.append(str(path)))
    run_distributed(_observe, problem.grid.world_size, list(zip(faults, queue)), timeout=400)
    return problems


def _observe(rank, world_size, queue):
    from megatron_mixcpt.certify.subject import observe_all
    from megatron_mixcpt.runtime import parallel
    from tests.helpers import planted_adapters, planted_experts, planted_ranks  # noqa: F401 - which register theirs
    from tests.helpers.planted import FAULTS

    for number, (fault, folder) in enumerate(queue):
        # Ranks that had no part in the last cases of one fault are back for the next: they count alike again.
        parallel._contexts = itertools.count(1000 * number)
        os.environ["WORLD_SIZE"] = str(world_size)
        with FAULTS[fault]():
            observe_all(Path(folder))
