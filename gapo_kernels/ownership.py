"""Whether a gradient's memory is ours to overwrite.

A custom function's backward may return what its graph keeps for the next backward, or what someone looks at later, and
two parameters may share one gradient: such memory must stay as it is.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor


def references(tensor: Tensor) -> tuple[int, int, int]:
    """How many refer to the Python object, to the tensor behind it and to its storage."""
    try:
        return (
            sys.getrefcount(tensor),
            tensor._use_count(),
            torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),
        )
    except AttributeError:  # a torch that does not tell: nothing is ours
        return (sys.maxsize,) * 3


@lru_cache
def _references_of_one_variable() -> tuple[int, int, int]:
    tensor = torch.empty(1)
    return references(tensor)


def alone(counts: tuple[int, int, int]) -> bool:
    """Whether one local variable, for which `references(variable)` was asked, is all that refers to the memory."""
    expected = _references_of_one_variable()
    return counts[0] < sys.maxsize and all(found <= few for found, few in zip(counts, expected))
