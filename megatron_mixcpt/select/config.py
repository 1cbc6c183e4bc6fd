"""Configuration of `mixcpt select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config import Config, LayoutConfig, ModelConfig, NonNegative, Positive, Section, validate

CHAT_COLUMNS = ("nll_chat", "ppl_chat", "fas")
PAIR_COLUMNS = ("nll_rejected", "margin")
COLUMNS = ("tokens", "prompt_tokens", "nll_plain", "ppl_plain", *CHAT_COLUMNS, *PAIR_COLUMNS)
CHOICES = {"ppl_low": "ppl_plain", "random": ""}


class SelectData(Section):
    """Where the records are."""

    mix: str
    """`mix.json` of the mixture that stage 1 was trained on."""


class SelectSettings(Section):
    """What is chosen. Lists of samples, and mixtures ready for `mixcpt align`, come out."""

    by: str = "ppl_low"
    """ppl_low: lowest perplexity of the response after the plain prompt (`ppl_plain`); fas: lowest format alignment
    score; random; or a column of scores.parquet."""
    order: Literal["low", "high"] = "low"
    """Which end of the column is chosen from."""
    n: NonNegative = 256
    """Instruction records, for SFT."""
    pairs: NonNegative = 256
    """Preference records, for DPO."""
    format: Literal["chat", "plain"] = "chat"
    """Format of the chosen samples: the tokenizer's chat template, or plain text for a model without one."""
    valid_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the chosen samples that is held out."""
    micro_batch_tokens: Positive = 4096
    """Tokens a rank scores at once, padding included."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the model that scores."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Of the random choice, of ties, and of the held-out share."""

    @model_validator(mode="after")
    def _something(self) -> SelectSettings:
        if self.n + self.pairs == 0:
            raise ValueError("select.n and select.pairs are both 0: there is nothing to choose")
        if self.by not in (*CHOICES, *COLUMNS):
            raise ValueError(f"select.by: {self.by!r} is none of {', '.join((*CHOICES, *COLUMNS))}")
        if self.column in CHAT_COLUMNS and self.format == "plain":
            raise ValueError(f"select.by {self.by} looks at the chat template: it needs select.format chat")
        if self.column in PAIR_COLUMNS and self.n:
            raise ValueError(f"select.by {self.by}: only pairs have it, so set select.n=0, or choose by another column")
        return self

    @property
    def column(self) -> str:
        """The column of scores.parquet that decides; empty for a random choice."""
        return CHOICES.get(self.by, self.by)


class SelectConfig(Section):
    """`mixcpt select`."""

    model: ModelConfig
    data: SelectData
    parallel: LayoutConfig = LayoutConfig()
    select: SelectSettings = SelectSettings()
    out: str
    """Folder of the result: scores.parquet, the chosen records, mixtures, report."""

    def as_training(self) -> Config:
        """A training configuration of the same model, data and layout, which the model is built from."""
        from megatron_mixcpt.checkpoint import newest_checkpoint, read_info

        start = self.model.checkpoint
        adapter = read_info(newest_checkpoint(Path(start))).adapter if start else None
        values = {
            "model": self.model.model_dump(),
            "adapter": adapter and adapter.model_dump(),
            "data": {"mix": self.data.mix},
            "parallel": self.parallel.model_dump(),
            "train": {"steps": 1, "dtype": self.select.dtype, "seed": self.select.seed},
            "loss": {"target": "none"},
            "run_dir": self.out,
        }
        return validate(Config, values, "mixcpt select")
