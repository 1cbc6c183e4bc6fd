"""`mixcpt select`: score the records of stage 1 under its model, choose, and write what `mixcpt align` reads.

Format alignment score (our reading; the paper's definition was not available): FAS = NLL(response | templated prompt) /
NLL(response | plain prompt), each a mean over the response's text tokens. Below 1, the template makes the response more
likely. Control tokens that end an answer are left out of both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from megatron_mixcpt.config import save_config
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.config import PreprocessConfig, parse_config
from megatron_mixcpt.data_prep.format import ROLE_ASSISTANT, ROLE_MASK, ROLE_SHIFT, TARGET, open_indexed
from megatron_mixcpt.data_prep.manifest import read_manifest
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.tokenizer import Tokenizer, load_tokenizer
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.files import write_whole, writing
from megatron_mixcpt.progress import Progress
from megatron_mixcpt.select.candidates import CHAT, PLAIN, REJECTED, Candidates, prepare_candidates
from megatron_mixcpt.select.config import SelectConfig
from megatron_mixcpt.select.pick import pick, ranking
from megatron_mixcpt.select.report import write_report

if TYPE_CHECKING:
    from megatron_mixcpt.runtime.stop import StopRequest

KINDS = {"instruction": "sft", "preference": "dpo"}


def select(config: SelectConfig) -> None:
    """Score on this process's grid; rank 0 writes the result. The same command goes on where it was stopped.

    Raises StoppedError, ConfigError, VerificationError.
    """
    from megatron_mixcpt.runtime.failures import explained
    from megatron_mixcpt.runtime.first_rank import on_first
    from megatron_mixcpt.runtime.parallel import parallel_context
    from megatron_mixcpt.runtime.stop import StopRequest

    with StopRequest() as stop, explained(stop):
        with parallel_context(**config.parallel.sizes, seed=config.select.seed) as state:
            candidates = on_first("prepare", lambda: prepare_candidates(config), state)
            scores = _score(config, candidates, state, stop)

            def write() -> None:
                with stop.at_once():
                    finish(config, candidates, scores)

            on_first("finish", write, state)


def _score(config: SelectConfig, candidates: Candidates, state: Any, stop: StopRequest) -> np.ndarray:
    from megatron_mixcpt.select.score import score_sequences
    from megatron_mixcpt.train.setup import build_stage, read_model_and_mix

    training = config.as_training()
    arch, _ = read_model_and_mix(training)
    stage = build_stage(training, arch)
    model: list[Any] = [config.model.model_dump(), stage.start.weights, config.select.dtype]
    if config.model.preset:
        model.append(config.select.seed)
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([candidates.fingerprint, model]).encode())
    stopped = StoppedError("stopped as asked; finished scores are kept: run the same command to go on")
    lengths = open_indexed(candidates.prefix).lengths
    total = int(lengths.sum(dtype=np.int64))
    with Progress("scoring", total, "tokens", shown=state.rank == 0) as progress:

        def done(tokens: int, sequences: int, computed: bool) -> None:
            if computed:
                progress.advance(tokens, sequences=sequences)
            else:
                progress.skip(tokens)
            if computed and stop.agreed(state.device):
                raise stopped

        if stop.defer(state.device):
            raise stopped
        return score_sequences(
            candidates.prefix,
            stage.model,
            state,
            vocab_size=arch.vocab_size,
            micro_batch_tokens=config.select.micro_batch_tokens,
            folder=Path(config.out) / "scores",
            fingerprint=fingerprint,
            done=done,
        )


def finish(config: SelectConfig, candidates: Candidates, scores: np.ndarray) -> None:
    """From scores to scores.parquet, the chosen records, the mixtures for `mixcpt align` and the report."""
    out, settings = Path(config.out), config.select
    records = list(candidates.records())
    table = score_table(candidates, records, scores)
    mix = open_mix(config.data.mix)
    folder = mix.folder
    texts = _texts(candidates, records, load_tokenizer(mix.tokenizer.path, eos_token=mix.tokenizer.eos_id))
    chosen: dict[str, np.ndarray] = {}
    ranked = ranking(table, settings.column, settings.order, settings.seed)
    for kind, count in (("instruction", settings.n), ("preference", settings.pairs)):
        there = ranked[table["kind"][ranked] == kind]
        chosen[kind] = rows = pick(there, table["source"], texts, count)
        if len(rows) and (len(rows) < count or len(there) <= count):
            few = "no more" if len(rows) == count else "fewer"
            key = "n" if kind == "instruction" else "pairs"
            print(f"note: {few} {kind} records than select.{key}={count}, all were taken: {len(rows)} without repeats")
    table["picked"] = np.isin(np.arange(len(records)), np.concatenate(list(chosen.values())))
    _write_table(out / "scores.parquet", table)
    save_config(config, out / "config.yaml")
    mixes = {}
    for kind, name in KINDS.items():
        shutil.rmtree(out / name, ignore_errors=True)  # of an earlier choice
        if len(chosen[kind]):
            mixes[name] = _write_mix(config, folder, records, chosen[kind], out / name)
    write_report(out, config, table, texts, ranked, chosen, mixes)
    counts = ", ".join(f"{len(rows)} of {int((table['kind'] == kind).sum())} {kind}" for kind, rows in chosen.items())
    print(f"chosen: {counts} records; {out}/report.html")
    for name, path in mixes.items():
        print(f"next: mixcpt align {name}.yaml, with align.method: {name} and data.mix: {path}")


def score_table(candidates: Candidates, records: list[dict[str, Any]], scores: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of scores.parquet. NLL in nats a token of the response's text; NaN where a record has no such variant."""
    flags = open_indexed(flags_prefix(candidates.prefix))
    counts = np.array([np.count_nonzero(flags[i] & TARGET) for i in range(len(flags))])
    nll = -scores / np.maximum(counts, 1)

    def column(variant: str, values: np.ndarray) -> np.ndarray:
        return np.array([values[r["sequences"][variant]] if variant in r["sequences"] else np.nan for r in records])

    plain, chat, rejected = (column(variant, nll) for variant in (PLAIN, CHAT, REJECTED))
    return {
        "source": np.array([record["source"] for record in records]),
        "kind": np.array([record["kind"] for record in records]),
        "file": np.array([record["file"] for record in records]),
        "line": np.array([record["line"] for record in records], dtype=np.int64),
        "tokens": column(PLAIN, counts).astype(np.int64),
        "prompt_tokens": (column(PLAIN, flags.lengths) - column(PLAIN, counts)).astype(np.int64),
        "nll_plain": plain,
        "ppl_plain": np.exp(np.minimum(plain, 700.0)),
        "nll_chat": chat,
        "ppl_chat": np.exp(np.minimum(chat, 700.0)),
        "fas": chat / plain,
        "nll_rejected": rejected,
        "margin": rejected - plain,
    }


def _texts(candidates: Candidates, records: list[dict[str, Any]], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(prompt, response) of every record, from its plain tokens."""
    tokens, flags = open_indexed(candidates.prefix), open_indexed(flags_prefix(candidates.prefix))
    texts = []
    for record in records:
        sequence = record["sequences"][PLAIN]
        ids, marks = tokens[sequence], flags[sequence]
        answer = (marks & TARGET) != 0
        asked = ~answer & ((marks & ROLE_MASK) != ROLE_ASSISTANT << ROLE_SHIFT)
        texts.append((tokenizer.decode(ids[asked].tolist()), tokenizer.decode(ids[answer].tolist())))
    return texts


def _write_table(path: Path, table: dict[str, np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array(values, mask=np.isnan(values)) if values.dtype.kind == "f" else pa.array(values)
        for name, values in table.items()
    }
    with writing(path) as file:
        pq.write_table(pa.table(columns), file)


def _prepared(folder: Path) -> PreprocessConfig:
    """What the mixture was made by."""
    config = read_manifest(folder).config
    assert config is not None  # as `prepare_candidates` found
    return config


def _write_mix(config: SelectConfig, folder: Path, records: list[dict[str, Any]], rows: np.ndarray, out: Path) -> Path:
    """The chosen records as they were read, and a mixture of them in the format asked for; returns its mix.json."""
    before = _prepared(folder)
    sources = {source.name: source.model_dump() for source in before.sources}
    picks = out / "records"
    picks.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, list[str]] = {}
    for row in rows.tolist():
        chosen.setdefault(records[row]["source"], []).append(json.dumps(records[row]["record"], ensure_ascii=False))
    changes = {"format": config.select.format, "loss": "answer", "responses": "chosen", "layout": "pack"}
    dropped = ("weight", "tokens", "epochs", "max_epochs", "min_tokens", "max_tokens", "heldout")
    entries = []
    for name, lines in chosen.items():
        path = picks / f"{name}.jsonl"
        write_whole(path, "".join(f"{line}\n" for line in lines))
        kept = {key: value for key, value in sources[name].items() if key not in dropped and value is not None}
        if config.select.format == PLAIN:
            kept.pop("tools", None)
        entries.append({**kept, **changes, "paths": [str(path)], "epochs": 1.0})
    kept = before.model_dump(include={"seq_length", "add_bos", "eos_token", "engine"})
    prepared = parse_config(
        {
            **kept,
            "tokenizer": str(folder / "tokenizer"),
            "out": str(out),
            "sources": entries,
            "valid_fraction": config.select.valid_fraction,
            "seed": config.select.seed + 1,  # stage 1 took its own held-out share out of plain records already
            "exact_duplicates": "keep",
        }
    )
    mix = preprocess(prepared)
    assert mix is not None
    return mix
