"""Configuration of `mixcpt align`: that of `mixcpt train` with one more section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config import Config, LossConfig, Section


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
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("align.label_smoothing is for align.loss sigmoid: set it to 0")
        return self


class AlignConfig(Config):
    """`mixcpt align`. Cross-entropy alone unless `loss.target` asks for a teacher."""

    align: AlignSettings
    loss: LossConfig = LossConfig(target="none")

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
