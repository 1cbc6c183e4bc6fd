"""Logit Swap Self-Distillation losses over tensor-parallel vocabulary shards.

Needs torch alone; the fused kernels are used where triton is installed and the tensors are on a GPU.
The algebra, the byte count and how to use the losses in other trainers: README.md in this folder.
"""

from megatron_mixcpt.kernels.linear import linear_lssd_loss
from megatron_mixcpt.kernels.lssd import lssd_loss, lssd_loss_reference
from megatron_mixcpt.kernels.topk import topk_lssd_loss

__all__ = ["linear_lssd_loss", "lssd_loss", "lssd_loss_reference", "topk_lssd_loss"]
