"""What a cache was made of, so that no run reads another model's answers, or answers about other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.weights import weights_fingerprint


def teacher_identity(config: Config, start: str | None) -> dict[str, Any]:
    """Which weights the cached answers are of: `teacher.hf`, or else what training starts from.

    `start`: what tells the starting weights from others (see train.setup.Parts); a preset's follow from the seed.
    """
    if config.teacher.hf is not None:
        return {"weights": weights_fingerprint(config.teacher.hf)}
    if config.adapter is not None and config.adapter.init is not None:
        raise ConfigError(
            "adapter.init with teacher.source cached: a cache names the base weights alone, so it would not notice "
            "another adapter; set teacher.source=initial or adapter_off"
        )
    if config.model.preset is not None:
        return {"preset": config.model.preset, "seed": config.train.seed}
    return {"weights": start}


def data_identity(config: Config, arch: Architecture, mix: Mix) -> dict[str, Any]:
    """What the data and the loss must have in common with a cache; opens no weights."""
    return {
        "temperature": config.loss.temperature,
        "dtype": config.train.dtype,
        "vocab_size": arch.vocab_size,
        "seq_length": mix.seq_length,
        "tokenizer": mix.tokenizer_hash,
        "sources": {
            source.train.content: {"name": source.name, "sequences": source.train.sequences}
            for source in mix.train_sources
            if source.train
        },
    }


def refuse_foreign(cache: Path, identity: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless a cache with this `identity` answers for the `wanted` data (see
    `data_identity`). It may hold more sources than are wanted."""
    reasons = {
        "temperature": "was made for loss.temperature {0}, the run has {1}",
        "dtype": "was computed in {0}, the run has train.dtype {1}",
        "vocab_size": "is of a vocabulary of {0} entries, the model has {1}",
        "seq_length": "is of sequences of {0} tokens, the data has {1}",
        "tokenizer": "is of data of another tokenizer ({0}, the data has {1})",
    }
    for key, reason in reasons.items():
        if identity[key] != wanted[key]:
            raise ConfigError(f"teacher.cache: {cache} {reason.format(identity[key], wanted[key])}; {REMEDY}")
    for content, source in wanted["sources"].items():
        known = identity["sources"].get(content)
        if known is None or known["sequences"] != source["sequences"]:
            raise ConfigError(
                f"teacher.cache: {cache} holds nothing of source {source['name']} as it is now (data {content}): it "
                f"is stale or of another mixture; {REMEDY}"
            )


REMEDY = "run `mixcpt cache-teacher` with this configuration and an empty teacher.cache"


def refuse_other_weights(cache: Path, identity: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Raise ConfigError unless the cache is of this teacher (see `teacher_identity`)."""
    if identity["teacher"] != teacher:
        raise ConfigError(
            f"teacher.cache: {cache} is of another model ({identity['teacher']}) than this run's teacher ({teacher}); "
            f"{REMEDY}"
        )
