"""Causal attention within packed documents, with grouped queries and sliding windows, at the price of the documents.

No scores of whole rows exist anywhere: a GPU runs PyTorch's variable-length flash attention, the CPU its flash kernel
on groups of documents. Neither needs Transformer Engine.

Shapes: s tokens of a row (on this rank), b rows, n query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mixcpt.attention.context import gathered_rows
from megatron_mixcpt.attention.cpu import attention_on_cpu
from megatron_mixcpt.attention.documents import Documents

MULTIPLE = 8  # of the head dimension that flash kernels take
QUERY_BLOCK = 512  # of attention_in_blocks
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys that each query may see: those before it, in its document and the window.

    Args:
        query: `[s, b, n, d]`; key, value: `[s, b, g, d]`, where g divides n. With context parallelism those of this
            rank's tokens, and collective.
        window: a token sees itself and the `window` - 1 before it (Mistral, https://arxiv.org/abs/2310.06825).
        scale: None is 1 / sqrt(d).

    Returns `[s, b, n, d]`.
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if window is not None and documents.max_keys <= window:
        window = None
    if documents.are_rows and window is None:
        if query.is_cuda and query.dtype not in FLASH_DTYPES and key.shape[2] != query.shape[2]:
            # Of the kernels without a square of scores fp32 has one, which knows no groups. No GPU has confirmed it.
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        return out.permute(2, 0, 1, 3)
    if query.is_cuda and documents.cut is not None:
        key, value = gathered_rows(torch.stack([key, value], dim=2), documents).unbind(2)
    if query.is_cuda and query.dtype in FLASH_DTYPES:
        return attention_on_cuda(query, key, value, documents, window, scale)
    if query.is_cuda:
        return attention_in_blocks(query, key, value, documents, window, scale)
    return attention_on_cpu(query, key, value, documents, window, scale)


def attention_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, scale: float
) -> Tensor:
    """`attention` by `torch.nn.attention.varlen`, in half precision. No GPU has confirmed it yet."""
    from torch.nn.attention.varlen import varlen_attn

    s, b, n, d = query.shape
    options: dict[str, Any] = {}
    if key.shape[2] != n and _takes_groups():
        options["enable_gqa"] = True
    elif key.shape[2] != n:
        key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
    if padding := -d % MULTIPLE:  # of nothing it would copy too
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    if documents.key_order is not None:
        key, value = (x.index_select(0, documents.key_order) for x in (key, value))
    out = varlen_attn(
        query,
        key,
        value,
        documents.cu_queries,
        documents.cu_keys,
        documents.max_queries,
        documents.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    assert isinstance(out, Tensor)  # [b * s, n, d]
    return out[..., :d].unflatten(0, (b, s)).transpose(0, 1)


@cache
def _takes_groups() -> bool:
    """torch 2.11 has no `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention` in plain PyTorch, on any device and in any type: for fp32 on a GPU, which no flash kernel takes, and
    for scores x that become softcap tanh(x / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118).

    Blocks of queries meet their keys, so that memory grows with the row and not with its square.
    """
    n = query.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (key, value))
    parts = []
    for row, first, queries, first_key, keys in documents.spans.tolist():
        for begin in range(0, queries, QUERY_BLOCK):
            count = min(QUERY_BLOCK, queries - begin)
            end = keys - queries + begin + count  # of the keys, counted within the span
            start = 0 if window is None else max(0, end - count - window + 1)
            q = query[first + begin : first + begin + count, row].transpose(0, 1)  # [n, L, d]
            k, v = (x[first_key + start : first_key + end, row].transpose(0, 1) for x in (key, value))
            steps = torch.arange(end - start, device=query.device)
            distance = steps[-count:].unsqueeze(1) - steps
            near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            if softcap is None:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scale)
            else:
                scores = softcap * torch.tanh(scale / softcap * (q @ k.transpose(1, 2)).float())
                out = scores.masked_fill(~near, -torch.inf).softmax(-1).to(v.dtype) @ v
            parts.append(out.transpose(0, 1))
    # Spans are sorted by row and query.
    return torch.cat(parts).unflatten(0, (query.shape[1], query.shape[0])).transpose(0, 1)


class DocumentAttention(MegatronModule):
    """The core attention of a megatron-core layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        window: int | None = None,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        super().__init__(config=config)
        self.window, self.softmax_scale = window, softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Documents,
    ) -> Tensor:
        """query `[s, b, n, d]`, key and value `[s, b, g, d]` -> `[s, b, n * d]`."""
        value = value.contiguous()  # a part of the layer's projection, all of which would be kept for backward
        out = attention(query, key, value, packed_seq_params, window=self.window, scale=self.softmax_scale)
        return out.flatten(2)
