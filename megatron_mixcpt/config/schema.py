"""What a training configuration holds.

Every section is one class; every key has a default or is required, a type and a range. An unknown key is refused with
the nearest known one, so that a typing error never trains a different model.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from megatron_mixcpt.config.method import AdapterConfig, AlignSettings, ForgetConfig, LossConfig, TeacherConfig
from megatron_mixcpt.config.section import Section
from megatron_mixcpt.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerSection,
    TrainConfig,
    WandbConfig,
)
from megatron_mixcpt.errors import ConfigError

# Keys without a use where there is no loss.target.
OF_DISTILLATION = {"loss": ("kd_weight", "temperature", "margin"), "teacher": ("source", "hf", "cache")}


class Config(Section):
    """A training run, of `mixcpt train` or, with the section `align`, of `mixcpt align`."""

    model: ModelConfig
    data: DataConfig
    parallel: LayoutConfig = LayoutConfig()
    train: TrainConfig
    optimizer: OptimizerSection = OptimizerSection()
    loss: LossConfig = LossConfig()
    """With `align`, cross-entropy alone unless loss.target asks for a teacher."""
    teacher: TeacherConfig = TeacherConfig()
    adapter: AdapterConfig | None = None
    """Without it all weights are trained."""
    align: AlignSettings | None = None
    """With it the format of answers is taught, by `mixcpt align`."""
    eval: EvalConfig = EvalConfig()
    forget: ForgetConfig | None = None
    """Without it the weights of `loss` stay what they are, whatever is forgotten."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    run_dir: str
    """Folder of the run: resolved configuration, metrics, checkpoints. The same folder resumes."""

    @model_validator(mode="before")
    @classmethod
    def _no_teacher_by_default_in_alignment(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("align") is None:
            return values
        loss = values.get("loss") or {}
        if not isinstance(loss, dict) or "target" in loss:
            return values
        align = values["align"]
        if isinstance(align, dict) and align.get("method") == "sft":
            for section, keys in OF_DISTILLATION.items():
                given = values.get(section)
                for key in keys:
                    if isinstance(given, dict) and given.get(key) not in (None, "initial", "none"):
                        raise ValueError(
                            f"{section}.{key}: sft distils only where loss.target asks for it: set that to swap, plain "
                            f"or mft, or remove {section}.{key}"
                        )
        return {**values, "loss": {**loss, "target": "none"}}

    @model_validator(mode="after")
    def _one_objective(self) -> Config:
        if self.kind == "dpo" and self.loss != LossConfig(target="none"):
            raise ValueError("align.method dpo has its own loss (align.beta, align.loss): remove the loss section")
        if self.kind == "dpo" and (self.teacher.hf or self.teacher.cache):
            raise ValueError(
                "align.method dpo compares with the starting weights, not with a teacher: remove the teacher section"
            )
        return self

    @model_validator(mode="after")
    def _teacher_fits_loss(self) -> Config:
        if self.loss.target != "none" and self.teacher.source == "none":
            raise ValueError(
                f"loss.target {self.loss.target} needs a teacher: set teacher.source=initial, "
                "or loss.target=none to train without distillation"
            )
        if self.loss.fuse_lm_head and self.teacher.source in ("cached", "deepspeed"):
            raise ValueError(
                "loss.fuse_lm_head works on hidden states of the student's own kind, which a teacher.source "
                f"{self.teacher.source} has not: set it to false"
            )
        if self.teacher.source == "adapter_off" and self.adapter is None:
            raise ValueError(
                "teacher.source adapter_off is the model without its adapters: it needs an adapter section; to train "
                "all weights set teacher.source=initial"
            )
        if self.loss.fuse_lm_head and not self.uses_teacher:
            raise ValueError("loss.fuse_lm_head is for distillation: it needs a loss.target and loss.kd_weight > 0")
        return self

    @model_validator(mode="after")
    def _adapters_leave_routers(self) -> Config:
        if self.train.router == "trained" and self.adapter is not None:
            raise ValueError("train.router trained: adapter trains nothing but adapters: remove one of the two")
        return self

    @model_validator(mode="after")
    def _budget_can_be_kept(self) -> Config:
        if self.forget is None:
            return self
        if self.kind == "dpo":
            raise ValueError(
                "forget is kept through the weight of the distillation, which align.method dpo has not: remove it; "
                "align.beta ties the model to its start"
            )
        if not self.uses_teacher:
            raise ValueError(
                "forget.budget is kept through the weight of the distillation: set loss.target to swap, plain or mft, "
                "loss.kd_weight above 0 and teacher.source=initial"
            )
        if self.teacher.hf is not None and self.teacher.hf != self.model.hf:
            raise ValueError(
                f"forget: teacher.hf {self.teacher.hf} is not the model that is trained, and does not hold it to what "
                "it knew: remove teacher.hf, or forget"
            )
        if self.forget.average and self.adapter is not None:
            raise ValueError("forget.average averages whole weights, which adapter leaves as they are: remove one")
        return self

    @property
    def kind(self) -> str:
        """What kind of training it is: train, sft or dpo; a run directory holds one kind."""
        return self.align.method if self.align else "train"

    @property
    def command(self) -> str:
        """The command that runs it."""
        return "align" if self.align else "train"

    def check_command(self, command: str, where: str) -> None:
        """Raise ConfigError unless `mixcpt <command>` (train or align) runs this configuration. `where`: its file."""
        if command == "train" and self.align:
            raise ConfigError(f"{where}: align: with this section it is a configuration of `mixcpt align`")
        if command == "align" and not self.align:
            raise ConfigError(f"{where}: align: required; without it this is a configuration of `mixcpt train`")

    @property
    def uses_teacher(self) -> bool:
        return self.loss.start_kd_weight > 0

    @property
    def runs_teacher(self) -> bool:
        """Whether each step also passes through the teacher."""
        return self.uses_teacher and self.teacher.source != "cached"

    @property
    def row_sequences(self) -> int:
        """Length of a row of the batch in units of the mixture's seq_length."""
        return 2 if self.kind == "dpo" else 1  # objectives/pairs.py

    @property
    def fuses_lm_head(self) -> bool:
        """Whether logits exist for a chunk of tokens at a time only."""
        return self.kind == "dpo" or self.loss.fuse_lm_head  # objectives/logprobs.py
