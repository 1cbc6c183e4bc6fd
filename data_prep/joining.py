"""Encoding a text that continues another one, for tokenizers that put a space before every text.

SentencePiece-style tokenizers encode "answer" as if it were " answer". A response that follows its prompt must not get
that space: it is encoded behind a short anchor, and the anchor's tokens are taken away again.
"""

from dataclasses import dataclass

import numpy as np

from megatron_mixcpt.data_prep.engines import Engine

ANCHORS = ("\n", ":", ".", "|")


@dataclass(frozen=True)
class Joining:
    """How to encode a continuing text; `after_control` says whether text after a control token continues, too."""

    anchor: str
    anchor_ids: tuple[int, ...]
    after_control: bool


def find_joining(engine: Engine, *, after_control: bool) -> Joining | None:
    """The joining a tokenizer needs, or None if it encodes a text the same wherever it stands."""
    alone = _ids(engine, "x")
    for anchor in ANCHORS:
        begin, both = _ids(engine, anchor), _ids(engine, anchor + "x")
        if both[: len(begin)] == begin and len(both) > len(begin):
            return None if both[len(begin) :] == alone else Joining(anchor, begin, after_control)
    return None


def encode_joined(
    engine: Engine, texts: list[str], continues: list[bool], joining: Joining | None
) -> tuple[np.ndarray, np.ndarray]:
    """As `engine.encode(texts)`, but a text whose `continues` is set is encoded as a continuation."""
    if joining is None or not any(continues):
        return engine.encode(texts)
    ids, offsets = engine.encode([joining.anchor + text if on else text for text, on in zip(texts, continues)])
    parts = np.split(ids, offsets[1:-1])
    skip = len(joining.anchor_ids)
    for index, (part, on) in enumerate(zip(parts, continues)):
        if not on:
            continue
        if tuple(part[:skip].tolist()) == joining.anchor_ids:
            parts[index] = part[skip:]
        else:  # the text merged with the anchor
            parts[index] = engine.encode([texts[index]])[0]
    ends = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return np.concatenate(parts), ends


def _ids(engine: Engine, text: str) -> tuple[int, ...]:
    return tuple(engine.encode([text])[0].tolist())
