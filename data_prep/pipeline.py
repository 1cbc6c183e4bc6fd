"""The way from configuration to mixture: plan -> tokenize -> assemble -> mix. Every stage can be repeated safely."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron_mixcpt.data_prep.assemble import Corpus, load_corpus
from megatron_mixcpt.data_prep.config import Config, Source
from megatron_mixcpt.data_prep.format import token_dtype
from megatron_mixcpt.data_prep.literals import literal_counter
from megatron_mixcpt.data_prep.mix import build_mix
from megatron_mixcpt.data_prep.parts import part_is_good
from megatron_mixcpt.data_prep.plan import Plan, make_plan, plan_to_json
from megatron_mixcpt.data_prep.pool import run_pool
from megatron_mixcpt.data_prep.progress import Progress
from megatron_mixcpt.data_prep.quarantine import check_budget, write_quarantine
from megatron_mixcpt.data_prep.records import make_renderer
from megatron_mixcpt.data_prep.tokenizer import Tokenizer, load_tokenizer
from megatron_mixcpt.data_prep.worker import Job, process_chunk

from megatron_mixcpt.errors import ConfigError, MixcptError

PARTS_FOLDER = ".parts"


@dataclass
class Stage:
    """A source with its plan and the folder of its parts."""

    source: Source
    plan: Plan
    folder: Path


@dataclass
class Prepared:
    """Everything that is settled before the first token: shared by all stages."""

    config: Config
    tokenizer: Tokenizer
    add_bos: bool
    dtype: np.dtype
    stages: list[Stage]


def preprocess(
    config: Config, *, workers: int = 1, shard: tuple[int, int] | None = None, assemble_only: bool = False
) -> Path | None:
    """Run the pipeline; returns the path of mix.json, or None for a shard (which only tokenizes).

    Args:
        shard: (i, n) tokenizes every n-th chunk, beginning with the i-th (0-based), and stops.
        assemble_only: refuse to tokenize; all parts must be there (after the shards).

    Raises MixcptError and its kinds; see `megatron_mixcpt.errors` for the exit codes.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out, shared=shard is not None):
        prepared = prepare(config, out)
        tokenize(prepared, workers=workers, shard=shard, only_check=assemble_only)
        if shard is not None:
            return None
        corpora = [load_corpus(stage.plan, stage.folder, prepared.dtype) for stage in prepared.stages]
        _check_records(out, prepared, corpora)
        return build_mix(out, config, prepared.tokenizer, prepared.dtype, [s.plan for s in prepared.stages], corpora)


def prepare(config: Config, out: Path) -> Prepared:
    """Load the tokenizer, plan every source, write the plans."""
    tokenizer = load_tokenizer(config.tokenizer, eos_token=config.eos_token)
    add_bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
    if add_bos and tokenizer.bos_id is None:
        raise ConfigError(f"add_bos: the tokenizer {config.tokenizer} has no bos token")
    stages = []
    for source in config.sources:
        plan = make_plan(source, config, tokenizer.hash, add_bos=add_bos, eos_id=tokenizer.eos_id)
        folder = out / PARTS_FOLDER / f"{source.name}-{plan.key[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"plan.json.{os.getpid()}.tmp"  # shards on several machines write the same plan
        temporary.write_bytes(plan_to_json(plan))
        os.replace(temporary, folder / "plan.json")
        stages.append(Stage(source, plan, folder))
    return Prepared(config, tokenizer, add_bos, token_dtype(tokenizer.vocab_size), stages)


def tokenize(
    prepared: Prepared, *, workers: int, shard: tuple[int, int] | None = None, only_check: bool = False
) -> None:
    """Write every part that is not there yet, or not good any more."""
    tasks = []
    done_bytes = 0
    index = 0
    for number, stage in enumerate(prepared.stages):
        for chunk in range(len(stage.plan.chunks)):
            mine = shard is None or index % shard[1] == shard[0]
            index += 1
            if not mine:
                continue
            if part_is_good(stage.folder, chunk, prepared.dtype):
                done_bytes += stage.plan.chunk_bytes(chunk)
            else:
                tasks.append((number, chunk))
    if not tasks:
        return
    if only_check:
        raise MixcptError(
            f"{len(tasks)} of {index} parts are missing or damaged; run the shards that make them again "
            "(or leave --assemble out to make them here)"
        )
    work = WorkFactory(prepared)
    total = done_bytes + sum(prepared.stages[number].plan.chunk_bytes(chunk) for number, chunk in tasks)
    with Progress("tokenize", total, done_bytes) as progress:
        for number, chunk, tokens in run_pool(work, tasks, min(workers, len(tasks))):
            progress.advance(prepared.stages[number].plan.chunk_bytes(chunk), tokens)


class WorkFactory:
    """Makes, in each worker, the function that turns (source number, chunk) into a part.

    A forked worker uses the tokenizer that is already in memory; a spawned one loads it again.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared: Prepared = prepared

    def __getstate__(self) -> dict[str, Any]:
        p = self._prepared
        return {"config": p.config, "add_bos": p.add_bos, "dtype": p.dtype, "stages": p.stages}

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = state["config"]
        tokenizer = load_tokenizer(config.tokenizer, eos_token=config.eos_token)
        self._prepared = Prepared(config, tokenizer, state["add_bos"], state["dtype"], state["stages"])

    def __call__(self) -> Callable[[tuple[int, int]], tuple[int, int, int]]:
        return partial(_work, [self._job(stage) for stage in self._prepared.stages])

    def _job(self, stage: Stage) -> Job:
        p = self._prepared
        return Job(
            source=stage.source,
            plan=stage.plan,
            folder=stage.folder,
            render=make_renderer(stage.source, p.tokenizer, add_bos=p.add_bos),
            engine=p.tokenizer.engine,
            dtype=p.dtype,
            max_tokens=None if stage.source.kind == "domain" else p.config.seq_length,
            max_record_bytes=p.config.max_record_bytes,
            count_literals=literal_counter(p.tokenizer.control),
        )


def _work(jobs: list[Job], task: tuple[int, int]) -> tuple[int, int, int]:
    number, chunk = task
    receipt = process_chunk(jobs[number], chunk)
    return number, chunk, sum(block["tokens"] for block in receipt["blocks"])


def _check_records(out: Path, prepared: Prepared, corpora: list[Corpus]) -> None:
    bad = [
        (stage.plan, [item for receipt in corpus.receipts for item in receipt["bad"]])
        for stage, corpus in zip(prepared.stages, corpora)
    ]
    path = write_quarantine(out, bad)
    for stage, corpus, (_, items) in zip(prepared.stages, corpora, bad):
        check_budget(stage.source, corpus.num_records, items, stage.plan, path)


@contextmanager
def _lock(out: Path, *, shared: bool) -> Iterator[None]:
    """One run at a time in a folder; shards may run side by side."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixcptError(f"another mixcpt preprocess is working in {out}; wait for it or stop it") from None
        yield
