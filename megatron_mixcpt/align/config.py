"""Configuration of `mixcpt align`: that of `mixcpt train` with one more section."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config import Config, LossConfig, Section, origin, read_values, validate

if TYPE_CHECKING:
    from megatron_mixcpt.train.task import Recipe


class AlignSettings(Section):
    """How the format is taught."""

    method: Literal["sft", "dpo"]
    """sft: the loss of `loss` on packed conversations; dpo: direct preference optimization (arXiv 2305.18290) on the
    mixture's preference pairs, against the starting weights."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """dpo only. sigmoid: -log sigmoid(beta * h), h the difference of the log-ratios of chosen and rejected; ipo:
    (h - 1 / (2 beta))^2 (arXiv 2310.12036)."""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """dpo only. Strength of the tie to the starting weights."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """dpo with loss sigmoid only. Share of the pairs assumed to be labelled the wrong way round (conservative DPO)."""
    length_normalized: bool = False
    """dpo only. Divide every log-probability by its number of tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> AlignSettings:
        if self.method == "sft":
            # By value: a run's saved configuration spells out the defaults.
            for key, field in type(self).model_fields.items():
                if key != "method" and getattr(self, key) != field.default:
                    raise ValueError(f"align.{key} is for align.method dpo, sft has no use for it: remove it")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("align.label_smoothing is for align.loss sigmoid: set it to 0")
        return self


class AlignConfig(Config):
    """`mixcpt align`. Cross-entropy alone unless `loss.target` asks for a teacher."""

    align: AlignSettings
    loss: LossConfig = LossConfig(target="none")

    @model_validator(mode="before")
    @classmethod
    def _has_the_section(cls, values: Any) -> Any:
        if isinstance(values, dict) and "align" not in values:
            raise ValueError("align: required; without it this is a configuration of `mixcpt train`")
        return values

    @model_validator(mode="before")
    @classmethod
    def _no_teacher_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("loss"), dict):
            return {**values, "loss": {"target": "none", **values["loss"]}}
        return values

    @model_validator(mode="after")
    def _one_objective(self) -> AlignConfig:
        if self.align.method == "dpo" and self.loss != LossConfig(target="none"):
            raise ValueError("align.method dpo has its own loss (align.beta, align.loss): remove the loss section")
        return self

    @property
    def kind(self) -> str:
        return self.align.method

    @property
    def row_sequences(self) -> int:
        return 2 if self.align.method == "dpo" else 1  # align/pairs.py

    @property
    def fuses_lm_head(self) -> bool:
        return self.align.method == "dpo" or super().fuses_lm_head  # align/logprobs.py


def load_run_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration of a run: of `mixcpt align` where it has the section `align`, else of `mixcpt train`.

    Raises ConfigError naming the file and the key.
    """
    values = read_values(path, overrides)
    return validate(AlignConfig if "align" in values else Config, values, origin(path, overrides))


def recipe_of(config: Config) -> Recipe:
    """How the run of a configuration reads its data and is built."""
    if isinstance(config, AlignConfig) and config.align.method == "dpo":
        from megatron_mixcpt.align.dpo import DPO

        return DPO
    from megatron_mixcpt.train.mixcpt import MIXCPT

    return MIXCPT
