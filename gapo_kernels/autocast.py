"""What autocast does to parameters: which vectors it leaves in their own dtype, and to which dtype it casts the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gapo_kernels import distributed
from gapo_kernels.leaf_uses import leaves_first
from gapo_kernels.validation import HALF

# Autograd's names of what neither casts nor computes.
VIEWS = frozenset(
    "Alias AsStrided Clone Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose Unbind "
    "UnsafeView Unsqueeze View".split()
)
NORMS = frozenset("NativeLayerNorm NativeGroupNorm FusedRmsNorm".split())


def uncast_in(objective: Tensor, gathered: Mapping[int, int]) -> set[int]:
    """The vectors that autocast leaves alone in the objective's graph, by id: it casts other tensors to 16 bits there, and
    these it only multiplies, in more bits, with activations whose products are on no grid: norms' weights above all.

    Of those a movement of less than the grid's steps reaches what the forward computes. A weight that is cast, or handed
    through to where it may be, would lose it; so would one whose use is not seen, as in compiled code. gathered: what the
    graph has in the place of sharded parameters, by id.
    """
    multiplied, others, casts = set(), set(), False
    made_of: dict[Node, Set[int]] = {}  # the parameters that something is made of, where it is made of nothing else
    nothing: Set[int] = frozenset()
    for node in leaves_first(objective.grad_fn) if objective.grad_fn is not None else ():
        if (leaf := getattr(node, "variable", None)) is not None:
            made_of[node] = {gathered.get(id(leaf), id(leaf))}
            if leaf.numel() != max(leaf.shape, default=0):
                others.update(made_of[node])
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        casts = casts or _name(node) == "ToCopy" and _in_half(node)  # of activations, too: all matrices may be frozen
        leaves = set().union(*(made_of[child] for child in children))
        # Not so rows that are looked up, which are activations, and others' functions, which may cast inside.
        of_weights = not _in_half(node) and not _looks_up(node) and not isinstance(node, BackwardCFunction)
        if of_weights and all(made_of[child] for child in children):
            made_of[node] = leaves
            continue
        made_of[node] = nothing
        multiplies = _name(node) in NORMS or _name(node) == "Mul" and not any(map(_on_grid, children))
        (multiplied if multiplies else others).update(leaves)
    return multiplied - others if casts else set()


def cast_in(objective: Tensor, params: Sequence[Tensor]) -> torch.dtype | None:
    """The 16-bit dtype to which the objective's graph casts one of the finer parameters, as autocast does inside of a forward;
    None where it casts none. What compiled code casts is not seen."""
    finer = {id(param) for param in params if param.dtype not in HALF}
    for node in distributed.nodes(objective) if finer else ():
        if node.name() == "ToCopyBackward0" and (dtype := node._input_metadata[0].dtype) in HALF:
            if any(id(_leaf(child)) in finer for child, _ in node.next_functions):
                return dtype
    return None


def _name(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def _in_half(node: Node) -> bool:
    """Whether what it gives has 16 bits, by a cast, a copy, or a product with a scalar, which may be rounded before."""
    return any(metadata.dtype in HALF for metadata in node._input_metadata)


def _looks_up(node: Node) -> bool:
    return _name(node).startswith("Embedding")


def _on_grid(node: Node) -> bool:
    """Whether what it gives may be 16 bits' values all the same, as an embedding's rows are of weights on the grid."""
    while _is_view(node):
        node = node.next_functions[0][0]
    return node is not None and (_in_half(node) or _looks_up(node))


def _is_view(node: Node | None) -> bool:
    """Also a copy to another device, or to a dtype of more than 16 bits."""
    return node is not None and (_name(node) in VIEWS or _name(node) == "ToCopy" and not _in_half(node))


def _leaf(node: Node | None) -> Tensor | None:
    """The parameter that a node's input is, or is a view of."""
    while _is_view(node):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For a backward, whose operations it would cast: also those of a forward that ran with autocast switched off."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
