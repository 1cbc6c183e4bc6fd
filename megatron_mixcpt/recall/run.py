"""`mixcpt recall` from the configuration to the result.

Ranks and shards share nothing but the folder: each draws the blocks that are its own, and rank 0 writes the result when
all are there. The others stay until then, since launchers end what is left soon after the first has gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megatron_mixcpt.data_prep.inputs import resolve_paths
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.errors import MixcptError, StoppedError, VerificationError
from megatron_mixcpt.observe.provenance import record_provenance
from megatron_mixcpt.progress import Progress
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.recall.draw import draw, missing_blocks, share_of, stores
from megatron_mixcpt.recall.finish import SUMMARY, finish, write_summary
from megatron_mixcpt.recall.report import write_report
from megatron_mixcpt.recall.server import ServerEngine, ServerGoneError
from megatron_mixcpt.recall.store import Store

POLL_SECONDS = 0.5


def recall(
    config: RecallConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    shard: tuple[int, int] | None = None,
    assemble: bool = False,
) -> dict[str, Any] | None:
    """Draw what is missing of this rank's share; rank 0 then writes the result and returns what recall.json holds.

    Args:
        shard: (i, n) draws every n-th block, beginning with the i-th (0-based), and stops there.
        assemble: draw nothing: all blocks must be there (after the shards).

    Returns None for other ranks and for shards. Raises StoppedError (75) when asked to stop or the server is gone,
    ConfigError before anything is drawn, VerificationError where blocks are missing for `assemble`.
    """
    check_overlap_paths(config)
    asker = Asker(config)
    identity = engine_identity(config, asker)
    found = stores(config, lambda stream: {**identity, "stream": stream, **stream_identity(config, stream)})
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if rank == 0:
            record_provenance(out / "provenance")
        if not assemble:
            _draw_share(config, asker, found, share_of(config, found, shard, rank, world_size), rank, world_size)
        if shard is not None:
            return None
        fingerprint = xxhash.xxh3_128_hexdigest(
            orjson.dumps([identity, config.model_dump()], option=orjson.OPT_SORT_KEYS)
        )
        if rank:
            _wait(lambda: is_finished(out, fingerprint))
            return None
        if assemble and (missing := missing_blocks(config, found)):
            raise VerificationError(
                f"{len(missing)} blocks are missing or damaged in {out}, the first is {missing[0][0]} {missing[0][1]}: "
                "run the shards that draw them again (or leave --assemble out to draw them here)"
            )
        left = missing_blocks(config, found)

        def all_there() -> bool:
            while left and found[left[0][0]].is_complete(left[0][1]):
                left.pop(0)
            return not left

        _wait(all_there)
        summary = finish(config, asker, found, fingerprint)
        write_report(out, summary)
        write_summary(out, summary)
    except ServerGoneError:
        raise
    except StoppedError:
        raise StoppedError("stopped as asked; what is stored is kept: run the same command to go on") from None
    return summary


def check_overlap_paths(config: RecallConfig) -> None:
    """Raise ConfigError for files to search that are not there, before anything is drawn."""
    for name, search in config.overlap.items():
        resolve_paths(search.paths, f"overlap.{name}")


def engine_identity(config: RecallConfig, asker: Asker) -> dict[str, Any]:
    """What of model, engine and tokenizer decides a sample."""
    sampling = {"seed": config.sampling.seed, "temperatures": config.sampling.temperatures}
    identity: dict[str, Any] = {"version": 1, **sampling, "top_p": config.sampling.top_p}
    if config.engine.transformers is not None:
        from megatron_mixcpt.recall.local import model_identity

        return identity | {
            "engine": config.engine.transformers.model_dump(),
            "files": model_identity(config.model.hf),
        }
    server = config.engine.openai
    assert server is not None
    folder = Path(config.model.hf)
    files = [path for form in ("tokenizer*", "chat_template*") for path in sorted(folder.glob(form))]
    return identity | {
        "engine": {"model": server.model, "prompts": server.prompts, "block_size": server.block_size},
        "files": {path.name: hash_file(path) for path in files},
        "ends": sorted(asker.ends),
    }


def stream_identity(config: RecallConfig, stream: str) -> dict[str, Any]:
    """What decides the samples of one stream alone."""
    limits = config.sampling
    if stream == "instructions":
        return {"limits": [limits.max_instruction_tokens, limits.max_answer_tokens]}
    text = config.text.model_dump()
    text["openings_file"] = hash_file(Path(config.text.openings_file)) if config.text.openings_file else None
    return {"limits": [limits.max_text_tokens], "text": text}


def is_finished(out: Path, fingerprint: str) -> bool:
    """Whether the folder holds the whole result of this configuration."""
    try:
        return json.loads((out / SUMMARY).read_text()).get("fingerprint") == fingerprint
    except (OSError, ValueError):
        return False


def _draw_share(
    config: RecallConfig, asker: Asker, found: dict[str, Store], mine: list[tuple[str, int]], rank: int, world_size: int
) -> None:
    missing = [(stream, block) for stream, block in mine if not found[stream].is_complete(block)]
    if not missing:
        return
    size = config.engine.block_size
    engine: Any
    if config.engine.transformers is not None:
        from megatron_mixcpt.recall.local import LocalEngine

        engine = LocalEngine(config, asker)
    else:
        engine = ServerEngine(config, asker)
    done = (len(mine) - len(missing)) * size
    title = "drawing" if world_size == 1 else f"drawing, share of rank 0 of {world_size}"
    with Progress(title, len(mine) * size, "samples", done=done, shown=rank == 0) as progress:
        draw(engine, found, missing, progress)


def _wait(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(POLL_SECONDS)


def explain_missing(summary: dict[str, Any]) -> list[str]:
    """What to ask for where filters have taken a lot: a line for each stream that kept less than was asked for."""
    lines = []
    for stream, counts in summary["streams"].items():
        if not counts["kept"]:
            raise MixcptError(
                f"recall: no sample of {stream} was kept; rejected.jsonl says why: change the filters, or the model "
                "cannot write them"
            )
        share = counts["kept"] / counts["drawn"]
        if share < 1:
            lines.append(
                f"{stream}: {counts['kept']} of {counts['drawn']} kept; n.{stream}={-int(-counts['drawn'] // share)} "
                f"would keep about {counts['drawn']}, and draws only the rest"
            )
    return lines
