"""The loss in plain PyTorch, a few rows at a time: the reference for the fused kernels and the path of CPU users.

Each block of rows is small enough to stay in the processor's cache while all its passes run, which is what makes it
several times faster than the textbook expression, and its scratch memory does not depend on the number of tokens.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mixcpt.kernels.constants import (
    ARG,
    CROSS,
    CROSS_1,
    KEEP,
    L_1,
    L_S,
    L_T,
    L_T1,
    M_S,
    M_T,
    NEW_A,
    NEW_Y,
    S_A,
    S_Y,
    T_Y,
    LossConstants,
)
from megatron_mixcpt.kernels.layout import as_grids, blocks

BLOCK_ELEMENTS = 2**20  # 4 MiB of fp32 a buffer: the three of a block stay in the cache
INF = math.inf


def num_splits(num_tokens: int) -> int:
    """How many sets of words the statistics of one shard come in."""
    return 1


def stats(student: Tensor, teacher: Tensor | None, labels: Tensor, constants: LossConstants, words: Tensor) -> None:
    """Write this shard's words of student, teacher `[..., v]`, labels `[N]` into `words [1, words, N]` fp32.

    Ignored tokens get zeros.
    """
    words = words[0].zero_()
    active = labels != constants.ignore_index
    logits = [student] if teacher is None else [student, teacher]
    for tokens, rows, scratch in _blocks(logits, constants):
        if not active[tokens].any():
            continue
        out = words[:, tokens]
        if constants.valid == 0:
            out[M_S], out[S_Y] = -INF, math.nan
            if teacher is not None:
                out[M_T], out[T_Y] = -INF, math.nan
            continue
        column, owned = _label_column(labels[tokens], constants)
        s = rows[0]
        out[M_S] = s.amax(-1).flatten()
        out[S_Y] = _pick(s, column).masked_fill(~owned, math.nan)
        shifted_s = torch.sub(s, finite(out[M_S]).view(*s.shape[:-1], 1), out=scratch[0])
        if teacher is not None:
            t = rows[1]
            top, arg = t.max(-1)
            out[M_T] = top.flatten()
            out[ARG] = (arg + constants.vocab_start).flatten().float()
            out[S_A] = _pick(s, arg.flatten())
            out[T_Y] = _pick(t, column).masked_fill(~owned, math.nan)
            shifted_t = torch.sub(t, finite(out[M_T]).view(*t.shape[:-1], 1), out=scratch[1])
            if constants.separate_ce:
                weight = torch.exp(shifted_t, out=scratch[2])
                out[L_T1] = weight.sum(-1).flatten()
                out[CROSS_1] = _cross(torch.sub(shifted_t, shifted_s), weight)
            weight = torch.mul(shifted_t, 1.0 / constants.temperature, out=scratch[2]).exp_()
            out[L_T] = weight.sum(-1).flatten()
            out[CROSS] = _cross(shifted_t.sub_(shifted_s), weight)
        if constants.separate_ce:
            out[L_1] = torch.exp(shifted_s, out=scratch[1]).sum(-1).flatten()
            shifted_s.mul_(1.0 / constants.temperature)
        out[L_S] = shifted_s.exp_().sum(-1).flatten()


def _cross(difference: Tensor, weight: Tensor) -> Tensor:
    """sum weight * difference of each row, `[rows]`, written over `difference`."""
    product = difference.mul_(weight)
    cross = product.sum(-1)
    if not cross.isfinite().all():  # a logit of -inf: 0 * inf must count as 0
        cross = product.masked_fill_(weight == 0, 0).sum(-1)
    return cross.flatten()


def combine(
    shards: Tensor, record: Tensor, labels: Tensor, constants: LossConstants, with_details: bool
) -> dict[str, Tensor]:
    """Per-token results from the words of all shards `[shards, words, N]`; writes `record` (may be `shards[0]`).

    Keys: `loss`; with details `ce`, and with a teacher `kl`, `kl_base`, `p_argmax`, `p_label`, `swapped`; each `[N]`,
    zero where ignored.
    """
    tau = constants.temperature
    m_s, scale_s, moved_s = common_maximum(shards[:, M_S])
    l_s = (shards[:, L_S] * (scale_s / tau).exp()).sum(0)
    l_1 = (shards[:, L_1] * scale_s.exp()).sum(0) if constants.separate_ce else l_s
    s_y = owned_value(shards[:, S_Y])
    ce = l_1.log() - (s_y - m_s)
    loss = weighted(ce, constants.ce_weight)
    results = {"ce": ce}
    if constants.has_teacher:
        m_t, scale_t, moved_t = common_maximum(shards[:, M_T])
        moved = moved_t - moved_s
        l_t, cross = _common_sums(shards[:, L_T], shards[:, CROSS], (scale_t / tau).exp(), moved)
        arg = torch.where(shards[:, M_T] == m_t, shards[:, ARG], INF).amin(0)
        s_a = torch.where((shards[:, M_T] == m_t) & (shards[:, ARG] == arg), shards[:, S_A], 0.0).sum(0)
        p_y = ((owned_value(shards[:, T_Y]) - m_t) / tau).exp() / l_t
        same = arg == labels
        base = cross / (tau * l_t) - l_t.log() + l_s.log()
        log_q_y = (s_y - m_s) / tau - l_s.log()
        p_a = 1.0 / l_t
        keep, new_a, new_y = edited_target(p_a, p_y, same, constants)
        if constants.target == "plain":
            kl = base
        elif constants.target == "swap":
            # With either logit at -inf the target has mass where the student has none.
            empty = (s_a == -INF) | (s_y == -INF)
            kl = base + torch.where(empty, INF, (p_a - p_y) * (s_a - s_y) / tau)
        else:
            assert constants.target == "mft"
            kl = _mixed_divergence(base, p_y, keep, new_y, log_q_y)
        loss = loss + weighted(kl, constants.kd_weight)
        if constants.separate_ce:
            l_t1, cross_1 = _common_sums(shards[:, L_T1], shards[:, CROSS_1], scale_t.exp(), moved)
            base = cross_1 / l_t1 - l_t1.log() + l_1.log()
        results |= {"kl": kl, "kl_base": base, "p_argmax": p_a, "p_label": p_y, "swapped": ~same}
        record[M_T], record[L_T], record[ARG] = m_t, l_t, arg
        record[KEEP], record[NEW_A], record[NEW_Y] = keep, new_a, new_y
    record[M_S], record[L_S] = m_s, l_s
    if constants.separate_ce:
        record[L_1] = l_1
    results = results | {"loss": loss} if with_details else {"loss": loss}
    ignored = labels == constants.ignore_index
    return {name: value.masked_fill(ignored, 0) for name, value in results.items()}


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
    tau = constants.temperature
    upstream = upstream.masked_fill(labels == constants.ignore_index, 0)
    g_ce, g_kd = upstream * constants.ce_weight, upstream * constants.kd_weight / tau
    logits = [student, out] if teacher is None else [student, out, teacher]
    for tokens, rows, scratch in _blocks(logits, constants):
        s, ds = rows[0], rows[1]
        as_column = (*s.shape[:-1], 1)
        if not upstream[tokens].any():
            ds.zero_()
            continue
        m_s, l_s = (record[word, tokens].view(as_column) for word in (M_S, L_S))
        ce, kd = g_ce[tokens].view(as_column), g_kd[tokens].view(as_column)
        column, owned = _label_column(labels[tokens], constants)
        grad = torch.sub(s, m_s, out=scratch[0])
        if constants.separate_ce:
            q_1 = torch.exp(grad, out=scratch[1])
            grad.mul_(1.0 / tau).exp_().mul_(kd / l_s)
            grad.addcmul_(q_1, ce / record[L_1, tokens].view(as_column))
        else:
            grad.exp_().mul_((ce + kd) / l_s)
        if teacher is not None:
            p = _target(rows[2], column, owned, record[:, tokens], scratch[1], constants)
            grad.addcmul_(p.masked_fill_(kd == 0, 0) if (kd == 0).any() else p, kd, value=-1)
        own = owned.nonzero().squeeze(1)
        grad.flatten(0, 1)[own, column[own]] -= g_ce[tokens][own]
        ds.copy_(grad.masked_fill_((upstream[tokens] == 0).view(as_column), 0))
    out[..., constants.valid :].zero_()


def _target(t: Tensor, column: Tensor, owned: Tensor, record: Tensor, out: Tensor, constants: LossConstants) -> Tensor:
    """Probabilities of the teacher's target p' in this shard, `[a, b, valid]`, written into `out`."""
    as_column = (*t.shape[:-1], 1)
    target = torch.sub(t, record[M_T].view(as_column), out=out)
    if constants.temperature != 1.0:
        target.mul_(1.0 / constants.temperature)
    target.exp_().mul_((record[KEEP] / record[L_T]).view(as_column))
    flat = target.flatten(0, 1)
    arg_column = record[ARG] - constants.vocab_start
    own_arg = ((arg_column >= 0) & (arg_column < constants.valid)).nonzero().squeeze(1)
    flat[own_arg, arg_column[own_arg].long()] = record[NEW_A, own_arg]
    own = owned.nonzero().squeeze(1)
    flat[own, column[own]] = record[NEW_Y, own]
    return target


def edited_target(p_a: Tensor, p_y: Tensor, same: Tensor, constants: LossConstants) -> tuple[Tensor, Tensor, Tensor]:
    """(KEEP, NEW_A, NEW_Y) from the teacher's probabilities at its argmax and at the label; `same`: these are one."""
    keep = torch.ones_like(p_a)
    if constants.target == "plain":
        return keep, p_a, p_y
    if constants.target == "swap":
        return keep, p_y, p_a
    assert constants.target == "mft"
    margin = constants.margin
    raise_label = torch.where(margin >= 1 - p_y, 0.0, 1 - margin / (1 - p_y))
    overtake = (1 - margin) / (1 + p_a - p_y)  # 1 - b; as a difference it could round below 0
    keep = torch.where(same, raise_label, overtake)
    return keep, keep * p_a, keep * p_y + (1 - keep)


def _mixed_divergence(base: Tensor, p_y: Tensor, keep: Tensor, new_y: Tensor, log_q_y: Tensor) -> Tensor:
    """KL(p' || q) for p' = keep * p + (1 - keep) * onehot(label), from base = KL(p || q)."""
    label_part = torch.xlogy(p_y, p_y) - (p_y * log_q_y).masked_fill(p_y == 0, 0)
    others = keep * (base - label_part) + (1 - p_y) * torch.xlogy(keep, keep)
    return others.masked_fill((keep == 0) | (log_q_y == -INF), 0) + new_y * (new_y.log() - log_q_y)


def _blocks(logits: list[Tensor], constants: LossConstants) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """(token numbers, the block of each of the logits `[a, b, valid]`, three fp32 scratch buffers of that shape)."""
    grids = [grid[..., : constants.valid] for grid in as_grids(*logits)]
    num_outer, num_inner, width = grids[0].shape
    num_rows = max(1, BLOCK_ELEMENTS // max(1, width))
    size = min(num_rows, num_outer * num_inner) * width
    buffers = torch.empty(3, size, device=grids[0].device, dtype=torch.float32)
    for outer, inner, tokens in blocks(num_outer, num_inner, num_rows):
        rows = [grid[outer, inner] for grid in grids]
        yield tokens, rows, [buffer[: rows[0].numel()].view(rows[0].shape) for buffer in buffers]


def _label_column(labels: Tensor, constants: LossConstants) -> tuple[Tensor, Tensor]:
    """(column of the label in this shard, 0 where it is not there; whether it is there)."""
    column = labels - constants.vocab_start
    owned = (column >= 0) & (column < constants.valid) & (labels != constants.ignore_index)
    return column.masked_fill(~owned, 0), owned


def _pick(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(-1, column.view(*logits.shape[:-1], 1)).flatten().float()


def finite(maximum: Tensor) -> Tensor:
    """The maximum to subtract: a row of -inf has nothing to subtract, and -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -INF, 0)


def common_maximum(maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[shards, N]` -> (maximum `[N]`, log of each shard's scale, how far each shard's subtracted maximum moves)."""
    top = maxima.amax(0)
    moved = (maxima - top).masked_fill(maxima == -INF, 0)
    return top, moved.masked_fill(maxima == -INF, -INF), moved


def _common_sums(l_t: Tensor, cross: Tensor, scale: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """The shards' sums `[shards, N]` of the teacher's mass and of the cross term, under the common maxima: `[N]`."""
    mass = l_t * scale
    return mass.sum(0), (scale * (cross + l_t * moved)).masked_fill(mass == 0, 0).sum(0)


def owned_value(values: Tensor) -> Tensor:
    """The value of the shard that has the label (the others hold NaN), `[shards, N]` -> `[N]`; NaN if none has."""
    found = values[0]
    for value in values[1:]:
        found = torch.where(found.isnan(), value, found)
    return found


def weighted(value: Tensor, weight: float | Tensor) -> Tensor:
    """weight * value, and exactly 0 where the weight is 0, whatever the value."""
    if isinstance(weight, Tensor):
        return (weight * value).masked_fill(weight == 0, 0)
    return weight * value if weight else torch.zeros_like(value)
