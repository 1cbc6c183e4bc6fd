"""Attention on `scaled_dot_product_attention`: causal, grouped queries, block-diagonal over packed documents.

Runs without Transformer Engine on CPU and GPU and never materialises scores where PyTorch has a fused kernel.

Shapes: s sequence, b batch, n query heads of this rank, g key/value heads of this rank, d head dimension.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

QUERY_BLOCK, MAX_QUERY_BLOCKS = 128, 8  # of causal_attention


def document_mask(doc_start: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions within, and attention limited to, the documents packed into each row.

    Args:
        doc_start: bool `[b, s]`, true at the first token of every document; a row's first token always starts one.

    Returns:
        position_ids int64 `[b, s]`, counting from 0 in each document, and a bool mask `[b, 1, s, s]`, true where
        query (third dimension) may attend to key (fourth), or None when every row is a single document, for which
        plain causal attention is the same and faster. Compute it on CPU tensors: it would wait for a GPU.
    """
    steps = torch.arange(doc_start.shape[1], device=doc_start.device)
    inner = doc_start.clone()
    inner[:, 0] = False
    if not inner.any():
        return steps.expand(doc_start.shape).contiguous(), None
    starts = torch.where(inner, steps, 0).cummax(dim=1).values  # [b, s] where the token's document begins
    mask = (starts.unsqueeze(2) == starts.unsqueeze(1)) & (steps.unsqueeze(1) >= steps)
    return steps - starts, mask.unsqueeze(1)


def window_mask(mask: Tensor | None, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """`mask` of `document_mask`, narrowed to a sliding window: a token sees itself and the `window` - 1 before it.

    Rows no longer than the window need nothing (Mistral, https://arxiv.org/abs/2310.06825).
    """
    if window is None or length <= window:
        return mask
    steps = torch.arange(length, device=device)
    distance = steps.unsqueeze(1) - steps
    near = (distance < window) & (distance >= 0)
    return near[None, None] if mask is None else mask & near


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention of many small heads: `[b, n, s, d]` each -> `[b, n, s, d]`; mask from `document_mask`.

    A masked kernel computes all scores, and with heads of a few channels they are what takes the time. Here blocks of
    queries meet the keys up to their own end, which leaves out almost half of them.
    """
    s = query.shape[2]
    # GPU kernels leave them out by themselves where there is no mask.
    if mask is None and (query.is_cuda or s <= QUERY_BLOCK):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    size = max(QUERY_BLOCK, -(-s // MAX_QUERY_BLOCKS))
    blocks = []
    for begin in range(0, s, size):
        end = min(begin + size, s)
        if mask is None:
            rows = torch.ones(end - begin, end, dtype=torch.bool, device=query.device).tril(begin)
        else:
            rows = mask[:, :, begin:end, :end]
        blocks.append(
            F.scaled_dot_product_attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], attn_mask=rows)
        )
    return torch.cat(blocks, dim=2)


class SDPAttention(MegatronModule):
    """The core attention of a megatron-core layer (softmax(q k^T / sqrt(d)) v)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(d)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """query `[s, b, n, d]`, key and value `[s, b, g, d]`, mask from `document_mask` -> `[s, b, n * d]`."""
        s, b, n, d = query.shape
        grouped = key.shape[2] != n
        if grouped and attention_mask is not None:
            # No fused kernel takes grouped heads together with a mask; repeated heads keep the fused path.
            key = key.repeat_interleave(n // key.shape[2], dim=2)
            value = value.repeat_interleave(n // value.shape[2], dim=2)
            grouped = False
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )  # [b, n, s, d]
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
