"""Logits `[..., v]` of any layout as a grid of rows `[A, B, v]`, without copying them.

Trainers hand over `[s, b, v/tp]` views of `[b, s, v]` buffers, slices of padded buffers, or plain `[N, v]`. Each is
a grid with two strides; token `n` in row-major order of the leading dimensions is grid row `(n // B, n % B)`.
"""

from collections.abc import Iterator

from torch import Tensor


def as_grids(*tensors: Tensor) -> list[Tensor]:
    """The tensors, equal in their leading dimensions, as views `[A, B, v_i]` on one common grid."""
    lead = tensors[0].shape[:-1]
    if all(_flattens(tensor) for tensor in tensors):
        return [tensor.view(1, lead.numel(), tensor.shape[-1]) for tensor in tensors]
    assert len(lead) == 2, "is_grid() was not asked"
    return list(tensors)


def is_grid(tensor: Tensor) -> bool:
    """Whether `as_grids` takes the tensor as it is: adjacent columns and at most two independent row strides."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    return tensor.dim() == 3 or _flattens(tensor)


def _flattens(tensor: Tensor) -> bool:
    """Whether one stride reaches all rows in row-major order."""
    expected = None
    for size, stride in reversed(list(zip(tensor.shape[:-1], tensor.stride()[:-1]))):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return tensor.numel() == 0
        expected = stride * size
    return True


def blocks(num_outer: int, num_inner: int, num_rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a grid into blocks of about `num_rows` rows: (outer slice, inner slice, slice of flat token numbers)."""
    if num_outer * num_inner == 0:
        return
    outer_step, inner_step = max(1, num_rows // num_inner), min(num_inner, max(1, num_rows))
    for outer in range(0, num_outer, outer_step):
        outer_end = min(outer + outer_step, num_outer)
        for inner in range(0, num_inner, inner_step):
            inner_end = min(inner + inner_step, num_inner)
            tokens = slice(outer * num_inner + inner, (outer_end - 1) * num_inner + inner_end)
            yield slice(outer, outer_end), slice(inner, inner_end), tokens
