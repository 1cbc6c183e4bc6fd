"""Root-mean-square norms that also work under tensor and sequence parallelism and need neither TE nor Apex.

Shapes: s sequence, b batch, n heads, d head dimension; n/tp and s/tp under tensor and sequence parallelism.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_mixcpt.adapters.layers import AdaptableRowLinear


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (https://arxiv.org/abs/1910.07467).

    x: [..., hidden_size] in any float type; y has x's shape and type. With `layernorm_zero_centered_gamma` it is
    multiplied with 1 + weight, in fp32 too (Gemma). The signature is the one megatron-core builds norms with.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Each rank sees its part of the sequence only: finalize_model_grads sums gradients marked so over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_one:
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class HeadsNorm(nn.Module):
    """RMSNorm of all heads' queries, or keys, together (OLMo 2, https://arxiv.org/abs/2501.00656).

    x: `[s, b, n/tp, d]`, the heads of this rank; the sum of squares is taken over those of all ranks. Each rank has the
    weights of its heads.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-5) -> None:
        """`hidden_size`: d; `heads`: n, which the tensor-parallel size divides."""
        super().__init__()
        self.eps, self.size = eps, heads * hidden_size
        local = self.size // parallel_state.get_tensor_model_parallel_world_size()
        # Named unlike the norms that are the same on every rank (see layout.py).
        self.weight_of_heads = nn.Parameter(
            torch.ones(local, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.weight_of_heads, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum((-2, -1), keepdim=True)
        # Every rank's output depends on every rank's squares: summed forward, and in backward.
        total = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        y = x.float() * torch.rsqrt(total / self.size + self.eps)
        return (y * self.weight_of_heads.view(x.shape[-2:])).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's modules."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight_of_heads": 0}, sharded_offsets)


class NormedRowLinear(AdaptableRowLinear):
    """The row-parallel layer at the end of attention or MLP, and a norm of what comes out, adapter included."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias
