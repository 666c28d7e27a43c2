"""Dense tensors as flat memory: their elements fill it, in any order of the dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REORDERED_AT_ONCE = 2**24  # bytes of a gradient whose elements lie in another order than its parameter's


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of a dense tensor that is laid out like this one: its own if it is dense."""
    return torch.empty_like(tensor, device="meta").stride()


def is_dense(tensor: Tensor) -> bool:
    return strides(tensor) == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, whatever the order of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,))


def ordered_as(strides: Sequence[int], tensor: Tensor, exclusive: bool) -> tuple[Tensor, bool]:
    """The tensor with these strides, in its own memory if that is nobody else's or lies in this order; and whether what it
    has then is nobody else's."""
    if is_dense(tensor):
        ordered = tensor.as_strided(tensor.shape, strides)
        if all(size == 1 or own == wanted for size, own, wanted in zip(tensor.shape, tensor.stride(), strides)):
            return ordered, exclusive
        if exclusive:
            _reorder(ordered, tensor)
            return ordered, True
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor), True


def _reorder(target: Tensor, source: Tensor) -> None:
    """Copies from one order to the other in the same memory: parts of it that hold the same elements in both orders, experts'
    matrices say, one after the other."""
    if source.nbytes > REORDERED_AT_ONCE:
        for dim, size in enumerate(source.shape):
            stride = source.numel() // size
            if size > 1 and source.stride(dim) == target.stride(dim) == stride:  # the outermost one of both
                count = max(1, REORDERED_AT_ONCE // (stride * source.element_size()))
                for first in range(0, size, count):
                    length = min(count, size - first)
                    _reorder(target.narrow(dim, first, length), source.narrow(dim, first, length))
                return
    target.copy_(source.clone())
