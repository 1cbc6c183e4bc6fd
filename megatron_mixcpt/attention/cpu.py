"""Attention over packed documents on the CPU: PyTorch's flash kernel, on one document or on many of them in one call.

Long documents are met where they lie. Short ones, for which a call would cost more than what it computes, are gathered
into batches of similar length; how many of them, and of which lengths, follows from the costs. The padding of such a
batch is on the right, where causal attention does not look, so that no mask is needed.

The kernel is called below autograd: what slices cost there in backward (a zeroed tensor of whole rows for every one) is
not paid, and a query whose keys come in two parts can have its results merged by the logarithms of their sums, as flash
attention does between blocks (https://arxiv.org/abs/2205.14135).

Shapes: s queries of a row on this rank, S keys of a row, b rows, n query heads, g key/value heads, d head dimension; G
spans of a call, L their tokens (padded). In and out `[s, b, n, d]`; buffers of results are flat, `[s * b + 1, n, d]`,
with a spare last row that takes the padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mixcpt.attention.context import summed_part, whole_rows
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.attention.groups import Call, Slice, plan_calls

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, scale: float
) -> Tensor:
    """query `[s, b, n, d]`, key and value `[s, b, g, d]`, any float type -> `[s, b, n, d]`."""
    heads = query.shape[2] * query.shape[3] / 64
    calls = documents.plan(("cpu", window, heads), lambda each: plan_calls(each, window, heads))
    return _ByCalls.apply(query, key, value, documents, calls, scale)


class _ByCalls(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, calls: list[Call], scale: float
    ) -> Tensor:
        query, key, value = own = tuple(_even(x) for x in (query, key, value))
        key, value = _of_whole_rows(key, value, documents)
        tokens = query.shape[0] * query.shape[1]
        out = query.new_empty(tokens + 1, *query.shape[2:])
        sums = out.new_empty(out.shape[:2], dtype=torch.promote_types(out.dtype, torch.float32))  # log of each
        for call in calls:
            q, k, v = _inputs(call, query, key, value)
            part, logs = _forward(q, k, v, 0.0, call.causal, attn_mask=_mask(call, q), scale=scale)
            part, logs = part.transpose(1, 2), logs.transpose(1, 2)  # [G, L, n, d], [G, L, n]
            if isinstance(call, Slice) and call.merges:
                part, logs = _merged(call.place(out), call.place(sums), part, logs)
            call.put_queries(out, part)
            call.put_queries(sums, logs)
        result = out[:-1].view(query.shape)
        # Keys of other ranks are gathered again in backward: kept, they would not fall with the number of ranks.
        ctx.save_for_backward(*own, result, sums[:-1].view(query.shape[:3]))
        ctx.documents, ctx.calls, ctx.scale = documents, calls, scale
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, sums = ctx.saved_tensors
        key, value = _of_whole_rows(key, value, ctx.documents)
        upstream = _even(upstream)
        grad_query = query.new_zeros(query.shape[0] * query.shape[1] + 1, *query.shape[2:])
        grad_key, grad_value = (x.new_zeros(x.shape[0] * x.shape[1] + 1, *x.shape[2:]) for x in (key, value))
        for call in ctx.calls:
            q, k, v = _inputs(call, query, key, value)
            given = call.clear_padding(call.take_queries(upstream)).transpose(1, 2)
            made, logs = (call.take_queries(x).transpose(1, 2) for x in (out, sums))
            mask = _mask(call, q)
            parts = _backward(
                given, q, k, v, made, logs.contiguous(), 0.0, call.causal, attn_mask=mask, scale=ctx.scale
            )
            of_query, of_key, of_value = (part.transpose(1, 2) for part in parts)
            call.add_queries(grad_query, of_query)
            call.add_keys(grad_key, of_key)
            call.add_keys(grad_value, of_value)
        grads = [grad[:-1].view(x.shape) for grad, x in zip((grad_query, grad_key, grad_value), (query, key, value))]
        if ctx.documents.cut is not None:
            grads[1:] = summed_part(torch.stack(grads[1:], dim=2), ctx.documents).unbind(2)
        return (*grads, None, None, None)


def _of_whole_rows(key: Tensor, value: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    if documents.cut is None:
        return key, value
    key, value = whole_rows(torch.stack([key, value], dim=2), documents).unbind(2)
    return _even(key), _even(value)


def _even(x: Tensor) -> Tensor:
    """x `[s, b, n, d]` in memory that the kernel takes and that `[s * b, n, d]` is a view of."""
    return x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def _inputs(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """As the kernel takes them: `[G, n, L, d]` and two of `[G, g, L', d]`."""
    return tuple(x.transpose(1, 2) for x in (call.take_queries(query), call.take_keys(key), call.take_keys(value)))


def _mask(call: Call, query: Tensor) -> Tensor | None:
    """Additive `[1, 1, L, keys]` of a call that a window cuts; in proportion to the window, not to the row."""
    if isinstance(call, Slice) or call.window is None:
        return None
    queries, keys = (len(index) // call.size for index in (call.queries_from, call.keys_from))
    distance = torch.arange(call.before, call.before + queries).unsqueeze(1) - torch.arange(keys)
    outside = (distance < 0) | (distance >= call.window)
    return torch.zeros(outside.shape, dtype=query.dtype).masked_fill_(outside, -torch.inf)[None, None]


def _merged(out: Tensor, sums: Tensor, part: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """What queries get from two sets of keys: out `[L, n, d]` and sums `[L, n]` with part and logs `[1, L, n(, d)]`."""
    total = torch.logaddexp(sums, logs)
    shares = ((x - total).exp().unsqueeze(-1) for x in (sums, logs))
    return sum(share * x for share, x in zip(shares, (out, part))).to(out.dtype), total  # type: ignore[union-attr]
