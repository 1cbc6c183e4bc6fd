"""The few collectives of the losses. None is differentiated: each backward says itself what has to be communicated."""

import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

# The one-tensor collectives were renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size_of(group: Group | None) -> int:
    """Number of ranks; None is a group of one."""
    return 1 if group is None else dist.get_world_size(group)


def all_gather(tensor: Tensor, group: Group | None) -> Tensor:
    """`[n, ...]` of every rank, joined in rank order: `[tp * n, ...]`."""
    if size_of(group) == 1:
        return tensor
    joined = tensor.new_empty(size_of(group) * tensor.shape[0], *tensor.shape[1:])
    _all_gather(joined, tensor.contiguous(), group=group)
    return joined


def reduce_scatter(tensor: Tensor, group: Group | None) -> Tensor:
    """This rank's `[n, ...]` of the sum over ranks of `[tp * n, ...]`."""
    if size_of(group) == 1:
        return tensor
    part = tensor.new_empty(tensor.shape[0] // size_of(group), *tensor.shape[1:])
    _reduce_scatter(part, tensor.contiguous(), group=group)
    return part


def all_reduce(tensor: Tensor, group: Group | None) -> Tensor:
    """The sum over ranks, in place."""
    if size_of(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
