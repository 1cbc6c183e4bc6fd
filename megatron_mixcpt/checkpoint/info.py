"""`checkpoint.json`: what a checkpoint is, apart from its tensors. One writer, one reader of all formats there were.

The file is flat: the entries of `TrainingState` stand beside the others, `start` and `adapter_start` for its `start`.
Entries that an earlier version did not write are None here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_mixcpt import __version__
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.model.stage import Start

INFO = "checkpoint.json"
FORMAT = "mixcpt-checkpoint/2"
FIRST_FORMAT = "mixcpt-checkpoint/1"  # other names of the optimizer's tensors (see `shares.optimizer_key`)


@dataclass(frozen=True)
class TrainingState:
    """What a run keeps in each of its checkpoints, so that a later one goes on as if there had been no stop."""

    seq_length: int
    tokenizer_hash: str
    dtype: str
    global_batch_size: int
    data: dict[str, Any]
    """Of `data.position.Position.state`."""
    guard: dict[str, Any]
    """Of `train.guard.StepGuard.state`."""
    tokens_by_source: dict[str, int]
    """Target tokens trained on."""
    sample_stream: str
    """Chained hash of all samples so far."""
    layout: dict[str, Any]
    """The grid of processes that wrote it."""
    config_hash: str | None = None
    data_fingerprint: str | None = None
    kind: str | None = None
    """`Config.kind`."""
    steps: int | None = None
    """train.steps."""
    router: str | None = None
    """train.router, of a mixture of experts."""
    validated: bool | None = None
    """Whether the held-out data was measured at this step, as far as the settings ask for it."""
    validation_before: dict[str, float] | None = None
    """Loss of each source's held-out data before the first step."""
    forget: dict[str, Any] | None = None
    """Of `train.forgetting.Forgetting.state`."""
    wandb_id: str | None = None
    start: Start | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """The description of a checkpoint."""

    step: int
    architecture: Architecture
    optimizer_step: int | None = None
    """None: there is no optimizer state, only weights."""
    adapter: AdapterConfig | None = None
    """What it holds in place of weights; without `init`, since where it once started is no part of what it is."""
    source: str | None = None
    """Name of the Hugging Face directory it was converted from."""
    training: TrainingState | None = None
    """None: `mixcpt train` or `align` did not write it."""
    version: str = __version__
    """Of the program that wrote it."""
    format: str = FORMAT


def render_info(info: CheckpointInfo) -> dict[str, Any]:
    """The file's content."""
    content: dict[str, Any] = {
        "format": info.format,
        "version": info.version,
        "step": info.step,
        "architecture": info.architecture.to_dict(),
        "optimizer_step": info.optimizer_step,
    }
    if info.adapter is not None:
        content["adapter"] = info.adapter.model_dump()
    if info.source is not None:
        content["source"] = {"hf": info.source}
    if info.training is not None:
        state = asdict(info.training)
        start = state.pop("start")
        if start is not None:
            state |= {"start": start["weights"], "adapter_start": start["adapter"]}
        content |= state
    return content


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Raises VerificationError, naming file and entry, where it is missing, damaged or of a later format."""
    path = checkpoint / INFO
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VerificationError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise VerificationError(f"{path}: expected a mapping, found a {type(content).__name__}")
    if content.get("format", FIRST_FORMAT) not in (FIRST_FORMAT, FORMAT):  # the first version of all did not name it
        raise VerificationError(
            f"{path}: format {content['format']!r}, this version reads {FIRST_FORMAT!r} and {FORMAT!r}: use the "
            f"version of megatron-mixcpt that wrote it ({content.get('version', 'unknown')}), or a later one"
        )
    try:
        return _parse(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, line['loc']))}: {line['msg']}" for line in error.errors()[:3])
        raise VerificationError(f"{path}: {problems}") from None


def _parse(content: dict[str, Any]) -> CheckpointInfo:
    names = {field.name for field in fields(CheckpointInfo)} - {"source", "training"}
    values = {key: value for key, value in content.items() if key in names}
    if isinstance(content.get("adapter"), dict):
        values["adapter"] = {**content["adapter"], "init": None}
    if isinstance(content.get("source"), dict):
        values["source"] = content["source"].get("hf")
    if "data" in content:  # which every run writes, and nothing else does
        names = {field.name for field in fields(TrainingState)} - {"start"}
        state = {key: value for key, value in content.items() if key in names}
        if "start" in content:
            state["start"] = {"weights": content["start"], "adapter": content.get("adapter_start")}
        values["training"] = state
    return _READER.validate_python({"version": "unknown", "format": FIRST_FORMAT, **values})


_READER = TypeAdapter(CheckpointInfo)
