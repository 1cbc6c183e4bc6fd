"""Drawing: blocks that are missing, dealt to ranks and shards, by an engine, into the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_mixcpt.progress import Progress
from megatron_mixcpt.recall.asking import Ask, Asker
from megatron_mixcpt.recall.config import INSTRUCTIONS, TEXT, RecallConfig
from megatron_mixcpt.recall.store import Sample, Store

STREAMS = (INSTRUCTIONS, TEXT)


class Engine(Protocol):
    """Makes samples."""

    def draw(self, stream: str, store: Store, block: int, on_tokens: Callable[[int], None]) -> None:
        """Complete a block of `store`; `on_tokens` is told of tokens as they are made."""


def stores(config: RecallConfig, identity: Callable[[str], dict[str, Any]]) -> dict[str, Store]:
    """The stores of the streams that are asked for."""
    wanted = [stream for stream in STREAMS if config.amount(stream)]
    return {stream: Store(Path(config.out), stream, identity(stream), config.engine.block_size) for stream in wanted}


def missing_blocks(config: RecallConfig, found: dict[str, Store]) -> list[tuple[str, int]]:
    """(stream, block) of everything that is still to be drawn, in order."""
    return [
        (stream, block)
        for stream, store in found.items()
        for block in store.blocks(config.amount(stream))
        if not store.is_complete(block)
    ]


def share_of(
    config: RecallConfig, found: dict[str, Store], shard: tuple[int, int] | None, rank: int, world_size: int
) -> list[tuple[str, int]]:
    """The blocks of a rank in its shard, drawn already or not; shards may have different numbers of ranks."""
    whole = [(stream, block) for stream, store in found.items() for block in store.blocks(config.amount(stream))]
    first, step = shard or (0, 1)
    return whole[first::step][rank::world_size]


def draw(engine: Engine, found: dict[str, Store], blocks: list[tuple[str, int]], progress: Progress) -> None:
    """Draw `blocks` one after the other."""
    for stream, block in blocks:
        engine.draw(stream, found[stream], block, lambda tokens: progress.advance(0, tokens=tokens))
        progress.advance(found[stream].size)


def part(text: str, ending: str, tokens: list[int] | None, logprobs: list[float] | None) -> Sample:
    """One stretch that the model wrote. `tokens`, `logprobs`: where the engine tells them; the ending token's
    log-probability stands last where there is one."""
    kept = None if logprobs is None else [round(value, 4) for value in logprobs]
    return {"text": text, "ending": ending, "tokens": tokens, "logprobs": kept}


def sample_of(ask: Ask, parts: list[Sample]) -> Sample:
    """A sample as it is stored: how it was asked for, and an instruction with its answer, or a text."""
    return {
        "number": ask.number,
        "way": ask.way,
        "opening": ask.opening,
        "temperature": ask.temperature,
        "parts": parts,
    }


def answerable(asker: Asker, instruction: dict[str, Any]) -> bool:
    """Whether an instruction is whole, so that asking for its answer makes sense."""
    text = instruction["text"]
    return instruction["ending"] == "end" and bool(text.strip()) and not asker.spells_control(text)
