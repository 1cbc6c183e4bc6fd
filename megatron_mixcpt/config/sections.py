"""The sections of a training configuration that say what is computed, on what, where and how it is watched."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config.section import NonNegative, Positive, Section, Weight


class ModelConfig(Section):
    """Where the starting weights come from: exactly one of the three."""

    hf: str | None = None
    """Hugging Face directory (config.json and safetensors)."""
    checkpoint: str | None = None
    """Checkpoint written by `mixcpt convert`, or another run, whose newest checkpoint is taken."""
    preset: str | None = None
    """Random initialisation of a named size, `tiny` (4 layers of 128) or `small` (12 layers of 512); the vocabulary is
    the data's."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if sum(value is not None for value in (self.hf, self.checkpoint, self.preset)) != 1:
            raise ValueError("set exactly one of model.hf, model.checkpoint and model.preset")
        return self

    @property
    def source(self) -> str:
        """The one that is set."""
        return str(self.hf or self.checkpoint or self.preset)


class DataConfig(Section):
    """What is read."""

    mix: str
    """`mix.json` written by `mixcpt preprocess`, or the folder it is in."""
    seq_length: Positive | None = None
    """Tokens a sample; None takes the data's own, any other value than the data's is refused."""
    num_workers: NonNegative = 0
    """Loader processes a rank."""
    weights: dict[str, Weight] = Field(default={})
    """Share of each source in place of the mixture's own; may change when a run is resumed. Names all sources."""


class LayoutConfig(Section):
    """How the model is spread: data-parallel size = number of processes / (tensor * pipeline * context)."""

    tensor: Positive = 1
    """Ranks that share every layer; must divide heads and FFN."""
    pipeline: Positive = 1
    """Stages the layers are dealt to, balanced by what they compute."""
    interleave: Positive = 1
    """Parts of the model on each stage: with V, the pipeline's bubble is a V-th, and stages exchange V times as often.
    Needs a number of micro-batches that pipeline divides."""
    layers_per_stage: list[Positive] | None = None
    """Layers of each part in order of depth, pipeline x interleave numbers; None balances them."""
    expert: Positive = 1
    """Of a mixture of experts: ranks that have some of the experts each, and send each other their tokens. They are
    among the data- and context-parallel ranks, whose number it must divide, and it must divide the experts."""
    context: Positive = 1
    """Ranks that share every row: each computes a part of its tokens, so that activations of long rows fit."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals sharded over the tensor-parallel group."""

    @property
    def sizes(self) -> dict[str, int]:
        """What `runtime.parallel.parallel_context` makes the groups of ranks from."""
        return {name: getattr(self, name) for name in ("tensor", "pipeline", "context", "interleave", "expert")}

    @property
    def replica(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def fewest(self) -> int:
        """Ranks that a run takes at least."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> LayoutConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> LayoutConfig:
        if self.interleave > 1 and self.pipeline == 1:
            raise ValueError("parallel.interleave needs parallel.pipeline > 1")
        parts = self.pipeline * self.interleave
        if self.layers_per_stage is not None and len(self.layers_per_stage) != parts:
            raise ValueError(
                f"parallel.layers_per_stage has {len(self.layers_per_stage)} numbers, parallel.pipeline "
                f"{self.pipeline} x parallel.interleave {self.interleave} = {parts} parts"
            )
        return self


class ProfileConfig(Section):
    """Steps that torch's profiler traces."""

    start: Positive = 10
    """First step that is traced, counted from 1."""
    steps: Positive = 3
    """How many are."""


class TrainConfig(Section):
    """Optimization: AdamW on the mean loss over the global batch's target tokens."""

    steps: Positive
    """Optimizer steps in all, resumed ones included."""
    micro_batch_size: Positive = 1
    """Samples a rank computes at once; does not change the result."""
    global_batch_size: Positive = 1
    """Samples a step, over all ranks and accumulated micro-batches."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Peak learning rate. The default is careful, for models of billions of weights; SmolLM2-135M learned most for what
    it forgot at 1.5e-4 to 5e-4, averaged with the base (docs/study.md). Sweep it: it decides more than the method."""
    min_lr: Weight = 0.0
    """Learning rate that cosine and wsd decay to."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: half a cosine; constant, then linear decay (warm-up, stable, decay); or constant."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps that the wsd schedule spends in its final linear decay."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay; norms and biases are spared."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Weight = 1.0
    """Maximum global gradient norm; 0 does not clip."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Order of the data, and weights of a preset."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weights and activations; gradients are accumulated and the optimizer works in fp32 either way."""
    recompute: Literal["none", "mlp", "attention", "full"] = "none"
    """Computed again in backward instead of kept: mlp: what is between the two norms' outputs and the layer's, in the
    MLP; attention: the same in self-attention, its keys and values gathered anew; full: all but each layer's input."""
    router: Literal["frozen", "trained"] = "frozen"
    """Of a mixture of experts: whether what sends tokens to experts is trained. Frozen, what the model knew still meets
    the experts that know it; a router that drifts sends it to others."""
    router_balance: Weight = 0.01
    """Weight of the loss that keeps experts in equal use (arXiv 2101.03961), a layer; with train.router trained."""
    router_z: Weight = 0.001
    """Weight of the mean square of a router's log-sum-exp (arXiv 2202.08906), a layer; with train.router trained."""
    distributed_optimizer: bool = False
    """Shard fp32 master weights and Adam moments over the data-parallel group (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while backward still runs."""
    spike_sigmas: Weight = 6.0
    """Skip a step whose loss or gradient norm lies this many standard deviations above the recent mean; 0: never."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Steps that the recent mean is taken over; nothing is skipped before so many were taken."""
    max_skipped: Positive = 5
    """Stop after so many skipped steps in a row (non-finite, or spikes)."""
    timeout_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    """End all ranks, with their stacks in run_dir/stacks, when a step, validation batch or save makes no progress."""
    profile: ProfileConfig | None = None
    """Trace some steps into run_dir/profile, as `{start: 10, steps: 3}`."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps ({self.warmup_steps}) must be below train.steps ({self.steps})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"train.micro_batch_size ({self.micro_batch_size})"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr ({self.min_lr}) must not exceed train.lr ({self.lr})")
        return self


class OptimizerSection(Section):
    """Where the optimizer's state is kept; what it computes is in `train`."""

    offload: Literal["none", "cpu"] = "none"
    """cpu: moments and fp32 master weights in host memory, updated there by torch's fused AdamW."""


class EvalConfig(Section):
    """Validation loss of each source."""

    every: NonNegative = 0
    """Steps between validations; 0 validates only before the first step and at the end."""
    max_samples: Positive | Literal["all"] | None = 64
    """Samples a source; all, or None, takes the whole validation split."""

    @property
    def limit(self) -> int | None:
        """Samples a source, None without a limit."""
        return None if self.max_samples == "all" else self.max_samples


class CheckpointConfig(Section):
    """Saving and keeping."""

    every: NonNegative = 0
    """Steps between checkpoints; 0 saves by time, at the end and when stopped."""
    every_minutes: Weight = 30.0
    """Save after the first step that ends so long after the last checkpoint; 0 does not look at the clock."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Of the older ones, those of every n-th step are kept too; 0 keeps none."""
    background: bool = Field(default=False, alias="async")
    """Copy the values and write them while training goes on, one checkpoint at a time."""


class WandbConfig(Section):
    """Weights & Biases, beside metrics.jsonl; whatever becomes of it, training goes on."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE where it is set, else online where an API key is found, else offline into run_dir/wandb."""
    project: str = "megatron-mixcpt"
    """Project the run belongs to."""
    entity: str | None = None
    """User or team; None takes the account's default."""
    name: str | None = None
    """Name of the run; None takes the folder name of run_dir."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    """How long the end of a run waits for wandb to finish."""
