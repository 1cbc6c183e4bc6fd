"""The exact position in a mixture: how many samples of each source have been drawn.

Which source comes next follows from the counts and the weights alone, and the n-th sample of a source from n alone. So
nothing about the position depends on the number of ranks, the micro-batch or the length of the run, and the weights may
change in the middle without a sample being lost or repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError


class Draw(NamedTuple):
    """One sample of the mixture."""

    source: int
    """Index into the mixture's training sources."""
    number: int
    """It is the `number`-th sample drawn from that source, from 0."""
    order: int
    """It is the `order`-th sample of the whole run, from 0."""


@dataclass(frozen=True)
class SourcePosition:
    name: str
    content: str
    """Hash of the source's training data."""
    sequences: int
    weight: float
    """Share of the samples; over all sources they sum to 1."""
    drawn: int = 0
    since: int = 0
    """Drawn since the weights are what they are."""


def sources_of(state: dict[str, Any]) -> list[SourcePosition]:
    """What `Position.state` says of each source, retired ones included."""
    return [SourcePosition(name, **source) for name, source in state["sources"].items()]


class Position:
    """Draws samples so that every source keeps as close to its weight as whole samples allow (largest deficit first).

    Args:
        sources: what has been drawn of each.
        retired: state of sources that were drawn from but are not in the mixture any more.
    """

    def __init__(self, sources: list[SourcePosition], seed: int, retired: dict[str, Any] | None = None) -> None:
        self.names = [source.name for source in sources]
        self.seed, self.retired = seed, retired or {}
        self._sources = sources
        self._weights = [source.weight for source in sources]
        self._drawn = [source.drawn for source in sources]
        self._since = [source.since for source in sources]

    @classmethod
    def start(cls, mix: Mix, seed: int) -> Position:
        """Nothing drawn yet."""
        sources = [
            SourcePosition(source.name, source.train.content, source.train.sequences, share)
            for source, share in zip(mix.train_sources, mix.sample_shares())
            if source.train
        ]
        return cls(sources, seed)

    @classmethod
    def resume(cls, saved: dict[str, Any], mix: Mix, seed: int) -> tuple[Position, list[str]]:
        """Go on from `state()` of an earlier run, perhaps with other weights or sources; also says what changed.

        Raises ConfigError where the position would mean something else: another seed, or a source of the same name with
        other content.
        """
        if saved["seed"] != seed:
            raise ConfigError(f"train.seed was {saved['seed']} and is {seed}: it orders the data, set it back")
        known, sources, changes = dict(saved["sources"]), [], []
        for source in cls.start(mix, seed)._sources:
            before = known.pop(source.name, None)
            if before is None:
                changes.append(f"{source.name}: new, {source.weight:.1%}")
                sources.append(source)
                continue
            if before["content"] != source.content:
                raise ConfigError(
                    f"data.mix: source {source.name} has other training data than when {before['drawn']} of its "
                    "samples were drawn, so their place in it is lost: restore that data, or rename the source"
                )
            if before["weight"] != source.weight:
                changes.append(f"{source.name}: {before['weight']:.1%} -> {source.weight:.1%}")
            sources.append(replace(source, drawn=before["drawn"], since=before["since"]))
        changes += [f"{name}: {left['weight']:.1%} -> none" for name, left in known.items() if left["weight"] > 0]
        if changes:
            sources = [replace(source, since=0) for source in sources]
        retired = {name: {**left, "weight": 0.0, "since": 0} for name, left in known.items()}
        return cls(sources, seed, retired), changes

    @property
    def total(self) -> int:
        """Samples drawn over all sources, retired ones included."""
        return sum(self._drawn) + sum(left["drawn"] for left in self.retired.values())

    def draw(self, count: int) -> list[Draw]:
        """The next `count` samples."""
        draws = []
        order, since = self.total, sum(self._since)
        for _ in range(count):
            since += 1
            deficits = [weight * since - drawn for weight, drawn in zip(self._weights, self._since)]
            source = deficits.index(max(deficits))
            draws.append(Draw(source, self._drawn[source], order))
            self._drawn[source] += 1
            self._since[source] += 1
            order += 1
        return draws

    def copy(self) -> Position:
        other = Position(self._sources, self.seed, self.retired)
        other._drawn, other._since = list(self._drawn), list(self._since)
        return other

    def state(self) -> dict[str, Any]:
        """JSON types; `resume` reads it."""
        sources = {
            source.name: {
                "content": source.content,
                "sequences": source.sequences,
                "weight": source.weight,
                "drawn": drawn,
                "since": since,
            }
            for source, drawn, since in zip(self._sources, self._drawn, self._since)
        }
        return {"seed": self.seed, "sources": sources | self.retired}
