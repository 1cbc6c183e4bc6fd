"""The device code that reads logits: one program a row, or a part of one, for the sums and for the gradient.

Words and record are described in constants.py, the algebra in README.md. Tiles are read with vector loads wherever the
rows are 16-byte aligned: only a row's last, partial tile is masked. Row offsets are 64-bit. Nothing depends on the
vocabulary's size at compile time.
"""

import triton
import triton.language as tl

from megatron_mixcpt.kernels import constants

M_S: tl.constexpr = tl.constexpr(constants.M_S)
L_S: tl.constexpr = tl.constexpr(constants.L_S)
S_Y: tl.constexpr = tl.constexpr(constants.S_Y)
M_T: tl.constexpr = tl.constexpr(constants.M_T)
L_T: tl.constexpr = tl.constexpr(constants.L_T)
T_Y: tl.constexpr = tl.constexpr(constants.T_Y)
ARG: tl.constexpr = tl.constexpr(constants.ARG)
S_A: tl.constexpr = tl.constexpr(constants.S_A)
CROSS: tl.constexpr = tl.constexpr(constants.CROSS)
L_1: tl.constexpr = tl.constexpr(constants.L_1)
L_T1: tl.constexpr = tl.constexpr(constants.L_T1)
CROSS_1: tl.constexpr = tl.constexpr(constants.CROSS_1)
KEEP: tl.constexpr = tl.constexpr(constants.KEEP)
NEW_A: tl.constexpr = tl.constexpr(constants.NEW_A)
NEW_Y: tl.constexpr = tl.constexpr(constants.NEW_Y)
INF: tl.constexpr = tl.constexpr(float("inf"))
NAN: tl.constexpr = tl.constexpr(float("nan"))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(logits, row, num_inner, outer_stride, inner_stride):
    """Start of a row of the grid `[A, B, v]`."""
    return logits + (row // num_inner).to(tl.int64) * outer_stride + (row % num_inner).to(tl.int64) * inner_stride


@triton.jit
def _tile(row, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """`BLOCK` logits in fp32; -inf, which counts for nothing, beyond the end."""
    columns = start + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(row + columns, mask=columns < end, other=-INF).to(tl.float32)
    else:
        return tl.load(row + columns).to(tl.float32)


@triton.jit
def shrink(old, new, scale):
    """(factor on sums taken under the old maximum, how far their exponents move)."""
    moved = tl.where(old == -INF, 0.0, old - new)  # not -inf + inf, nor 0 * -inf
    return tl.where(old == -INF, 0.0, tl.exp2(moved * scale)), moved


@triton.jit
def _accumulate(
    s_row, t_row, start, end, scale, m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1,
    HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one tile into the running statistics; maxima are scalars, sums are kept per lane until the end."""
    s = _tile(s_row, start, end, BLOCK, MASKED)
    top_s = tl.max(s, 0)
    if HAS_TEACHER:
        t = _tile(t_row, start, end, BLOCK, MASKED)
        top_t = tl.max(t, 0)
        if (top_t > m_t) | (top_s > m_s):  # seldom, after a row's first tiles
            new_s = tl.maximum(m_s, top_s)
            new_t = tl.maximum(m_t, top_t)
            beta, moved_s = shrink(m_s, new_s, scale)
            alpha, moved_t = shrink(m_t, new_t, scale)
            cross = tl.where(alpha == 0, 0.0, alpha * (cross + l_t * (moved_t - moved_s)))
            l_t *= alpha
            l_s *= beta
            if SEPARATE:
                beta_1, _moved = shrink(m_s, new_s, LOG2_E)
                alpha_1, _moved = shrink(m_t, new_t, LOG2_E)
                cross_1 = tl.where(alpha_1 == 0, 0.0, alpha_1 * (cross_1 + l_t1 * (moved_t - moved_s)))
                l_t1 *= alpha_1
                l_1 *= beta_1
            first = tl.min(tl.where(t == top_t, start + tl.arange(0, BLOCK), 2147483647), 0)
            arg = tl.where(top_t > m_t, first, arg)
            m_s = new_s
            m_t = new_t
    else:
        if top_s > m_s:
            beta, _ = shrink(m_s, top_s, scale)
            l_s *= beta
            if SEPARATE:
                beta_1, _moved = shrink(m_s, top_s, LOG2_E)
                l_1 *= beta_1
            m_s = top_s
    s -= tl.where(m_s == -INF, 0.0, m_s)
    l_s += tl.exp2(s * scale)
    if SEPARATE:
        l_1 += tl.exp2(s * LOG2_E)
    if HAS_TEACHER:
        t -= tl.where(m_t == -INF, 0.0, m_t)
        weight = tl.exp2(t * scale)
        l_t += weight
        cross += tl.where(weight > 0, weight * (t - s), 0.0)  # not 0 * inf; a NaN shows in l_t
        if SEPARATE:
            weight = tl.exp2(t * LOG2_E)
            l_t1 += weight
            cross_1 += tl.where(weight > 0, weight * (t - s), 0.0)
    return m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1


@triton.jit
def stats_kernel(
    student, teacher,  # [A, B, v]
    labels,  # [N] int64
    words,  # [splits, words, N] fp32
    num_inner, s_outer, s_inner, t_outer, t_inner, split_stride, word_stride,
    vocab_start, valid, split_columns, ignore_index,
    scale,  # log2(e) / tau
    HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Words of one row, or of one of its splits, each of which is a small shard of its own."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    label = tl.load(labels + row)
    first = split * split_columns
    end = tl.minimum(first + split_columns, valid)
    end = tl.where((label == ignore_index) | (end < first), first, end)  # nothing to read
    s_row = _row(student, row, num_inner, s_outer, s_inner)
    t_row = _row(teacher, row, num_inner, t_outer, t_inner)
    m_s = -INF
    m_t = -INF
    arg = first
    l_s = tl.zeros([BLOCK], tl.float32)
    l_1 = l_s
    l_t = l_s
    cross = l_s
    l_t1 = l_s
    cross_1 = l_s
    whole = first + (end - first) // BLOCK * BLOCK
    for start in tl.range(first, whole, BLOCK, num_stages=STAGES):
        m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1 = _accumulate(
            s_row, t_row, start, end, scale, m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1,
            HAS_TEACHER, SEPARATE, BLOCK, False,
        )  # fmt: skip
    if whole < end:
        m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1 = _accumulate(
            s_row, t_row, whole, end, scale, m_s, l_s, l_1, m_t, l_t, arg, cross, l_t1, cross_1,
            HAS_TEACHER, SEPARATE, BLOCK, True,
        )  # fmt: skip
    out = words + split * split_stride + row
    column = label - vocab_start
    owned = (column >= first) & (column < end)
    tl.store(out + M_S * word_stride, m_s)
    tl.store(out + L_S * word_stride, tl.sum(l_s, 0))
    tl.store(out + S_Y * word_stride, tl.load(s_row + column, mask=owned, other=NAN).to(tl.float32))
    if SEPARATE:
        tl.store(out + L_1 * word_stride, tl.sum(l_1, 0))
    if HAS_TEACHER:
        tl.store(out + M_T * word_stride, m_t)
        tl.store(out + L_T * word_stride, tl.sum(l_t, 0))
        tl.store(out + T_Y * word_stride, tl.load(t_row + column, mask=owned, other=NAN).to(tl.float32))
        tl.store(out + ARG * word_stride, (vocab_start + arg).to(tl.float32))
        tl.store(out + S_A * word_stride, tl.load(s_row + arg, mask=first < end, other=0.0).to(tl.float32))
        tl.store(out + CROSS * word_stride, tl.sum(cross, 0))
        if SEPARATE:
            tl.store(out + L_T1 * word_stride, tl.sum(l_t1, 0))
            tl.store(out + CROSS_1 * word_stride, tl.sum(cross_1, 0))


@triton.jit
def weight_of(weight, token, mask, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return tl.load(weight + token, mask=mask)
    else:
        return weight


@triton.jit
def _store_gradient(
    s_row, t_row, out_row, start, valid, end, scale,
    m_s, student_factor, ce_factor, m_t, teacher_factor, arg_column, at_arg, label_column, at_label,
    HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile: read student and teacher, then write, so that `out` may be the teacher."""
    columns = start + tl.arange(0, BLOCK)
    s = _tile(s_row, start, valid, BLOCK, MASKED) - m_s
    grad = student_factor * tl.exp2(s * scale)
    if SEPARATE:
        grad += ce_factor * tl.exp2(s * LOG2_E)
    if HAS_TEACHER:
        t = _tile(t_row, start, valid, BLOCK, MASKED) - m_t
        pull = tl.where(columns == arg_column, at_arg, teacher_factor * tl.exp2(t * scale))
    else:
        pull = tl.zeros([BLOCK], tl.float32)
    grad -= tl.where(columns == label_column, at_label, pull)
    if MASKED:
        tl.store(out_row + columns, grad.to(out_row.dtype.element_ty), mask=columns < end)
    else:
        tl.store(out_row + columns, grad.to(out_row.dtype.element_ty))


@triton.jit
def _store_row(
    s_row, t_row, out_row, first, valid, end, scale,
    m_s, student_factor, ce_factor, m_t, teacher_factor, arg_column, at_arg, label_column, at_label,
    HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    whole = first + tl.maximum(tl.minimum(end, valid) - first, 0) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        _store_gradient(
            s_row, t_row, out_row, start, valid, end, scale,
            m_s, student_factor, ce_factor, m_t, teacher_factor, arg_column, at_arg, label_column, at_label,
            HAS_TEACHER, SEPARATE, BLOCK, False,
        )  # fmt: skip
    for start in range(whole, end, BLOCK):
        _store_gradient(
            s_row, t_row, out_row, start, valid, end, scale,
            m_s, student_factor, ce_factor, m_t, teacher_factor, arg_column, at_arg, label_column, at_label,
            HAS_TEACHER, SEPARATE, BLOCK, True,
        )  # fmt: skip


@triton.jit
def gradient_kernel(
    student, teacher, out,  # [A, B, v]; out may be the teacher
    labels,  # [N] int64
    record,  # [words, N] fp32
    upstream,  # [N] fp32
    ce_weight, kd_weight,  # fp32 numbers or [N]
    num_inner, s_outer, s_inner, t_outer, t_inner, out_outer, out_inner, record_stride,
    vocab_start, valid, width, split_columns, ignore_index,
    scale,  # log2(e) / tau
    inverse_tau,
    HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row, or of one of its splits, in the student's logits: zeros, unread, where none flows."""
    row = tl.program_id(0)
    first = tl.program_id(1) * split_columns
    end = tl.minimum(first + split_columns, width)
    label = tl.load(labels + row)
    flow = tl.load(upstream + row)
    s_row = _row(student, row, num_inner, s_outer, s_inner)
    out_row = _row(out, row, num_inner, out_outer, out_inner)
    ce = flow * weight_of(ce_weight, row, None, PER_TOKEN)
    kd = flow * weight_of(kd_weight, row, None, PER_TOKEN) * inverse_tau
    if (flow == 0) | (label == ignore_index) | ((ce == 0) & (kd == 0)):
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(out_row + columns, tl.zeros([BLOCK], out_row.dtype.element_ty), mask=columns < end)
    else:
        word = record + row
        m_s = tl.load(word + M_S * record_stride)
        l_s = tl.load(word + L_S * record_stride)
        if SEPARATE:
            student_factor = kd / l_s
            ce_factor = ce / tl.load(word + L_1 * record_stride)
        else:
            student_factor = (ce + kd) / l_s
            ce_factor = ce
        label_column = (label - vocab_start).to(tl.int32)  # may lie outside, and then meets no column
        if HAS_TEACHER:
            t_row = _row(teacher, row, num_inner, t_outer, t_inner)
            if kd != 0:
                m_t = tl.load(word + M_T * record_stride)
                arg = tl.load(word + ARG * record_stride)
                arg_column = arg.to(tl.int32) - vocab_start
                at_arg = kd * tl.load(word + NEW_A * record_stride)
                at_label = ce + kd * tl.load(word + NEW_Y * record_stride)
                teacher_factor = kd * tl.load(word + KEEP * record_stride) / tl.load(word + L_T * record_stride)
                _store_row(
                    s_row, t_row, out_row, first, valid, end, scale,
                    m_s, student_factor, ce_factor, m_t, teacher_factor, arg_column, at_arg, label_column, at_label,
                    True, SEPARATE, BLOCK,
                )  # fmt: skip
            else:
                _store_row(
                    s_row, t_row, out_row, first, valid, end, scale,
                    m_s, student_factor, ce_factor, m_s, kd, label_column, kd, label_column, ce,
                    False, SEPARATE, BLOCK,
                )  # fmt: skip
        else:
            _store_row(
                s_row, s_row, out_row, first, valid, end, scale,
                m_s, student_factor, ce_factor, m_s, kd, label_column, kd, label_column, ce,
                False, SEPARATE, BLOCK,
            )  # fmt: skip
