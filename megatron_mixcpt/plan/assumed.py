"""A mixture that is not prepared and a model that is not there, to plan with."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.architecture.architecture import PRESETS, Architecture
from megatron_mixcpt.architecture.shapes import SHAPES
from megatron_mixcpt.config import Config
from megatron_mixcpt.data_prep.mix import Mix, Source, Split, TokenizerEntry
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf

NOWHERE = Path("/nonexistent")  # of files that nothing opens


def assumed_mix(config: Config, tokens: float, vocab_size: int | None) -> Mix:
    """So many tokens of training text in rows of `data.seq_length`.

    Args:
        vocab_size: of the model; a preset's own, or that of the configuration's model, when not given.

    Raises ConfigError.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens:g}: at least 1")
    if config.data.seq_length is None:
        raise ConfigError("--tokens: data that is not prepared has no length of rows yet: set data.seq_length=N")
    if vocab_size is None:
        preset = PRESETS.get(config.model.preset or "")
        vocab_size = preset.vocab_size if preset else 1
    length, count = config.data.seq_length, int(tokens)
    train = Split(prefix=NOWHERE, sequences=-(-count // (config.row_sequences * length)), tokens=count, content="")
    kind = "preference" if config.kind == "dpo" else "domain"
    source = Source("text to be prepared", kind, 1.0, train, None)
    tokenizer = TokenizerEntry("none", NOWHERE, vocab_size, "", None, 0, 0)
    return Mix(NOWHERE, length, "", tokenizer, (source,))


def assumed_shape(name: str) -> Architecture:
    """`--model-shape`: a published model by name, or a folder with a config.json. Raises ConfigError."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"--model-shape {name}: neither a folder with a config.json nor one of {', '.join(SHAPES)}")
    return architecture_from_hf(path.parent if path.name == "config.json" else path)
