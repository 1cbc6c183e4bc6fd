"""Measurements as JSON has them, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_mixcpt.evaluate.gci import Answer, GciScore
from megatron_mixcpt.evaluate.harness import TaskScore
from megatron_mixcpt.evaluate.held_out import SourcePerplexity
from megatron_mixcpt.evaluate.ledger import Item

PARTS: dict[str, Any] = {
    "sources": SourcePerplexity,
    "tasks": TaskScore,
    "items": Item,
    "gci": GciScore,
    "gci_answers": Answer,
}


def rows_of(parts: Mapping[str, list]) -> dict[str, Any]:
    """What `measure_model` returned, as plain values."""
    return {part: [dataclasses.asdict(row) for row in parts.get(part, ())] for part in PARTS}


def from_rows(rows: Mapping[str, Any]) -> dict[str, list]:
    """The inverse of `rows_of`. Raises KeyError or TypeError for what it has not written."""
    return {part: [kind(**row) for row in rows[part]] for part, kind in PARTS.items()}
