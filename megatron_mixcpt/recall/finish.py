"""From drawn samples to the result: judged, written apart, counted.

Memory holds a verdict and a signature a sample (about 1 kB), with `overlap` its n-grams too (8 bytes a word); texts are
read from the store again each time they are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_mixcpt.data_prep.config import NearDuplicates
from megatron_mixcpt.data_prep.neardup import Signer, near_duplicates
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.files import writing
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import INSTRUCTIONS, RecallConfig
from megatron_mixcpt.recall.diversity import MOST_TEXTS, clusters, distinct_ngrams
from megatron_mixcpt.recall.filters import REASONS, Judge, Rejection, perplexity, texts_of
from megatron_mixcpt.recall.overlap import shares_found
from megatron_mixcpt.recall.store import Sample, Store

FORMAT = "mixcpt-recall/1"
SUMMARY = "recall.json"
Verdicts = list[Rejection | None]


def samples_of(store: Store, amount: int) -> Iterator[Sample]:
    """The first `amount` samples of a stream, a block in memory at a time."""
    for block in store.blocks(amount):
        yield from (sample for sample in store.read(block) if sample["number"] < amount)


def finish(config: RecallConfig, asker: Asker, found: dict[str, Store], fingerprint: str) -> dict[str, Any]:
    """Judge all samples and write the result; recall.json, which is also returned, last."""
    out = Path(config.out)
    (out / SUMMARY).unlink(missing_ok=True)  # what it says of the other files is no longer true
    judge = Judge(config.filters, asker)
    verdicts: dict[str, Verdicts] = {}
    for stream, store in found.items():
        amount = config.amount(stream)
        verdicts[stream] = [judge.reject(stream, sample) for sample in samples_of(store, amount)]
        _reject_near_duplicates(config, stream, store, verdicts[stream])
    overlap = _overlap(config, found, verdicts)
    summary: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "config": config.model_dump(),
        "overlap": overlap,
        "streams": {},
    }
    with writing(out / "rejected.jsonl") as rejected, writing(out / "tokens.jsonl") as tokens:
        for stream, store in found.items():
            with writing(out / f"{stream}.jsonl") as kept:
                summary["streams"][stream] = _write(config, stream, store, verdicts[stream], kept, rejected, tokens)
    names = [*(f"{stream}.jsonl" for stream in found), "rejected.jsonl", "tokens.jsonl"]
    summary["files"] = {name: {"size": (out / name).stat().st_size, "xxh3": hash_file(out / name)} for name in names}
    return summary


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Last of all files: with it the result is complete."""
    with writing(out / SUMMARY) as file:
        file.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")


def _kept(store: Store, verdicts: Verdicts) -> Iterator[tuple[int, Sample]]:
    for place, sample in enumerate(samples_of(store, len(verdicts))):
        if verdicts[place] is None:
            yield place, sample


def _reject_near_duplicates(config: RecallConfig, stream: str, store: Store, verdicts: Verdicts) -> None:
    settings = config.filters.near_duplicates
    if settings is None:
        return
    signer = Signer(NearDuplicates(**settings.model_dump()))
    places: list[int] = []
    signatures: list[np.ndarray] = []
    texts: list[str] = []

    def sign() -> None:
        if texts:
            signatures.append(signer.signatures(texts))
            texts.clear()

    for place, sample in _kept(store, verdicts):
        places.append(place)
        texts.append(texts_of(stream, sample)[0])
        if len(texts) == store.size:
            sign()
    sign()
    if not places:
        return
    rows = np.arange(len(places))
    again = near_duplicates([np.concatenate(signatures)], [rows], settings.threshold)
    what = "instruction" if stream == INSTRUCTIONS else "text"
    for row in np.flatnonzero(again).tolist():
        verdicts[places[row]] = Rejection("near duplicate", f"the {what} is nearly the same as an earlier one")


def _overlap(config: RecallConfig, found: dict[str, Store], verdicts: dict[str, Verdicts]) -> dict[str, Any]:
    """Search the samples that are left in the named files, and reject where that is asked for."""
    measured = {}
    for name, search in config.overlap.items():
        places: list[tuple[str, int]] = []

        def texts(places: list[tuple[str, int]] = places) -> Iterator[str]:
            for stream, store in found.items():
                for place, sample in _kept(store, verdicts[stream]):
                    places.append((stream, place))
                    yield "\n".join(texts_of(stream, sample))

        shares = shares_found(texts(), search.paths, search.ngram)
        for (stream, place), share in zip(places, shares.tolist()):
            if share and search.action == "reject":
                verdicts[stream][place] = Rejection(
                    "overlap", f"{share:.1%} of its {search.ngram}-grams stand in the files of overlap.{name}"
                )
        measured[name] = {
            "samples": len(shares),
            "with_common_ngrams": int((shares > 0).sum()),
            "mean_share": float(shares.mean()) if len(shares) else 0.0,
            "rejected": search.action == "reject",
        }
    return measured


def _write(
    config: RecallConfig, stream: str, store: Store, verdicts: Verdicts, kept: Any, rejected: Any, tokens: Any
) -> dict[str, Any]:
    """Write one stream; returns its counts."""
    reasons: Counter[str] = Counter()
    ways: dict[str, Counter[str]] = {}
    num_tokens = 0
    perplexities: list[float] = []
    shown: list[list[str]] = []
    for sample, verdict in zip(samples_of(store, len(verdicts)), verdicts):
        record = _record(stream, sample)
        way = ways.setdefault(f"{sample['way']}, temperature {sample['temperature']:g}", Counter(drawn=0, kept=0))
        way["drawn"] += 1
        if verdict is not None:
            reasons[verdict.reason] += 1
            line = {"stream": stream, "reason": verdict.reason, "detail": verdict.detail, **record}
            rejected.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            continue
        way["kept"] += 1
        kept.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        if any(piece["logprobs"] for piece in sample["parts"]):
            parts = [{key: piece[key] for key in ("tokens", "logprobs")} for piece in sample["parts"]]
            tokens.write(orjson.dumps({"id": record["id"], "parts": parts}, option=orjson.OPT_APPEND_NEWLINE))
        num_tokens += sum(len(piece["tokens"] or piece["logprobs"] or ()) for piece in sample["parts"])
        if record["perplexity"] is not None:
            perplexities.append(record["perplexity"])
        if len(shown) < MOST_TEXTS:
            shown.append(texts_of(stream, sample))
    return {
        "drawn": len(verdicts),
        "kept": sum(way["kept"] for way in ways.values()),
        "rejected": {reason: reasons[reason] for reason in REASONS},
        "ways": {name: dict(way) for name, way in sorted(ways.items())},
        "tokens": num_tokens,
        "median_perplexity": float(np.median(perplexities)) if perplexities else None,
        "distinct_ngrams": distinct_ngrams(["\n".join(texts) for texts in shown]),
        "clusters": clusters([texts[0] for texts in shown], config.sampling.seed),
    }


def _record(stream: str, sample: Sample) -> dict[str, Any]:
    texts = texts_of(stream, sample)
    likely = perplexity(sample["parts"][-1])
    common = {
        "way": sample["way"],
        "temperature": sample["temperature"],
        "perplexity": None if likely is None else round(likely, 3),
    }
    identity = {"id": f"{stream}-{sample['number']:07d}"}
    if stream == INSTRUCTIONS:
        return {**identity, "instruction": texts[0], "response": texts[1], **common}
    return {**identity, "text": texts[0], **common}
