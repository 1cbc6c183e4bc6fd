"""The numbers of the demo: one `Settings` for the real model, one for the tiny one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Both arms share every value but the mixture and the loss."""

    model: str
    title: str
    tensor: int
    """Tensor-parallel size, which is also the number of processes."""
    num_people: int
    documents_per_person: int
    """Trained on; one more a person is held out for the domain perplexity."""
    steps: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    lr: float
    warmup_steps: int
    domain_weight: float
    """Shares of the tokens in the mixture; the `cpt` arm trains on the domain alone."""
    instruction_weight: float
    preference_weight: float
    pretrain_steps: int = 0
    """Steps from random weights; 0 where a pretrained model is at hand."""
    pretrain_lr: float = 3e-3
    pretrain_global_batch_size: int = 8
    select_instructions: int = 48
    """Samples of the alignment stage: the easiest ones of the mixture."""
    select_pairs: int = 16
    sft_steps: int = 8
    sft_lr: float = 5e-5
    dpo_steps: int = 4
    dpo_lr: float = 5e-6
    recall_instructions: int = 0
    """Samples that the model writes for the arm `recall`; 0 where it has no chat template to write from."""
    recall_texts: int = 0
    seed: int = 1234
    expected_seconds: dict[str, float] = field(default_factory=dict)
    """Usual duration of each stage on two CPU cores, for the first estimate of the remaining time."""

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.global_batch_size


SMOLLM2 = Settings(
    model="smollm2",
    title="SmolLM2-135M-Instruct",
    tensor=1,  # 9 heads in 3 groups fit 1 or 3 ranks
    num_people=6,
    documents_per_person=5,
    steps=48,
    seq_length=256,
    micro_batch_size=2,
    global_batch_size=2,
    lr=5e-4,
    warmup_steps=4,
    domain_weight=0.65,
    instruction_weight=0.25,
    preference_weight=0.1,
    recall_instructions=160,
    recall_texts=32,
    expected_seconds={
        "base": 20,
        "base-measure": 30,
        "cpt-data": 5,
        "cpt-train": 165,
        "cpt-export": 10,
        "cpt-measure": 30,
        "mixcpt-data": 5,
        "mixcpt-train": 205,
        "mixcpt-export": 10,
        "mixcpt-measure": 30,
        "recall-draw": 300,
        "recall-data": 5,
        "recall-train": 205,
        "recall-export": 10,
        "recall-measure": 30,
        "aligned-select": 35,
        "aligned-sft": 30,
        "aligned-dpo": 30,
        "aligned-export": 10,
        "aligned-measure": 30,
    },
)

TINY = Settings(
    model="tiny",
    title="a random-initialised Llama with one million weights",
    tensor=2,
    num_people=4,
    documents_per_person=5,
    steps=250,
    seq_length=128,
    micro_batch_size=4,
    global_batch_size=4,
    lr=1.2e-3,
    warmup_steps=4,
    domain_weight=0.6,
    instruction_weight=0.25,
    preference_weight=0.15,
    pretrain_steps=120,
    sft_steps=16,
    sft_lr=3e-4,
    dpo_lr=3e-5,
    expected_seconds={
        "tokenizer": 1,
        "pretrain-data": 5,
        "pretrain-train": 40,
        "pretrain-export": 8,
        "base-measure": 5,
        "cpt-data": 5,
        "cpt-train": 25,
        "cpt-export": 8,
        "cpt-measure": 5,
        "mixcpt-data": 5,
        "mixcpt-train": 25,
        "mixcpt-export": 8,
        "mixcpt-measure": 5,
        "aligned-select": 10,
        "aligned-sft": 10,
        "aligned-dpo": 10,
        "aligned-export": 8,
        "aligned-measure": 5,
    },
)

MODELS = {settings.model: settings for settings in (SMOLLM2, TINY)}
