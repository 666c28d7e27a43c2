"""Whether a gradient's memory is ours to overwrite.

A custom function's backward may return what its graph keeps for the next backward, or what someone looks at later, and
two parameters may share one gradient: such memory must stay as it is.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor


def references(tensor: Tensor) -> tuple[int, ...]:
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
def _references_of_one_variable(is_view: bool) -> tuple[int, ...]:
    with torch.inference_mode(False), torch.no_grad():
        tensor = torch.empty(4).view(2, 2) if is_view else torch.empty(1)
        return references(tensor)


def alone(counts: tuple[int, ...]) -> bool:
    """Whether one local variable, for which `references(variable)` was asked, is all that refers to the memory."""
    expected = _references_of_one_variable(len(counts) == 5)
    return bool(counts) and all(found <= few for found, few in zip(counts, expected, strict=True))
