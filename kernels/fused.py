"""Launches the Triton kernels: the functions of reference.py, for tensors on a GPU or in Triton's interpreter.

Nothing here waits for the device, so the loss can be captured in a CUDA graph.
"""

import contextlib
import math

import torch
import triton
from torch import Tensor

from megatron_mixcpt.kernels.constants import LossConstants
from megatron_mixcpt.kernels.layout import as_grids
from megatron_mixcpt.kernels.triton_rows import gradient_kernel, stats_kernel
from megatron_mixcpt.kernels.triton_tokens import combine_kernel

# Chosen from the ahead-of-time report (aot.py), not by measurement: 8 columns a thread keep the statistics at 64
# registers, so four programs a multiprocessor, and three stages keep the next tiles on their way while one is reduced.
BLOCK = 2048  # columns a program takes at a time
NUM_WARPS = 8
NUM_STAGES = 3
COMBINE_BLOCK = 128  # tokens a program
ENOUGH_PROGRAMS = 1024  # several for each multiprocessor; with fewer rows than that, rows are split
MAX_SPLITS = 8


def num_splits(num_tokens: int) -> int:
    """Programs a row: several only where the rows are too few to fill a GPU. Equal on ranks with unequal shards."""
    return max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // max(1, num_tokens)))


def stats(student: Tensor, teacher: Tensor | None, labels: Tensor, constants: LossConstants, words: Tensor) -> None:
    """Write this shard's words of student, teacher `[..., v]`, labels `[N]` into `words [splits, words, N]` fp32."""
    s, t = as_grids(student, student if teacher is None else teacher)
    splits = words.shape[0]
    if labels.numel() == 0:
        return
    with _on(student):
        stats_kernel[(labels.numel(), splits)](
            s, t, labels, words,
            s.shape[1], *s.stride()[:2], *t.stride()[:2], *words.stride()[:2],
            constants.vocab_start, constants.valid, _split_columns(constants.valid, splits), constants.ignore_index,
            math.log2(math.e) / constants.temperature,
            HAS_TEACHER=constants.has_teacher, SEPARATE=constants.separate_ce, BLOCK=BLOCK,
            STAGES=NUM_STAGES if _aligned(s) and _aligned(t) else 1, num_warps=NUM_WARPS,
        )  # fmt: skip


def combine(
    shards: Tensor, record: Tensor, labels: Tensor, constants: LossConstants, with_details: bool
) -> dict[str, Tensor]:
    """Per-token results from the words of all shards `[shards, words, N]`; writes `record` (may be `shards[0]`)."""
    num_tokens = labels.numel()
    results = {"loss": torch.empty(num_tokens, device=labels.device, dtype=torch.float32)}
    if with_details:
        numbers = ("ce", "kl", "kl_base", "p_argmax", "p_label") if constants.has_teacher else ("ce",)
        results |= {name: torch.empty_like(results["loss"]) for name in numbers}
        if constants.has_teacher:
            results["swapped"] = torch.empty_like(results["loss"], dtype=torch.bool)
    if num_tokens == 0:
        return results
    names = ("loss", "ce", "kl", "kl_base", "p_argmax", "p_label", "swapped")
    outputs = [results.get(name, results["loss"]) for name in names]
    *weights, per_token = _weights(constants, num_tokens, labels.device)
    with _on(shards):
        combine_kernel[(triton.cdiv(num_tokens, COMBINE_BLOCK),)](
            shards, record, labels, *weights, *outputs,
            num_tokens, shards.shape[0], *shards.stride()[:2], record.stride(0), constants.ignore_index,
            1.0 / constants.temperature, constants.margin,
            TARGET=constants.target, HAS_TEACHER=constants.has_teacher, SEPARATE=constants.separate_ce,
            PER_TOKEN=per_token, DETAILS=with_details, BLOCK=COMBINE_BLOCK,
        )  # fmt: skip
    return results


def gradient(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    record: Tensor,
    upstream: Tensor,
    constants: LossConstants,
    out: Tensor,
) -> None:
    """Write d(sum upstream * loss)/d(student) into `out`, which may be `teacher`'s memory; upstream fp32 `[N]`.

    Without a teacher p' is taken as zero, so that the distillation part is kd_weight * q / temperature.
    """
    if labels.numel() == 0:
        return
    s, t, o = as_grids(student, student if teacher is None else teacher, out)
    splits, width = num_splits(labels.numel()), student.shape[-1]
    *weights, per_token = _weights(constants, labels.numel(), labels.device)
    with _on(student):
        gradient_kernel[(labels.numel(), splits)](
            s, t, o, labels, record, upstream.contiguous(), *weights,
            s.shape[1], *s.stride()[:2], *t.stride()[:2], *o.stride()[:2], record.stride(0),
            constants.vocab_start, constants.valid, width, _split_columns(width, splits), constants.ignore_index,
            math.log2(math.e) / constants.temperature, 1.0 / constants.temperature,
            HAS_TEACHER=constants.has_teacher, SEPARATE=constants.separate_ce, PER_TOKEN=per_token, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def _aligned(grid: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes; others are read in pieces too small to copy ahead."""
    steps = (grid.data_ptr(), *(stride * grid.element_size() for stride in grid.stride()[:2]))
    return all(step % 16 == 0 for step in steps)


def _split_columns(width: int, splits: int) -> int:
    """Columns of one split: whole tiles, so that every split's first column is as aligned as the row."""
    return triton.cdiv(max(1, triton.cdiv(width, splits)), BLOCK) * BLOCK


def _weights(
    constants: LossConstants, num_tokens: int, device: torch.device
) -> tuple[Tensor | float, Tensor | float, bool]:
    """(ce_weight, kd_weight, whether they are per token): one tensor makes both tensors."""
    weights = (constants.ce_weight, constants.kd_weight)
    if not any(isinstance(weight, Tensor) for weight in weights):
        return *weights, False
    ce, kd = (w if isinstance(w, Tensor) else torch.full((num_tokens,), w, device=device) for w in weights)
    return ce, kd, True


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
