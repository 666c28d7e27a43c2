"""Whether a gradient's memory is ours to overwrite.

A custom function's backward may return what its graph keeps for the next backward, or what someone looks at later, and
two parameters may share one gradient: such memory must stay as it is. So must what torch did not allocate, numpy's say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from gapo_kernels import host_memory


def exclusive(tensors: Sequence[Tensor | None]) -> list[bool]:
    """For each tensor of a list, whether nothing but the list refers to its memory.

    Several may be parts of one buffer, as the gradients of FSDP2 are, if they lie apart.
    """
    parts: dict[int, list[int]] = {}
    for number in range(len(tensors)):  # by number: a variable would refer to the tensor, too
        if tensors[number] is not None:
            parts.setdefault(tensors[number].untyped_storage()._cdata, []).append(number)
    found = [False] * len(tensors)
    for numbers in parts.values():
        storage = tensors[numbers[0]].untyped_storage()
        if not (storage.resizable() or host_memory.is_lent(storage)):
            continue
        del storage  # a reference
        if len(numbers) == 1 or _apart([_span(tensors[number]) for number in numbers]):
            for number in numbers:
                found[number] = _alone(_references(tensors[number]), len(numbers))
    return found


def _references(tensor: Tensor) -> tuple[int, ...]:
    """How many refer to the Python object, to the tensor behind it, to its storage, and to the tensor that it views.

    Linear layers' gradients come as views, of a tensor that nothing else refers to.
    """
    base = tensor._base
    try:
        return (
            sys.getrefcount(tensor),
            tensor._use_count(),
            torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),
            *(() if base is None else (sys.getrefcount(base), base._use_count())),
        )
    except AttributeError:  # a torch that does not tell: nothing is ours
        return ()


@lru_cache
def _references_of_a_list(parts: int, views: bool) -> tuple[int, ...]:
    """What `_references` says of a tensor that only a list refers to, as to each of the other parts of the buffer."""
    with torch.inference_mode(False), torch.no_grad():
        tensors = list(torch.empty(parts, 1, device="cpu").unbind()) if views else [torch.empty(1, device="cpu")]
        return _references(tensors[0])


def _alone(counts: tuple[int, ...], parts: int) -> bool:
    views = len(counts) == 5
    if not counts or (parts > 1 and not views):
        return False
    return all(found <= few for found, few in zip(counts, _references_of_a_list(parts, views), strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Its first and last element's places in the storage, the latter plus 1."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.storage_offset(), tensor.storage_offset() + (reach if tensor.numel() else 0)


def _apart(spans: list[tuple[int, int]]) -> bool:
    return all(stop <= start for (_, stop), (start, _) in pairwise(sorted(spans)))
