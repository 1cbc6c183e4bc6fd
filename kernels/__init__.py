"""Logit Swap Self-Distillation losses over tensor-parallel vocabulary shards.

Needs torch alone; the fused kernels are used where triton is installed and the tensors are on a GPU.
The algebra, the byte count and how to use the losses in other trainers: README.md in this folder.
"""

from megatron_mixcpt.kernels.lssd import lssd_loss, lssd_loss_reference

__all__ = ["lssd_loss", "lssd_loss_reference"]
