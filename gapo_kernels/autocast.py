"""What autocast does to parameters: which vectors it leaves in their own dtype, and to which dtype it casts the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
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


def spared_by_autocast(model: nn.Module) -> list[nn.Parameter]:
    """The vectors that autocast leaves in their own dtype, as far as modules tell: those of norms, unless another module
    has them, too."""
    spared: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            spared[param] = "Norm" in type(module).__name__ and _is_vector(param) and spared.get(param, True)
    return [param for param, spares in spared.items() if spares]


def spared_in(objective: Tensor, spared: set[int], around: bool, gathered: Mapping[int, int]) -> set[int]:
    """The vectors that autocast has left alone in the objective's graph, by id: it casts other tensors to 16 bits there,
    and not these, nor what is made of these and other parameters alone. Of `spared`, whose modules tell, also what enters a
    function that may cast inside; of others those of which all uses are seen.

    around: it was on around all of the graph, also of compiled code, whose casts are not seen. gathered: what the graph
    has in the place of sharded parameters, by id.
    """
    cast, seen, hidden, casts = set(), set(), set(), around
    made_of: dict[Node, Set[int]] = {}  # the parameters that something is made of, where it is made of nothing else
    nothing: Set[int] = frozenset()
    for node in leaves_first(objective.grad_fn) if objective.grad_fn is not None else ():
        if (leaf := getattr(node, "variable", None)) is not None:
            made_of[node] = {gathered.get(id(leaf), id(leaf))}
            if not _is_vector(leaf):  # as if it were
                cast.update(made_of[node])
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        is_cast = node.name() == "ToCopyBackward0" and not _is_view(node)
        casts = casts or is_cast  # of activations, too: no weight's is there to be seen if all matrices are frozen
        if not any(made_of[child] for child in children):
            made_of[node] = nothing
            continue
        leaves = set().union(*(made_of[child] for child in children))
        if _is_view(node):  # what it gives is cast, or used, further up
            made_of[node] = leaves
            continue
        if is_cast:  # of what is made of a weight alone, too: on the grid it may be as the weight is, and lose what is less
            cast.update(leaves)
            made_of[node] = nothing
            continue
        as_seen = _computes_as_seen(node)
        (seen if as_seen else hidden).update(leaves)
        # A sum of weights, or rows of one, may be cast yet.
        made_of[node] = leaves if as_seen and all(made_of[child] for child in children) else nothing
    known = seen - hidden | (spared if around else spared & hidden)
    return known - cast if casts else set()


def cast_in(objective: Tensor, params: Sequence[Tensor]) -> torch.dtype | None:
    """The 16-bit dtype to which the objective's graph casts one of the finer parameters, as autocast does inside of a forward;
    None where it casts none. What compiled code casts is not seen."""
    finer = {id(param) for param in params if param.dtype not in HALF}
    for node in distributed.nodes(objective) if finer else ():
        if node.name() == "ToCopyBackward0" and (dtype := node._input_metadata[0].dtype) in HALF:
            if any(id(_leaf(child)) in finer for child, _ in node.next_functions):
                return dtype
    return None


def _is_vector(param: Tensor) -> bool:
    """Also as a matrix of one row: few weights, each of which acts on every token."""
    return param.numel() == max(param.shape, default=1)


def _computes_as_seen(node: Node) -> bool:
    """Not so compiled code, functions written in Python, an embedding, whose rows are activations, and what gives 16 bits: a
    cast, a copy, or a product with a scalar, which may be rounded before."""
    known = node.name().rstrip("0123456789").endswith("Backward") and not node.name().startswith("Embedding")
    known = known and not isinstance(node, BackwardCFunction)
    return known and not any(metadata.dtype in HALF for metadata in node._input_metadata)


def _is_view(node: Node | None) -> bool:
    """Also a copy to another device, or to a dtype of more than 16 bits."""
    if node is None:
        return False
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    return name in VIEWS or name == "ToCopy" and node._input_metadata[0].dtype not in HALF


def _leaf(node: Node | None) -> Tensor | None:
    """The parameter that a node's input is, or is a view of."""
    while _is_view(node):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For a backward, whose operations it would cast: also those of a forward that ran with autocast switched off."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
