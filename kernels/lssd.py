"""`lssd_loss`: cross-entropy plus distillation towards the logit-swapped teacher, over vocabulary shards.

    forward: stats of this shard -> one all-gather -> combine: loss and record
    backward: gradient from the record, no collective

Method: Mix-CPT, arXiv 2407.10804 (swap); MFT, arXiv 2506.15702 (mft). Algebra: README.md.
"""

from types import ModuleType

import torch
import torch.distributed as dist
from megatron_mixcpt.kernels import reference
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.layout import is_grid
from megatron_mixcpt.kernels.objective import MAX_VOCAB, TARGETS, Objective
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup
Loss = Tensor | tuple[Tensor, dict[str, Tensor]]
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
DETAILS = ("ce", "kl", "p_argmax", "p_label", "swapped")


def lssd_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    target: str = "swap",
    margin: float = 0.2,
    group: Group | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    grad_buffer: str = "new",
    return_details: bool = False,
) -> Loss:
    """Per-token `ce_weight * CE(student, label) + kd_weight * KL(p' || q)`, q = softmax(student / temperature).

    p' is softmax(teacher / temperature): for target `swap`, with the probabilities of its argmax (lowest id on ties)
    and of the label exchanged; for `plain`, unchanged; for `mft`, mixed with the label until that leads by `margin`.
    CE is taken at temperature 1. No factor temperature^2 is applied.

    student, teacher: `[..., v_local]` bf16, fp16 or fp32, any strides; this rank's columns of the vocabulary.
    labels: `[...]` int64 global ids. A label outside the vocabulary gives NaN.
    teacher: None gives plain vocab-parallel cross-entropy (kd_weight, target and temperature unused).
    ce_weight, kd_weight: numbers, or constant tensors `[...]`; where a weight is 0 its term is exactly 0.
    group: tensor-parallel process group (every rank calls, with the same labels); None: the vocabulary is all here.
    vocab_start: global id of this shard's first column; shards may differ in size.
    valid_vocab: size of the whole vocabulary; columns beyond are padding, and teacher and student may be padded
        differently. Default: every column counts.
    grad_buffer: `teacher` writes the gradient over the teacher's logits in backward (same dtype and shape as the
        student's; they must not be needed afterwards), saving one buffer of logits.

    Returns the fp32 loss `[...]`, 0 where ignored; gradient flows into `student` alone. With `return_details`, also a
    dict of detached `[...]` tensors: fp32 `ce`, `kl` (unweighted), `p_argmax`, `p_label` (the teacher's) and bool
    `swapped` (the teacher's argmax is not the label); zero where ignored or without a teacher.

    Runs fused Triton kernels on GPU tensors and the cache-blocked reference elsewhere; the environment variable
    MIXCPT_LSSD=reference|triton forces one. Raises ValueError or TypeError naming the argument that is wrong.
    """
    return _loss(
        choose_backend(student.device),
        student,
        teacher,
        labels,
        group,
        grad_buffer,
        return_details,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        target=target,
        margin=margin,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )


def lssd_loss_reference(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    group: Group | None = None,
    grad_buffer: str = "new",
    return_details: bool = False,
    **options,
) -> Loss:
    """`lssd_loss`, with the same arguments, in plain PyTorch on any device and whatever MIXCPT_LSSD says."""
    return _loss(reference, student, teacher, labels, group, grad_buffer, return_details, **options)


def _loss(backend: ModuleType, student, teacher, labels, group, grad_buffer, return_details, **options) -> Loss:
    tokens = labels.shape
    objective = _objective(student, teacher, labels, group=group, grad_buffer=grad_buffer, **options)
    student = student if is_grid(student) else student.contiguous()
    if teacher is not None:
        teacher = teacher.detach() if is_grid(teacher) else teacher.detach().contiguous()
    loss, *details = _LSSD.apply(
        student, teacher, labels.reshape(-1), objective, group, grad_buffer == "teacher", return_details, backend
    )
    if not return_details:
        return loss.view(tokens)
    return loss.view(tokens), {name: value.view(tokens) for name, value in zip(DETAILS, details)}


class _LSSD(torch.autograd.Function):
    """Saves the logits and one record of a few words a token; the gradient is rebuilt from them in backward."""

    @staticmethod
    def forward(ctx, student, teacher, labels, objective, group, overwrite_teacher, with_details, backend):
        splits, num_tokens = backend.num_splits(labels.numel()), labels.numel()
        words = torch.empty(splits, objective.num_words, num_tokens, device=student.device, dtype=torch.float32)
        backend.stats(student, teacher, labels, objective, words)
        record = words[0]
        results = backend.combine(gather_words(words, group), record, labels, objective, with_details)
        ctx.save_for_backward(student, teacher, labels, record)
        ctx.objective, ctx.overwrite_teacher, ctx.backend, ctx.spent = objective, overwrite_teacher, backend, False
        if not with_details:
            return (results["loss"],)
        zeros = torch.zeros_like(results["loss"])
        no_teacher = {"kl": zeros, "p_argmax": zeros.clone(), "p_label": zeros.clone(), "swapped": zeros.bool()}
        details = [(no_teacher | results)[name] for name in DETAILS]
        ctx.mark_non_differentiable(*details)
        return results["loss"], *details

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.spent:
            raise RuntimeError(
                "lssd_loss(grad_buffer='teacher') was differentiated twice: the first backward wrote the gradient over "
                "the teacher's logits; use grad_buffer='new' with retain_graph"
            )
        student, teacher, labels, record = ctx.saved_tensors
        if ctx.overwrite_teacher:
            ctx.spent = True
            grad = teacher.detach()
        else:
            grad = torch.empty_like(student)
        ctx.backend.gradient(student, teacher, labels, record, upstream.reshape(-1), ctx.objective, grad)
        if ctx.overwrite_teacher:
            torch.autograd.graph.increment_version(teacher)  # anyone else who saved these logits must notice
        return grad, None, None, None, None, None, None, None


def gather_words(words: Tensor, group: Group | None) -> Tensor:
    """Every shard's words, `[splits, words, N]` -> `[tp * splits, words, N]`: the only communication of the loss."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return words
    shards = words.new_empty(size * words.shape[0], *words.shape[1:])
    _all_gather(shards, words, group=group)
    return shards


def _objective(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    group: Group | None,
    grad_buffer: str,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    target: str = "swap",
    margin: float = 0.2,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> Objective:
    """Check the arguments of a call and keep what is constant over its tokens."""
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits is None:
            continue
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} logits are {logits.dtype}; bfloat16, float16 or float32 is needed")
        if logits.shape[:-1] != labels.shape or logits.dim() == 0:
            raise ValueError(f"{name} {list(logits.shape)} must be labels {list(labels.shape)} plus the vocabulary")
        if logits.device != labels.device:
            raise ValueError(f"{name} is on {logits.device}, labels are on {labels.device}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; int64 is needed")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: must be one of {', '.join(TARGETS)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if not 0 < margin <= 1:
        raise ValueError(f"margin={margin}: must be above 0 and at most 1")
    width = student.shape[-1]
    end = vocab_start + width if valid_vocab is None else valid_vocab
    if vocab_start < 0 or end > MAX_VOCAB:
        raise ValueError(f"vocab_start={vocab_start}, valid_vocab={valid_vocab}: ids must lie in 0 .. {MAX_VOCAB}")
    if group is not None and dist.get_rank(group) > 0 and vocab_start == 0:
        raise ValueError(f"vocab_start=0 on rank {dist.get_rank(group)} of the group: pass the id of the first column")
    valid = max(0, min(end - vocab_start, width))
    if teacher is not None:
        _check_teacher(teacher, student, valid, padded=valid_vocab is not None, overwrite=grad_buffer == "teacher")
    if grad_buffer not in ("new", "teacher") or (grad_buffer == "teacher" and teacher is None):
        raise ValueError(f"grad_buffer={grad_buffer!r}: must be 'new', or 'teacher' where there is a teacher")
    return Objective(
        has_teacher=teacher is not None,
        target=target,
        temperature=float(temperature) if teacher is not None else 1.0,
        margin=float(margin),
        ce_weight=_weight("ce_weight", ce_weight, labels),
        kd_weight=0.0 if teacher is None else _weight("kd_weight", kd_weight, labels),
        vocab_start=vocab_start,
        valid=valid,
        ignore_index=ignore_index,
    )


def _check_teacher(teacher: Tensor, student: Tensor, valid: int, *, padded: bool, overwrite: bool) -> None:
    width, teacher_width = student.shape[-1], teacher.shape[-1]
    if teacher_width != width and not padded:
        raise ValueError(f"student has {width} columns and teacher {teacher_width}: pass valid_vocab")
    if teacher_width < valid:
        raise ValueError(f"teacher has {teacher_width} columns, fewer than the {valid} that are vocabulary")
    if overwrite and (teacher.dtype, teacher.shape) != (student.dtype, student.shape):
        raise ValueError("grad_buffer='teacher' needs teacher logits of the student's dtype and shape")
    if overwrite and teacher.requires_grad:
        raise ValueError("grad_buffer='teacher' overwrites the teacher's logits: compute them under torch.no_grad()")


def _weight(name: str, weight: float | Tensor, labels: Tensor) -> float | Tensor:
    if not isinstance(weight, Tensor):
        return float(weight)
    if weight.shape != labels.shape or weight.device != labels.device:
        raise ValueError(f"{name} {list(weight.shape)} on {weight.device} must be a number or a tensor like labels")
    if weight.requires_grad:
        raise ValueError(f"{name} requires a gradient, which is not computed: pass {name}.detach()")
    return weight.reshape(-1).float()
