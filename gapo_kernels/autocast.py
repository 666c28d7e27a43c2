"""Autocast, which casts parameters where they are used: seen in a graph, and kept out of a backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gapo_kernels import distributed
from gapo_kernels.validation import HALF

# Autograd's names of what neither casts nor computes.
VIEWS = frozenset(
    "Alias AsStrided Clone Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose Unbind "
    "UnsafeView Unsqueeze View".split()
)


def cast_in(objective: Tensor, params: Sequence[Tensor], gathered: Mapping[int, int]) -> torch.dtype | None:
    """The 16-bit dtype to which the objective's graph casts one of the finer parameters, as autocast does inside of a forward;
    None where it casts none. What compiled code casts is not seen. gathered: what the graph has in the place of sharded
    parameters, by id."""
    finer = {id(param) for param in params if param.dtype not in HALF}
    for node in distributed.nodes(objective) if finer else ():
        if _name(node) == "ToCopy" and (dtype := node._input_metadata[0].dtype) in HALF:
            leaves = {id(_leaf(child)) for child, _ in node.next_functions}
            if any(gathered.get(leaf, leaf) in finer for leaf in leaves):
                return dtype
    return None


def _name(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _is_view(node: Node | None) -> bool:
    """Also a copy to another device, or to a dtype of more than 16 bits."""
    return node is not None and (
        _name(node) in VIEWS or _name(node) == "ToCopy" and node._input_metadata[0].dtype not in HALF
    )


def _leaf(node: Node | None) -> Tensor | None:
    """The parameter that a node's input is, or is a view of."""
    while _is_view(node):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For a backward, whose operations it would cast: also those of a forward that ran with autocast switched off."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
