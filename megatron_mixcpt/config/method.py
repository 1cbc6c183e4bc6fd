"""The sections that say what the model is held to: loss, teacher, adapter, budget of forgetting, alignment."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from megatron_mixcpt.config.section import Positive, Section, Weight


class KindWeights(Section):
    """Factors on `loss.ce_weight` and `loss.kd_weight` for the tokens of one kind of data."""

    ce: Weight = 1.0
    """Factor on ce_weight."""
    kd: Weight = 1.0
    """Factor on kd_weight."""


class LossConfig(Section):
    """Loss a token = ce_weight * CE + kd_weight * KL(target(teacher) || student)."""

    target: Literal["swap", "plain", "mft", "none"] = "swap"
    """swap: top-1 and gold probability exchanged (Mix-CPT, arXiv 2407.10804); plain: the teacher as it is; mft: gold
    raised by a margin (arXiv 2506.15702); none: cross-entropy alone. At equal learning rates swap learned more than
    plain; whether it beats none, averaged with the base, is not decided (docs/study.md)."""
    ce_weight: Weight = 1.0
    """Weight of next-token prediction."""
    kd_weight: Weight = 1.0
    """Weight of the distillation. 1 is the middle of a sweep with one seed (docs/forgetting.md): 0.25 learned and
    forgot more, 4 and 16 less. None is best for all data."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides teacher and student logits in the distillation term."""
    margin: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Lead of the gold token over the teacher's first choice, for target mft."""
    normalize: bool = True
    """Divide by ce_weight + kd_weight, so that sweeping kd_weight does not also sweep the learning rate."""
    fuse_lm_head: bool = False
    """Compute logits and loss in chunks of tokens, so that no rank ever holds all logits: less memory, 12 instead of 8
    FLOPs a head weight and token. Needs a teacher."""
    by_kind: dict[Literal["domain", "general", "instruction", "preference"], KindWeights] = Field(default={})
    """Factors by kind of data, as `{domain: {ce: 1, kd: 0.5}, general: {ce: 0, kd: 1}}`; 1 where not given."""

    @property
    def start_kd_weight(self) -> float:
        """kd_weight, as training begins with it: 0 without a target."""
        return 0.0 if self.target == "none" else self.kd_weight

    def factors(self, kind: str) -> KindWeights:
        """Of the tokens of one kind of data."""
        return self.by_kind.get(cast(Literal["domain"], kind)) or KindWeights()

    def teaches(self, kind: str) -> bool:
        """Whether any term of the loss has a weight on the tokens of this kind of data."""
        factors = self.factors(kind)
        return self.ce_weight * factors.ce + self.start_kd_weight * factors.kd > 0.0

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossConfig:
        if self.ce_weight + self.start_kd_weight == 0.0:
            raise ValueError("loss.ce_weight and loss.kd_weight are both 0: there is nothing to learn from")
        return self


class TeacherConfig(Section):
    """Where the distillation target comes from."""

    source: Literal["initial", "adapter_off", "cached", "deepspeed", "none"] = "initial"
    """initial: a frozen copy of the starting weights; adapter_off: the student without its adapters, which takes no
    memory; cached: answers that `mixcpt cache-teacher` computed beforehand; deepspeed: another Hugging Face model with
    the same tokenizer, in pieces over all ranks (ZeRO-3); none: only with loss.target none."""
    cache: str | None = None
    """Directory of the cached answers, for source cached."""
    hf: str | None = None
    """Hugging Face directory of the teacher, for source deepspeed; with source cached, the answers are of this model
    instead of the starting weights."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the weights of the model in teacher.hf wait: on the device, in host memory, or on a local NVMe disk."""
    nvme_path: str | None = None
    """Directory on the disk, for offload nvme."""

    @model_validator(mode="after")
    def _complete(self) -> TeacherConfig:
        if self.source == "cached" and self.cache is None:
            raise ValueError("teacher.source cached needs teacher.cache, a directory that `mixcpt cache-teacher` fills")
        if self.source == "deepspeed" and self.hf is None:
            raise ValueError("teacher.source deepspeed needs teacher.hf, the directory of a Hugging Face model")
        if self.cache is not None and self.source != "cached":
            raise ValueError(f"teacher.cache is for teacher.source cached, not {self.source}: set that, or remove it")
        if self.nvme_path is not None and self.offload != "nvme":
            raise ValueError("teacher.nvme_path is for teacher.offload nvme: set that, or remove it")
        if self.hf is not None and self.source not in ("cached", "deepspeed"):
            raise ValueError(f"teacher.hf is for teacher.source deepspeed or cached, not {self.source}")
        if self.offload != "none" and self.hf is None:
            raise ValueError("teacher.offload is for the model of teacher.hf: set it, or offload to none")
        if self.offload == "nvme" and self.nvme_path is None:
            raise ValueError("teacher.offload nvme needs teacher.nvme_path, a directory on the disk")
        return self


class AdapterConfig(Section):
    """Train a small addition to each linear layer in place of the weights (docs/adapters.md)."""

    method: Literal["lora", "alora"]
    """lora: W x + alpha/rank B A x (arXiv 2106.09685); alora: causal attention over A x before B, our reading of arXiv
    2405.17830."""
    rank: Positive = 16
    """Rows of A and columns of B, for each of the Hugging Face layers."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The addition is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the inputs of A that is dropped in training."""
    heads: Positive | None = None
    """alora: attention heads, which must divide rank; None: 4 from rank 16 on, below it 1."""
    residual: bool = True
    """alora: add A x itself to what the attention returns."""
    targets: list[str] = Field(default=["*_proj"], min_length=1)
    """Layers by Hugging Face name: patterns of the last part (q_proj, *_proj) or of the whole name
    (model.layers.1?.mlp.*)."""
    init: str | None = None
    """Adapter directory to start from, as PEFT or `mixcpt export --adapter` writes it."""

    @model_validator(mode="after")
    def _heads_fit(self) -> AdapterConfig:
        if self.method == "lora" and (self.heads is not None or not self.residual):
            raise ValueError("adapter.heads and adapter.residual belong to adapter.method alora: remove them for lora")
        if self.method == "alora" and self.rank % self.num_heads:
            raise ValueError(f"adapter.heads ({self.num_heads}) must divide adapter.rank ({self.rank})")
        return self

    @property
    def num_heads(self) -> int:
        return self.heads or (4 if self.rank >= 16 else 1)

    @property
    def shape(self) -> dict[str, Any]:
        """What two adapters must have in common for one to go on from the other."""
        return self.model_dump(exclude={"dropout", "init"})


class ForgetConfig(Section):
    """Training that keeps a budget of forgetting (docs/forgetting.md)."""

    budget: Annotated[float, Field(gt=0.0)]
    """Most that the held-out loss of each source in `on` may rise over its value before training, in nats a token."""
    on: list[str] = Field(default=[])
    """Sources, or kinds of data, that must not be forgotten; none named: all but the domain's."""
    every: Positive = 50
    """Steps between two measurements; one is also made before a checkpoint, and at the end."""
    average: bool = False
    """Training may forget six times the budget, for its end is averaged with the start: the best average, or
    checkpoint, within the budget is the result."""


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
