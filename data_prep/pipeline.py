"""The way from configuration to mixture: plan -> tokenize -> assemble -> mix. Every stage can be repeated safely."""

import fcntl
import importlib
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mixcpt.data_prep.assemble import Corpus, load_corpus
from megatron_mixcpt.data_prep.build import build
from megatron_mixcpt.data_prep.config import PreprocessConfig, SourceConfig
from megatron_mixcpt.data_prep.decontaminate import Detector, evaluation_key
from megatron_mixcpt.data_prep.engines import FastEngine, adversarial_texts, disagreement, load_fast_engine
from megatron_mixcpt.data_prep.format import token_dtype
from megatron_mixcpt.data_prep.literals import literal_counter
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.data_prep.neardup import Signer
from megatron_mixcpt.data_prep.parts import part_is_good, read_receipt
from megatron_mixcpt.data_prep.plan import Plan, make_plan, plan_to_json
from megatron_mixcpt.data_prep.pool import Pool
from megatron_mixcpt.data_prep.quarantine import (
    BadRecordWatch,
    check_budget,
    check_lengths,
    write_quarantine,
)
from megatron_mixcpt.data_prep.records import make_renderer
from megatron_mixcpt.data_prep.sampling import sample_texts
from megatron_mixcpt.data_prep.tokenizer import Tokenizer, load_tokenizer
from megatron_mixcpt.data_prep.worker import Job, process_chunk
from megatron_mixcpt.errors import ConfigError, MixcptError
from megatron_mixcpt.files import write_whole
from megatron_mixcpt.progress import Progress

PARTS_FOLDER = ".parts"


@dataclass
class Stage:
    """A source with its plan and the folder of its parts."""

    source: SourceConfig
    plan: Plan
    folder: Path


@dataclass
class Prepared:
    """Everything that is settled before the first token: shared by all stages."""

    config: PreprocessConfig
    tokenizer: Tokenizer
    add_bos: bool
    dtype: np.dtype
    stages: list[Stage]

    @property
    def asked_engine(self) -> str | None:
        """The only engine whose parts will do, where the configuration asks for one."""
        return self.tokenizer.engine.name if self.config.engine == "reference" else None


def preprocess(
    config: PreprocessConfig, *, workers: int = 1, shard: tuple[int, int] | None = None, assemble_only: bool = False
) -> Path | None:
    """Run the pipeline; returns the path of mix.json, or None for a shard (which only tokenizes).

    Args:
        shard: (i, n) tokenizes every n-th chunk, beginning with the i-th (0-based), and stops.
        assemble_only: refuse to tokenize; all parts must be there (after the shards).

    Raises MixcptError and its kinds; see `megatron_mixcpt.errors` for the exit codes.
    """
    out = Path(config.out)
    prepared = _planned(config, out)  # what is refused here leaves no trace
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out, shared=shard is not None):
        _write_plans(prepared)
        _say_what_is_replaced(out, config)
        tokenize(prepared, workers=workers, shard=shard, only_check=assemble_only)
        if shard is not None:
            return None
        corpora = _load(prepared)
        _check_records(out, prepared, corpora)
        plans = [stage.plan for stage in prepared.stages]
        return build(out, config, prepared.tokenizer, prepared.dtype, plans, corpora, out / PARTS_FOLDER)


def load_parts(config: PreprocessConfig) -> list[Corpus]:
    """The documents of every source from finished parts, without writing anything more."""
    return _load(prepare(config, Path(config.out)))


def _load(prepared: Prepared) -> list[Corpus]:
    return [load_corpus(stage.plan, stage.folder, prepared.dtype) for stage in prepared.stages]


def prepare(config: PreprocessConfig, out: Path) -> Prepared:
    """Load the tokenizer, plan every source, write the plans."""
    prepared = _planned(config, out)
    _write_plans(prepared)
    return prepared


def _planned(config: PreprocessConfig, out: Path) -> Prepared:
    # There is one process a core already: the libraries must not start threads of their own, here or in the workers.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(config.tokenizer, eos_token=config.eos_token)
    add_bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
    if add_bos and tokenizer.bos_id is None:
        raise ConfigError(f"add_bos: the tokenizer {config.tokenizer} has no bos token")
    evaluation = evaluation_key(config.decontaminate) if config.decontaminate else None
    stages = []
    for source in config.sources:
        plan = make_plan(
            source, config, tokenizer.hash, add_bos=add_bos, eos_id=tokenizer.eos_id, evaluation=evaluation
        )
        stages.append(Stage(source, plan, out / PARTS_FOLDER / f"{source.name}-{plan.key[:12]}"))
    return Prepared(config, tokenizer, add_bos, token_dtype(tokenizer.vocab_size), stages)


def _write_plans(prepared: Prepared) -> None:
    for stage in prepared.stages:
        own = stage.folder / f"plan.json.{uuid.uuid4().hex}"  # shards on several machines write the same plan
        os.replace(write_whole(own, plan_to_json(stage.plan)), stage.folder / "plan.json")


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
            if part_is_good(stage.folder, chunk, prepared.dtype, prepared.asked_engine):
                done_bytes += stage.plan.chunk_bytes(chunk)
            else:
                tasks.append((number, chunk))
    if not tasks:
        return
    watches = [BadRecordWatch(stage.source, stage.plan) for stage in prepared.stages]
    if only_check:
        raise MixcptError(
            f"{len(tasks)} of {index} parts are missing or damaged; run the shards that make them again "
            "(or leave --assemble out to make them here)"
        )
    total = done_bytes + sum(prepared.stages[number].plan.chunk_bytes(chunk) for number, chunk in tasks)
    with Pool(WorkFactory(prepared), min(workers, len(tasks))) as pool:
        # While the workers work, this process has time to load what only the end of the run needs.
        threading.Thread(target=importlib.import_module, args=("pyarrow.parquet",)).start()
        fast = choose_engines(prepared, sorted({number for number, _ in tasks}), pool)
        with Progress("tokenize", total, "B", done=done_bytes) as progress:
            orders = ((process_order, number, chunk, number in fast) for number, chunk in tasks)
            for number, chunk, done in pool.run(orders):
                stage, num_bytes = prepared.stages[number], prepared.stages[number].plan.chunk_bytes(chunk)
                progress.advance(num_bytes, tokens=done["tokens"])
                if watches[number].over(num_bytes, done["records"], done["bad"]):
                    _refuse_bad_records(Path(prepared.config.out), stage)


def choose_engines(prepared: Prepared, numbers: list[int], pool: Pool) -> set[int]:
    """The sources among `numbers` that the fast engine may encode; what speaks against it is said on stderr."""
    if prepared.config.engine == "reference":
        return set()
    fast = set()
    orders = [(check_order, number) for number in numbers]
    orders += [(warm_order, -1)] * (pool.size - len(orders))  # workers with nothing to check load the engine meanwhile
    for number, reason in sorted(pool.run(orders), key=lambda result: result[0]):
        if number < 0:
            continue
        if reason is None:
            fast.add(number)
        name = FastEngine.name if reason is None else prepared.tokenizer.engine.name
        why = "" if reason is None else f"; no fast engine: {reason}"
        print(f"source {prepared.stages[number].source.name}: engine {name}{why}", file=sys.stderr)
    return fast


class WorkFactory:
    """Makes, in each worker, the function that carries out orders: `check_order` and `process_order`.

    A forked worker uses the tokenizer that is already in memory; a spawned one loads it again.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self._prepared), "tokenizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._prepared = Prepared(**state)
        self._prepared.tokenizer = load_tokenizer(state["config"].tokenizer, eos_token=state["config"].eos_token)

    def __call__(self) -> Callable[[tuple], Any]:
        bench = Workbench(self._prepared)
        return lambda order: order[0](bench, *order[1:])


class Workbench:
    """What a worker keeps between orders: one job for each source and engine, and the fast engine once it is needed."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._fast: FastEngine | str | None = None
        self._detector: Detector | None = None
        self._jobs: dict[tuple[int, bool], Job] = {}

    @property
    def fast(self) -> FastEngine | str:
        """The fast engine, or why there is none."""
        if self._fast is None:
            self._fast = load_fast_engine(self.prepared.tokenizer.definition, self.prepared.tokenizer.engine)
        return self._fast

    @property
    def detector(self) -> Detector | None:
        """What looks for evaluation text, if that is asked for."""
        if self._detector is None and self.prepared.config.decontaminate is not None:
            self._detector = Detector(self.prepared.config.decontaminate)
        return self._detector

    def job(self, number: int, fast: bool) -> Job:
        """The job of source `number`."""
        if (number, fast) not in self._jobs:
            p, stage = self.prepared, self.prepared.stages[number]
            engine = self.fast if fast else p.tokenizer.engine
            if isinstance(engine, str):
                raise MixcptError(f"the fast engine is missing in a worker: {engine}")
            self._jobs[number, fast] = Job(
                source=stage.source,
                plan=stage.plan,
                folder=stage.folder,
                render=make_renderer(stage.source, p.tokenizer, add_bos=p.add_bos),
                engine=engine,
                joining=p.tokenizer.joining,
                dtype=p.dtype,
                max_tokens=None if stage.source.is_text else p.config.seq_length,
                max_record_bytes=p.config.max_record_bytes,
                count_literals=literal_counter(p.tokenizer.control),
                detector=self.detector,
                signer=Signer(p.config.near_duplicates) if p.config.near_duplicates else None,
            )
        return self._jobs[number, fast]


def check_order(bench: Workbench, number: int) -> tuple[int, str | None]:
    """Whether the fast engine agrees with the reference on adversarial texts and on a sample of source `number`."""
    if isinstance(bench.fast, str):
        return number, bench.fast
    job, reference = bench.job(number, False), bench.prepared.tokenizer
    samples = sample_texts(job.plan, job.render, job.max_record_bytes, job.source.keys)
    return number, disagreement(reference.engine, bench.fast, [*adversarial_texts(reference.control), *samples])


def warm_order(bench: Workbench, number: int) -> tuple[int, str | None]:
    """Load the fast engine, which takes as long as tokenizing a few tens of megabytes."""
    return number, bench.fast if isinstance(bench.fast, str) else None


def process_order(bench: Workbench, number: int, chunk: int, fast: bool) -> tuple[int, int, dict[str, int]]:
    """Make the part of a chunk; returns source, chunk and how many tokens, records and bad records it has."""
    receipt = process_chunk(bench.job(number, fast), chunk)
    tokens = sum(block.tokens for block in receipt.blocks)
    num_bad = sum(not item.is_too_long for item in receipt.bad)
    return number, chunk, {"tokens": tokens, "records": receipt.records, "bad": num_bad}


def _refuse_bad_records(out: Path, stage: Stage) -> None:
    """Raise BadRecordsError for what the finished parts of a source say."""
    receipts = [read_receipt(stage.folder, chunk) for chunk in range(len(stage.plan.chunks))]
    there = [receipt for receipt in receipts if receipt is not None]
    bad = [item for receipt in there for item in receipt.bad]
    path = write_quarantine(out, [(stage.plan, bad)])
    check_budget(stage.source, sum(receipt.records for receipt in there), bad, stage.plan, path)


def _say_what_is_replaced(out: Path, config: PreprocessConfig) -> None:
    """A run into a folder that holds another mixture ends with its own in that place."""
    try:
        before = read_mix(out)
    except MixcptError:
        return  # none, or one that nothing can use
    old = (before.seq_length, sorted(source.name for source in before.sources))
    new = (config.seq_length, sorted(source.name for source in config.sources))
    if old != new:
        print(
            f"note: {out} holds a mixture of {', '.join(old[1])} at seq_length {old[0]}, which {', '.join(new[1])} at "
            f"seq_length {new[0]} will replace; set another `out` to keep both",
            file=sys.stderr,
        )


def _check_records(out: Path, prepared: Prepared, corpora: list[Corpus]) -> None:
    bad = [(stage.plan, corpus.bad) for stage, corpus in zip(prepared.stages, corpora)]
    path = write_quarantine(out, bad)
    for stage, corpus, (_, items) in zip(prepared.stages, corpora, bad):
        check_lengths(stage.source, items, stage.plan, path)
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
