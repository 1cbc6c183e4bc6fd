"""Checks of the arguments that the losses share; every error names the argument and what it must be."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixcpt.kernels.collectives import Group, size_of
from megatron_mixcpt.kernels.constants import MAX_VOCAB, TARGETS, LossConstants

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_logits(name: str, logits: Tensor, labels: Tensor) -> None:
    """`[..., v]` floating point beside labels `[...]` int64."""
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {logits.dtype}; bfloat16, float16 or float32 is needed")
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"{name} {list(logits.shape)} must have the dimensions of labels {list(labels.shape)} and one")
    if logits.device != labels.device:
        raise ValueError(f"{name} is on {logits.device}, labels are on {labels.device}")


def check_teacher_logits(teacher: Tensor, student: Tensor, valid: int, *, padded: bool, overwrite: bool) -> None:
    """Teacher logits against student logits of which `valid` columns are vocabulary."""
    width, teacher_width = student.shape[-1], teacher.shape[-1]
    if teacher_width != width and not padded:
        raise ValueError(f"student has {width} columns and teacher {teacher_width}: pass valid_vocab")
    if teacher_width < valid:
        raise ValueError(f"teacher has {teacher_width} columns, fewer than the {valid} that are vocabulary")
    if overwrite and (teacher.dtype, teacher.shape) != (student.dtype, student.shape):
        raise ValueError("grad_buffer='teacher' needs teacher logits of the student's dtype and shape")
    if overwrite and teacher.requires_grad:
        raise ValueError("grad_buffer='teacher' overwrites the teacher's logits: compute them under torch.no_grad()")


def make_constants(
    labels: Tensor,
    width: int,
    *,
    has_teacher: bool,
    group: Group | None,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    target: str = "swap",
    margin: float = 0.2,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> LossConstants:
    """The constants of a call on a shard of `width` columns."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; int64 is needed")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: must be one of {', '.join(TARGETS)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if not 0 < margin <= 1:
        raise ValueError(f"margin={margin}: must be above 0 and at most 1")
    end = vocab_start + width if valid_vocab is None else valid_vocab
    if vocab_start < 0 or not 0 < end <= MAX_VOCAB:
        raise ValueError(f"vocab_start={vocab_start}, valid_vocab={valid_vocab}: ids must lie in 0 .. {MAX_VOCAB}")
    if group is not None and size_of(group) > 1 and dist.get_rank(group) > 0 and vocab_start == 0:
        raise ValueError(f"vocab_start=0 on rank {dist.get_rank(group)} of the group: pass the id of the first column")
    return LossConstants(
        has_teacher=has_teacher,
        target=target,
        temperature=float(temperature) if has_teacher else 1.0,
        margin=float(margin),
        ce_weight=_weight("ce_weight", ce_weight, labels),
        kd_weight=_weight("kd_weight", kd_weight, labels) if has_teacher else 0.0,
        vocab_start=vocab_start,
        valid=max(0, min(end - vocab_start, width)),
        ignore_index=ignore_index,
    )


def _weight(name: str, weight: float | Tensor, labels: Tensor) -> float | Tensor:
    if not isinstance(weight, Tensor):
        return float(weight)
    if weight.shape != labels.shape or weight.device != labels.device:
        raise ValueError(f"{name} {list(weight.shape)} on {weight.device} must be a number or a tensor like labels")
    if weight.requires_grad:
        raise ValueError(f"{name} requires a gradient, which is not computed: pass {name}.detach()")
    return weight.reshape(-1).float().contiguous()  # which reshape leaves strided
