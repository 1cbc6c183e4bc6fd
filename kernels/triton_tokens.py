"""The device code that joins the shards' words: one lane a token, the loss and the record that the gradient needs.

Words and record are described in constants.py, the algebra in README.md.
"""

import triton
import triton.language as tl

from megatron_mixcpt.kernels.triton_rows import (
    ARG,
    CROSS,
    CROSS_1,
    INF,
    KEEP,
    L_1,
    L_S,
    L_T,
    L_T1,
    LOG2_E,
    M_S,
    M_T,
    NAN,
    NEW_A,
    NEW_Y,
    S_A,
    S_Y,
    T_Y,
    shrink,
    weight_of,
)


@triton.jit
def _target(p_a, p_y, same, margin, TARGET: tl.constexpr):
    """(KEEP, NEW_A, NEW_Y) from the teacher's probabilities at its argmax and at the label."""
    if TARGET == "plain":
        return p_a * 0 + 1, p_a, p_y
    elif TARGET == "swap":
        return p_a * 0 + 1, p_y, p_a
    else:
        tl.static_assert(TARGET == "mft")
        raised = tl.where(margin >= 1 - p_y, 0.0, 1 - margin / (1 - p_y))
        overtake = (1 - margin) / (1 + p_a - p_y)  # 1 - b; as a difference it could round below 0
        keep = tl.where(same, raised, overtake)
        return keep, keep * p_a, keep * p_y + (1 - keep)


@triton.jit
def _times_log(x):
    return tl.where(x == 0, 0.0, x * tl.log(x))


@triton.jit
def _divergence(base, p_a, p_y, keep, new_y, s_a, s_y, log_q_y, inverse_tau, TARGET: tl.constexpr):
    """KL(p' || q) from base = KL(p || q)."""
    if TARGET == "plain":
        return base
    elif TARGET == "swap":
        # With either logit at -inf the target has mass where the student has none.
        return base + tl.where((s_a == -INF) | (s_y == -INF), INF, (p_a - p_y) * (s_a - s_y) * inverse_tau)
    else:
        tl.static_assert(TARGET == "mft")
        label_part = _times_log(p_y) - tl.where(p_y == 0, 0.0, p_y * log_q_y)
        others = keep * (base - label_part) + (1 - p_y) * _times_log(keep)
        others = tl.where((keep == 0) | (log_q_y == -INF), 0.0, others)
        return others + new_y * (tl.log(new_y) - log_q_y)


@triton.jit
def combine_kernel(
    shards,  # [num_shards, words, N] fp32
    record,  # [words, N] fp32, may be shards[0]
    labels,  # [N] int64
    ce_weight, kd_weight,  # fp32 numbers or [N]
    loss, ce_out, kl_out, kl_base_out, p_argmax_out, p_label_out, swapped_out,  # [N] fp32, the last bool
    num_tokens, num_shards, shard_stride, word_stride, record_stride, ignore_index,
    inverse_tau, margin,
    TARGET: tl.constexpr, HAS_TEACHER: tl.constexpr, SEPARATE: tl.constexpr, PER_TOKEN: tl.constexpr,
    DETAILS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and record of `BLOCK` tokens from the words of all shards."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    label = tl.load(labels + token, mask=mask, other=0)
    ignored = label == ignore_index
    m_s = tl.full([BLOCK], -INF, tl.float32)
    m_t = tl.full([BLOCK], -INF, tl.float32)
    word = shards + token
    for _shard in range(num_shards):  # not `_`: until triton 3.4 all its uses had to be of one type
        m_s = tl.maximum(m_s, tl.load(word + M_S * word_stride, mask=mask, other=0.0))
        if HAS_TEACHER:
            m_t = tl.maximum(m_t, tl.load(word + M_T * word_stride, mask=mask, other=0.0))
        word += shard_stride
    zeros = tl.zeros([BLOCK], tl.float32)
    l_s = zeros
    l_1 = zeros
    l_t = zeros
    cross = zeros
    l_t1 = zeros
    cross_1 = zeros
    s_a = zeros
    s_y = zeros + NAN
    t_y = zeros + NAN
    arg = zeros + INF
    scale = inverse_tau * LOG2_E
    word = shards + token
    for _shard in range(num_shards):
        shard_m_s = tl.load(word + M_S * word_stride, mask=mask, other=0.0)
        beta, moved_s = shrink(shard_m_s, m_s, scale)
        l_s += beta * tl.load(word + L_S * word_stride, mask=mask, other=0.0)
        s_y = tl.where(s_y == s_y, s_y, tl.load(word + S_Y * word_stride, mask=mask, other=0.0))
        if SEPARATE:
            beta_1, _moved = shrink(shard_m_s, m_s, LOG2_E)
            l_1 += beta_1 * tl.load(word + L_1 * word_stride, mask=mask, other=0.0)
        if HAS_TEACHER:
            shard_m_t = tl.load(word + M_T * word_stride, mask=mask, other=0.0)
            alpha, moved_t = shrink(shard_m_t, m_t, scale)
            shard_l_t = tl.load(word + L_T * word_stride, mask=mask, other=0.0)
            l_t += alpha * shard_l_t
            shard_cross = tl.load(word + CROSS * word_stride, mask=mask, other=0.0) + shard_l_t * (moved_t - moved_s)
            cross += tl.where(alpha * shard_l_t == 0, 0.0, alpha * shard_cross)
            if SEPARATE:
                alpha_1, _moved = shrink(shard_m_t, m_t, LOG2_E)
                shard_l_t = tl.load(word + L_T1 * word_stride, mask=mask, other=0.0)
                l_t1 += alpha_1 * shard_l_t
                shard_cross = tl.load(word + CROSS_1 * word_stride, mask=mask, other=0.0)
                shard_cross += shard_l_t * (moved_t - moved_s)
                cross_1 += tl.where(alpha_1 * shard_l_t == 0, 0.0, alpha_1 * shard_cross)
            t_y = tl.where(t_y == t_y, t_y, tl.load(word + T_Y * word_stride, mask=mask, other=0.0))
            shard_arg = tl.load(word + ARG * word_stride, mask=mask, other=0.0)
            better = (shard_m_t == m_t) & (shard_arg < arg)  # the lowest id among the shards that have the maximum
            arg = tl.where(better, shard_arg, arg)
            s_a = tl.where(better, tl.load(word + S_A * word_stride, mask=mask, other=0.0), s_a)
        word += shard_stride
    if not SEPARATE:
        l_1 = l_s
    ce = tl.log(l_1) - (s_y - m_s)
    weight = weight_of(ce_weight, token, mask, PER_TOKEN)
    total = tl.where(weight == 0, 0.0, weight * ce)
    out = record + token
    if HAS_TEACHER:
        same = arg == label.to(tl.float32)
        p_a = 1.0 / l_t
        p_y = tl.exp2((t_y - m_t) * scale) * p_a
        keep, new_a, new_y = _target(p_a, p_y, same, margin, TARGET)
        base = cross * inverse_tau * p_a - tl.log(l_t) + tl.log(l_s)
        log_q_y = (s_y - m_s) * inverse_tau - tl.log(l_s)
        kl = _divergence(base, p_a, p_y, keep, new_y, s_a, s_y, log_q_y, inverse_tau, TARGET)
        weight = weight_of(kd_weight, token, mask, PER_TOKEN)
        total += tl.where(weight == 0, 0.0, weight * kl)
        tl.store(out + M_T * record_stride, m_t, mask=mask)
        tl.store(out + L_T * record_stride, l_t, mask=mask)
        tl.store(out + ARG * record_stride, arg, mask=mask)
        tl.store(out + KEEP * record_stride, keep, mask=mask)
        tl.store(out + NEW_A * record_stride, new_a, mask=mask)
        tl.store(out + NEW_Y * record_stride, new_y, mask=mask)
        if DETAILS:
            if SEPARATE:
                base = cross_1 / l_t1 - tl.log(l_t1) + tl.log(l_1)
            tl.store(kl_base_out + token, tl.where(ignored, 0.0, base), mask=mask)
            tl.store(kl_out + token, tl.where(ignored, 0.0, kl), mask=mask)
            tl.store(p_argmax_out + token, tl.where(ignored, 0.0, p_a), mask=mask)
            tl.store(p_label_out + token, tl.where(ignored, 0.0, p_y), mask=mask)
            tl.store(swapped_out + token, (arg != label.to(tl.float32)) & (label != ignore_index), mask=mask)
    tl.store(out + M_S * record_stride, m_s, mask=mask)
    tl.store(out + L_S * record_stride, l_s, mask=mask)
    if SEPARATE:
        tl.store(out + L_1 * record_stride, l_1, mask=mask)
    if DETAILS:
        tl.store(ce_out + token, tl.where(ignored, 0.0, ce), mask=mask)
    tl.store(loss + token, tl.where(ignored, 0.0, total), mask=mask)
