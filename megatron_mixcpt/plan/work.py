"""What a run computes: FLOPs of a token, by the count that MFU goes by and as they are executed, and hours of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.throughput import executed_flops_per_token, flops_per_token
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import architecture_from_hf


@dataclass(frozen=True)
class Work:
    """FLOPs a token.

    Attributes:
        model: forward and backward, teacher included: what MFU counts.
        executed: with recomputation, padding and attention without a causal saving.
        forward: of a pass over held-out text.
        counts_teacher: False where the teacher is another model (teacher.source deepspeed) of a family that is not
            counted: then `model` and `executed` are the student's alone.
    """

    model: float
    executed: float
    forward: float
    counts_teacher: bool = True

    def hours(self, tokens: float, num_ranks: int, peak: float, mfu: float) -> float:
        """Of training on `tokens`. `peak`: FLOP/s of a rank; `mfu`: share of it that is reached."""
        return tokens * self.model / (num_ranks * peak * mfu) / 3600


def work_of(config: Config, arch: Architecture, lengths: Mapping[int, float]) -> Work:
    """`lengths`: of documents, each with its share of all tokens (`document_lengths`)."""
    teacher, counts_teacher, frozen = None, True, config.adapter is not None
    if config.runs_teacher:
        try:
            teacher = arch if config.teacher.source != "deepspeed" else architecture_from_hf(str(config.teacher.hf))
        except ConfigError:
            counts_teacher = False
    return Work(
        flops_per_token(arch, lengths, teacher=teacher, frozen=frozen),
        executed_flops_per_token(
            arch,
            lengths,
            teacher=teacher,
            recompute=config.train.recompute,
            fuse_lm_head=config.fuses_lm_head,
            tensor=config.parallel.tensor,
            frozen=frozen,
        ),
        flops_per_token(arch, lengths) / 3,
        counts_teacher,
    )
