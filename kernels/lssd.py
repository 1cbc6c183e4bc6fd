"""`lssd_loss`: cross-entropy plus distillation towards the logit-swapped teacher, over vocabulary shards.

    forward: stats of this shard -> one all-gather -> combine: loss and record
    backward: gradient from the record, no collective

Method: Mix-CPT, arXiv 2407.10804 (swap); MFT, arXiv 2506.15702 (mft). Algebra: README.md.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mixcpt.kernels import reference
from megatron_mixcpt.kernels.arguments import check_logits, check_teacher_logits, make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.collectives import Group, all_gather
from megatron_mixcpt.kernels.layout import is_grid

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]
DETAILS = ("ce", "kl", "kl_base", "p_argmax", "p_label", "swapped")


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
    dict of detached `[...]` tensors: fp32 `ce`, `kl` (unweighted), `kl_base`, `p_argmax`, `p_label` (the teacher's) and
    bool `swapped` (the teacher's argmax is not the label); zero where ignored or without a teacher.
    `kl_base` is KL(softmax(teacher) || softmax(student)), whatever target, weights and temperature: how far the student
    has moved from the model it began as, in nats. It is taken at temperature 1, since that divergence, on the new
    data, is the one known to predict forgetting (arXiv 2509.04259), and since those distributions are what is sampled
    and scored. It comes from the sums of the same pass.

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
    check_logits("student", student, labels)
    if grad_buffer not in ("new", "teacher") or (grad_buffer == "teacher" and teacher is None):
        raise ValueError(f"grad_buffer={grad_buffer!r}: must be 'new', or 'teacher' where there is a teacher")
    constants = make_constants(labels, student.shape[-1], has_teacher=teacher is not None, group=group, **options)
    overwrite = grad_buffer == "teacher"
    student = student if is_grid(student) else student.contiguous()
    if teacher is not None:
        check_logits("teacher", teacher, labels)
        padded = options.get("valid_vocab") is not None
        check_teacher_logits(teacher, student, constants.valid, padded=padded, overwrite=overwrite)
        teacher = teacher.detach() if is_grid(teacher) else teacher.detach().contiguous()
    outputs = _LSSD.apply(
        student, teacher, labels.reshape(-1).contiguous(), constants, group, overwrite, return_details, backend
    )
    return shape_outputs(outputs, labels.shape, return_details)


class _LSSD(torch.autograd.Function):
    """Saves the logits and one record of a few words a token; the gradient is rebuilt from them in backward."""

    @staticmethod
    def forward(ctx, student, teacher, labels, constants, group, overwrite_teacher, with_details, backend):
        splits, num_tokens = backend.num_splits(labels.numel()), labels.numel()
        words = torch.empty(splits, constants.num_words, num_tokens, device=student.device, dtype=torch.float32)
        backend.stats(student, teacher, labels, constants, words)
        record = words[0]
        results = backend.combine(all_gather(words, group), record, labels, constants, with_details)
        ctx.save_for_backward(student, teacher, labels, record)
        ctx.constants, ctx.overwrite_teacher, ctx.backend, ctx.spent = constants, overwrite_teacher, backend, False
        return pack_outputs(ctx, results, with_details)

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
        ctx.backend.gradient(student, teacher, labels, record, upstream.reshape(-1), ctx.constants, grad)
        if ctx.overwrite_teacher:
            torch.autograd.graph.increment_version(teacher)  # anyone else who saved these logits must notice
        return grad, None, None, None, None, None, None, None


def pack_outputs(ctx, results: dict[str, Tensor], with_details: bool) -> tuple[Tensor, ...]:
    """Outputs of a loss's autograd function: the loss, and the details, which have no gradient."""
    if not with_details:
        return (results["loss"],)
    zeros = torch.zeros_like(results["loss"])
    no_teacher = {name: zeros.clone() for name in DETAILS[1:-1]} | {"swapped": zeros.bool()}
    details = [(no_teacher | results)[name] for name in DETAILS]
    ctx.mark_non_differentiable(*details)
    return results["loss"], *details


def shape_outputs(outputs: tuple[Tensor, ...], shape: torch.Size, with_details: bool) -> Loss:
    """What the caller of a loss gets, in the shape of the labels."""
    loss, *details = (output.view(shape) for output in outputs)
    return (loss, dict(zip(DETAILS, details))) if with_details else loss
