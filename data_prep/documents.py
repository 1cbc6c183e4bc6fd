"""Documents on their way to tokens: pieces of text and control tokens, encoded many at a time.

A piece is text (encoded as text, whatever it spells) or one control token; every piece carries the flags of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mixcpt.data_prep.engines import Engine
from megatron_mixcpt.data_prep.format import DOC_START, ROLE_ASSISTANT, ROLE_TEXT, ROLE_TOOL, ROLE_USER, TARGET
from megatron_mixcpt.data_prep.joining import Joining, encode_joined

Piece = tuple[str | int, int]  # (text, flags) or (control token id, flags)
ROLES = {
    "system": ROLE_TEXT,
    "developer": ROLE_TEXT,
    "user": ROLE_USER,
    "assistant": ROLE_ASSISTANT,
    "tool": ROLE_TOOL,
}


@dataclass
class Document:
    """One document: `kind` is the number of its kind in the flags, `pieces` in reading order."""

    kind: int
    pieces: list[Piece]

    @property
    def contents(self) -> list[str | int]:
        """The pieces without their flags."""
        return [content for content, _ in self.pieces]


class Batch:
    """Collects pieces of documents and encodes them in one call."""

    def __init__(self, joining: Joining | None = None) -> None:
        self._joining = joining
        self._pieces: list[Piece] = []
        self._ends: list[int] = []  # pieces up to the end of each document
        self.num_characters = 0

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def texts(self) -> list[str]:
        """All pieces that are text."""
        return [content for content, _ in self._pieces if type(content) is str]

    def add(self, pieces: Sequence[Piece]) -> None:
        """Append one document."""
        self._pieces.extend(pieces)
        self._ends.append(len(self._pieces))
        for content, _ in pieces:
            if type(content) is str:
                self.num_characters += len(content)

    def _continues(self) -> list[bool]:
        """For each text, whether it continues what stands before it (see joining)."""
        assert self._joining is not None
        found = []
        begins = {0, *self._ends}
        for index, (content, _) in enumerate(self._pieces):
            if type(content) is str:
                follows_text = index not in begins and type(self._pieces[index - 1][0]) is str
                found.append(follows_text or (self._joining.after_control and index not in begins))
        return found

    def encode(self, engine: Engine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns tokens (uint32 [T]), flags (uint8 [T]) and the number of tokens of each document (int64 [D]).

        The first token of a document is marked as its start and is no target.
        """
        ids = np.array([-1 if type(content) is str else content for content, _ in self._pieces], dtype=np.int64)
        is_text = ids < 0
        piece_lengths = np.ones(len(ids), dtype=np.int64)
        encoded, offsets = encode_joined(engine, self.texts, self._continues() if self._joining else [], self._joining)
        piece_lengths[is_text] = np.diff(offsets)
        flags = np.repeat(np.array([flags for _, flags in self._pieces], dtype=np.uint8), piece_lengths)
        from_text = np.repeat(is_text, piece_lengths)
        tokens = np.empty(len(flags), dtype=np.uint32)
        tokens[from_text] = encoded
        tokens[~from_text] = ids[~is_text]
        piece_ends = np.concatenate([[0], np.cumsum(piece_lengths)])
        document_ends = piece_ends[np.array([0, *self._ends], dtype=np.int64)]
        lengths = np.diff(document_ends)
        starts = document_ends[:-1][lengths > 0]
        flags[starts] = (flags[starts] | DOC_START) & ~np.uint8(TARGET)
        return tokens, flags, lengths
