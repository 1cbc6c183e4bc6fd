"""`linear_lssd_loss`: the LSSD loss straight from hidden states, so that no more than a chunk of logits ever exists.

Forward takes the words of every chunk of tokens, then gathers and combines them once; backward computes each chunk's
logits again, turns them into their gradient and multiplies that into the two gradients it belongs to. That is 12 N H V
floating-point operations instead of 8, for memory that does not grow with the number of tokens N.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mixcpt.kernels.arguments import FLOAT_DTYPES, make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.collectives import Group, all_gather, all_reduce, reduce_scatter, size_of
from megatron_mixcpt.kernels.lssd import Loss, pack_outputs, shape_outputs

# 16-bit matrices can be multiplied into fp32 on CUDA, since torch 2.8.
_MM_TAKES_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def linear_lssd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
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
    chunk_tokens: int = 1024,
    sequence_parallel: bool = False,
    head_grad: Tensor | None = None,
    return_details: bool = False,
) -> Loss:
    """`lssd_loss` of the logits `hidden @ head.T`, which are computed in fp32, `chunk_tokens` tokens at a time.

    student_hidden `[..., h]`, student_head `[v_local, h]`, teacher_hidden `[..., h_t]`, teacher_head `[v_t, h_t]`:
    bf16, fp16 or fp32, equal within the pairs; the heads are this rank's rows of the vocabulary. labels `[...]` int64.
    Without a teacher (both None) it is cross-entropy alone.
    Gradients flow into student_hidden and student_head. With a tensor-parallel `group` the hidden states' gradient is
    summed over its ranks in backward.
    sequence_parallel: hidden states are this rank's part `[s / tp, b, h]` of the sequence, labels are whole `[s, b]`;
        each chunk is gathered and its gradient reduce-scattered.
    head_grad: fp32 `[v_local, h]` to which the head's gradient is added (Megatron's `main_grad`); autograd then gets
        none for student_head. Without it, the gradient is accumulated in fp32 and returned in the head's dtype.

    The other arguments, the result and the errors are those of `lssd_loss`.
    """
    _check("student", student_hidden, student_head, labels, group if sequence_parallel else None)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: give both or neither")
    if head_grad is not None and (head_grad.dtype, head_grad.shape) != (torch.float32, student_head.shape):
        raise ValueError(f"head_grad must be float32 {list(student_head.shape)}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: must be at least 1")
    constants = make_constants(
        labels,
        student_head.shape[0],
        has_teacher=teacher_hidden is not None,
        group=group,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        target=target,
        margin=margin,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    if teacher_hidden is not None and teacher_head is not None:
        _check("teacher", teacher_hidden, teacher_head, labels, group if sequence_parallel else None)
        columns = student_head.shape[0] if valid_vocab is None else constants.valid
        if teacher_head.shape[0] < columns or (valid_vocab is None and teacher_head.shape[0] > columns):
            raise ValueError(f"teacher_head has {teacher_head.shape[0]} rows for {columns} of the vocabulary")
        teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        teacher_head = teacher_head.detach()
    plan = _Plan(labels.numel(), chunk_tokens, group, sequence_parallel)
    constants = dataclasses.replace(
        constants, ce_weight=plan.arrange(constants.ce_weight), kd_weight=plan.arrange(constants.kd_weight)
    )
    outputs = _LinearLSSD.apply(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_head,
        teacher_hidden,
        teacher_head,
        plan.arrange(labels.reshape(-1).contiguous()),
        constants,
        plan,
        head_grad,
        return_details,
    )
    return shape_outputs(outputs, labels.shape, return_details)


class _Plan:
    """How the tokens are cut into chunks, and in which order they are then.

    Under sequence parallelism rank r holds tokens r * n ... r * n + n - 1, and a chunk takes the same slice from every
    rank: tokens are therefore worked on in the order of chunk, rank, token.
    """

    def __init__(self, num_tokens: int, chunk_tokens: int, group: Group | None, sequence_parallel: bool):
        self.group, self.sequence_parallel = group, sequence_parallel
        self.parts = size_of(group) if sequence_parallel else 1
        self.num_local = num_tokens // self.parts
        self.step = max(1, chunk_tokens // self.parts)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """(slice of this rank's hidden states, slice of the arranged tokens)."""
        for start in range(0, self.num_local, self.step):
            end = min(start + self.step, self.num_local)
            yield slice(start, end), slice(start * self.parts, end * self.parts)

    def arrange(self, values):
        """Per-token values `[N]` from the caller's order into the working order; numbers as they are."""
        if self.parts == 1 or not isinstance(values, Tensor):
            return values
        columns = values.view(self.parts, self.num_local)
        return torch.cat([columns[:, local].reshape(-1) for local, _ in self.chunks()] or [values])

    def restore(self, values: Tensor) -> Tensor:
        """The reverse of `arrange`."""
        if self.parts == 1:
            return values
        restored = torch.empty_like(values)
        columns = restored.view(self.parts, self.num_local)
        for local, tokens in self.chunks():
            columns[:, local] = values[tokens].view(self.parts, -1)
        return restored

    def gather(self, hidden: Tensor) -> Tensor:
        return all_gather(hidden, self.group) if self.sequence_parallel else hidden

    def reduce(self, grad_hidden: Tensor) -> Tensor:
        """Sum the parts that the ranks' vocabulary shards contribute, for the tokens that this rank holds."""
        if self.sequence_parallel:
            return reduce_scatter(grad_hidden, self.group)
        return all_reduce(grad_hidden, self.group)


class _LinearLSSD(torch.autograd.Function):
    """Saves its inputs and the record; nothing of the size of the logits outlives a chunk."""

    @staticmethod
    def forward(ctx, hidden, head, t_hidden, t_head, labels, constants, plan, head_grad, with_details):
        backend = choose_backend(hidden.device)
        words = torch.empty(1, constants.num_words, labels.numel(), device=hidden.device, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits
            for local, tokens in plan.chunks():
                student = _product(plan.gather(hidden[local]), head.t())
                teacher = None if t_head is None else _product(plan.gather(t_hidden[local]), t_head.t())
                backend.stats(student, teacher, labels[tokens], constants, words[..., tokens])
                del student, teacher  # before the next chunk's are made
        results = backend.combine(all_gather(words, plan.group), words[0], labels, constants, with_details)
        ctx.save_for_backward(hidden, head, t_hidden, t_head, labels, words[0])
        ctx.constants, ctx.plan, ctx.head_grad, ctx.backend = constants, plan, head_grad, backend
        return pack_outputs(ctx, {name: plan.restore(value) for name, value in results.items()}, with_details)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        hidden, head, t_hidden, t_head, labels, record = ctx.saved_tensors
        plan, constants = ctx.plan, ctx.constants
        upstream = plan.arrange(upstream.reshape(-1))
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = None
        if wants_head:
            grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.head_grad is None else ctx.head_grad
        for local, tokens in plan.chunks():
            chunk = plan.gather(hidden[local])
            grad = _product(chunk, head.t())
            teacher = None if t_head is None else _product(plan.gather(t_hidden[local]), t_head.t())
            weights = {name: _part(getattr(constants, name), tokens) for name in ("ce_weight", "kd_weight")}
            part = dataclasses.replace(constants, **weights)
            ctx.backend.gradient(grad, teacher, labels[tokens], record[:, tokens], upstream[tokens], part, grad)
            del teacher
            grad = grad.to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[local] = plan.reduce(grad @ head)
            if grad_head is not None:
                _accumulate(grad_head, grad.t(), chunk)
            del grad  # before the next chunk's is made
        if grad_head is not None:
            grad_head = grad_head.to(head.dtype) if ctx.head_grad is None else None
        return grad_hidden, grad_head, None, None, None, None, None, None, None


def _part(weight: float | Tensor, tokens: slice) -> float | Tensor:
    return weight[tokens] if isinstance(weight, Tensor) else weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, from 16-bit factors too: rounding logits to 16 bits would cost more than the rest of the loss."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and _MM_TAKES_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, `total` fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += _product(a, b)


def _check(name: str, hidden: Tensor, head: Tensor, labels: Tensor, split_over: Group | None) -> None:
    for part, tensor in (("hidden", hidden), ("head", head)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}_{part} is {tensor.dtype}; bfloat16, float16 or float32 is needed")
    if hidden.dtype != head.dtype or head.dim() != 2 or hidden.shape[-1:] != head.shape[1:]:
        shapes = f"{list(hidden.shape)} {hidden.dtype} and {list(head.shape)} {head.dtype}"
        raise ValueError(f"{name}_hidden and {name}_head do not fit together: {shapes}")
    expected = list(labels.shape)
    if split_over is not None:
        if expected[0] % size_of(split_over):
            raise ValueError(f"labels {expected} cannot be split over {size_of(split_over)} ranks")
        expected[0] //= size_of(split_over)
    if list(hidden.shape[:-1]) != expected:
        raise ValueError(
            f"{name}_hidden {list(hidden.shape)} must have the dimensions {expected} of the labels and one"
        )
