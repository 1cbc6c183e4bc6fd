"""A rank's part of the model together with what tells its starting weights from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mixcpt.model.interleaved import StageModel


@dataclass(frozen=True)
class Start:
    """Fingerprints of what a run started from; None where it started from nothing of the kind."""

    weights: str | None = None
    """Of the starting weights, the teacher's: hash of a checkpoint's manifest, or a directory's fingerprint."""
    adapter: str | None = None
    """Of the directory `adapter.init`."""


@dataclass(frozen=True)
class Stage:
    """This rank's pipeline stage at the starting weights."""

    model: StageModel
    start: Start
