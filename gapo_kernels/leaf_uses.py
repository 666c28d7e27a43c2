"""Where autograd's graph uses its leaves, and what the leaves' gradients are made of there.

A leaf (a parameter) enters a node directly or by way of views and casts of itself. For each such node a `Use` has what
gives the gradients of the leaves from that of the node's outputs alone, without that of its other inputs: the known
nodes' from a few tensors that they saved, which are taken over, so that the graph need not be kept; any other's by
running the node, which needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

# What is made of a weight before it meets activations: of one tensor, with as many elements, and nothing saved.
_SHAPES_AND_CASTS = "T Transpose Permute View UnsafeView ToCopy Clone Alias Unsqueeze Squeeze Add Neg"
WAYS = tuple(f"{name}Backward0" for name in _SHAPES_AND_CASTS.split())
# y = beta * bias + alpha * (x @ W): the names of x, and the numbers of bias and W among the inputs.
GEMMS = {"MmBackward0": ("_saved_self", None, 1), "AddmmBackward0": ("_saved_mat1", 0, 2)}


class Scaled:
    """What is multiplied by its sequences' ratios (S,): the input of several layers once."""

    def __init__(self, ratio: Tensor) -> None:
        self._ratio = ratio
        self._last: tuple[object, Tensor | None] = None, None

    def __call__(self, tensor: Tensor, flattened: bool) -> Tensor:
        """Rounded once: a ratio in 16 bits would be wrong for all of its sequence alike."""
        ratio = self._ratio
        if flattened:
            ratio = ratio.repeat_interleave(tensor.shape[0] // ratio.shape[0])
        return (tensor * ratio.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)

    def rows(self, tensor: Tensor) -> Tensor:
        if not self.has(tensor):
            self._last = _place(tensor), self(tensor, flattened=True)
        return self._last[1]

    def has(self, tensor: Tensor) -> bool:
        return self._last[0] == _place(tensor)


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


# Of the gradients of a node's outputs: those of the inputs that leaves enter, by the inputs' numbers.
Make = Callable[[Sequence[Tensor | None], Scaled], Sequence[Tensor | None] | dict[int, Tensor]]


@dataclass
class Use:
    node: Node
    needs_graph: bool  # whether the graph must be kept for it
    flattened: bool  # its rows are those of all sequences, one after the other
    leaves: list[tuple[int, list[Node], Tensor]]  # through which input, by way of which nodes, which leaf
    _make: Make
    outputs: Sequence[Tensor | None] = ()  # their gradients, as a backward leaves them here while it is recorded

    def record(self) -> RemovableHandle:
        def hook(gradients):
            self.outputs = gradients

        return self.node.register_prehook(hook)

    def gradients(self, scaled: Scaled, wanted: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(leaf, this use's part of its gradient), each sequence's times its ratio; of one leaf, if asked for."""
        if wanted is not None and all(leaf is not wanted for *_, leaf in self.leaves):
            return
        found = self._make(self.outputs, scaled)
        for number, way, leaf in self.leaves:
            if wanted is None or leaf is wanted:
                gradient = found[number]
                for node in way:
                    gradient = node(gradient.sum_to_size(shapes(node)[0]).to(node._input_metadata[0].dtype))
                    gradient = gradient if isinstance(gradient, Tensor) else next(g for g in gradient if g is not None)
                yield leaf, gradient.sum_to_size(leaf.shape).to(leaf.dtype)


def find(root: Node, sequences: int, moved: set[int]) -> list[Use]:
    """Every use of a leaf in the graph of log-probs (sequences,), in the order of the forward. moved: ids of the leaves
    which the probe's backward is for.

    Raises NotImplementedError where a use needs more than the gradient of its outputs, each sequence's by itself.
    """
    made_of: dict[Node, tuple[list[Node], Tensor] | None] = {}  # of what is made of one leaf: the way back to it
    reached: dict[Node, bool] = {}  # whether the probe's backward runs a node: it lies on the way to what is moved
    found: list[tuple[int, Use]] = []
    for node in _leaves_first(root):
        following = [(number, child) for number, (child, _) in enumerate(node.next_functions) if child is not None]
        if hasattr(node, "variable"):
            made_of[node], reached[node] = ([], node.variable), id(node.variable) in moved
            continue
        reached[node] = any(reached[child] for _, child in following)
        entering = [(number, *made_of[child]) for number, child in following if made_of[child] is not None]
        made_of[node] = None
        if not entering:
            continue
        _, way, leaf = entering[0]
        if len(following) == 1 and _is_made_of(node, leaf):
            made_of[node] = [node, *way], leaf
            continue
        if (why := _obstacle(node, reached[node], sequences)) is not None:
            shape = tuple(leaf.shape)
            raise NotImplementedError(
                f"share_backward=True cannot take {node.name()}, which a parameter of shape {shape} enters: {why}"
            )
        found.append((node._sequence_nr(), _use(node, sequences, entering)))
    if any(node.ddp_weakref().static_graph for node in made_of if hasattr(node, "ddp_weakref")):
        raise NotImplementedError(
            "share_backward=True cannot be used under DDP(static_graph=True), which waits for a backward through the "
            "model's outputs"
        )
    return [use for _, use in sorted(found, key=lambda item: item[0])]


def shapes(node: Node) -> list[tuple[int, ...]]:
    return [tuple(metadata.shape) for metadata in node._input_metadata]


def _leaves_first(root: Node) -> Iterator[Node]:
    """Every node of the graph, after all that it leads to."""
    seen, stack = set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in seen]


def _is_made_of(node: Node, leaf: Tensor) -> bool:
    shape = shapes(node)[0]
    if node.name() == "EmbeddingBackward0":  # that of positions, which all sequences share
        return shape[0] == 1
    return node.name() in (*WAYS, "MulBackward0") and math.prod(shape) == leaf.numel()


def _obstacle(node: Node, reached: bool, sequences: int) -> str | None:
    """Why a node's part of the gradient cannot be had without a backward."""
    if not reached:
        return "the probe's backward stops before it, because the anchor's scope does"
    own = isinstance(node, BackwardCFunction)
    if own and not hasattr(getattr(node, "_forward_cls", None), "parameter_gradients"):
        return "it is compiled, reentrantly checkpointed, or another library's own function"
    if any(metadata.dtype == torch.float16 for metadata in node._input_metadata):
        return "it computes in float16, whose gradients the loss scale would overflow"
    outputs = shapes(node)[:1] if own else shapes(node)  # what else our own functions return has no gradient
    apart = all(len(shape) > 0 and shape[0] == sequences for shape in outputs)
    rows = all(len(shape) == 2 and shape[0] > 0 and shape[0] % sequences == 0 for shape in outputs)
    if not rows and (not apart or node.name() in GEMMS):
        expected = f"the {sequences} sequences as their first dimension, or all of their rows"
        return f"expected outputs with {expected}, got {', '.join(map(str, outputs))}"
    return "its activations are checkpointed or offloaded, and would be made once more" if _has_hooks(node) else None


def _has_hooks(node: Node) -> bool:
    """Whether somebody else packs what the node saved."""
    raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
    saved = [item for value in raw for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return any(getattr(item, "unpack_hook", None) is not None for item in saved)


# ---- A node's gradients of the inputs that leaves enter ----


def _use(node: Node, sequences: int, leaves: list[tuple[int, list[Node], Tensor]]) -> Use:
    name, flattened = node.name(), shapes(node)[0][0] != sequences
    maker, numbers = _TAKEN_OVER.get(name, (None, ()))
    if isinstance(node, BackwardCFunction):
        make, needs_graph = _own(node), False
    elif all(number in numbers for number, *_ in leaves):
        make, needs_graph = maker(node, flattened, [number for number, *_ in leaves]), False
    else:
        make, needs_graph = _run(node, flattened), True
    needs_graph = needs_graph or any(step.name() not in WAYS for _, way, _ in leaves for step in way)
    return Use(node, needs_graph, flattened, leaves, make)


def _run(node: Node, flattened: bool) -> Make:
    def make(gradients, scaled):
        found = node(*(None if g is None else scaled(g, flattened) for g in gradients))
        return (found,) if isinstance(found, Tensor) else found

    return make


def _own(node: BackwardCFunction) -> Make:
    of_class, saved = node._forward_cls, node.saved_tensors

    def make(gradients, scaled):
        return of_class.parameter_gradients(node, saved, *(None if g is None else scaled(g, False) for g in gradients))

    return make


def _gemm(node: Node, flattened: bool, numbers: list[int]) -> Make:
    name, bias, weight = GEMMS[node.name()]
    x = getattr(node, name).detach() if weight in numbers else None
    # In the layout of W, so that the gradient of W^T^T is contiguous.
    transposed = x is not None and node._saved_mat2_sym_strides[0] == 1
    alpha, beta = getattr(node, "_saved_alpha", 1), getattr(node, "_saved_beta", 1)

    def of_weight(gradient, scaled):
        if scaled.has(x) or x.numel() <= gradient.numel():
            own, gradient = scaled.rows(x), gradient
        else:
            own, gradient = x, scaled(gradient, True)
        product = (gradient.t() @ own).t() if transposed else own.t() @ gradient
        return product if alpha == 1 else product * alpha

    def of_bias(gradient, scaled):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (scaled(gradient, True).sum(0, dtype=wide) * beta).to(gradient.dtype)

    def make(gradients, scaled):
        return {n: (of_weight if n == weight else of_bias)(gradients[0], scaled) for n in numbers}

    return make


def _product(node: Node, flattened: bool, numbers: list[int]) -> Make:
    factors = {n: (node._saved_other, node._saved_self)[n].detach() for n in numbers}
    return lambda gradients, scaled: {n: scaled(gradients[0], flattened) * factors[n] for n in numbers}


def _sum(node: Node, flattened: bool, numbers: list[int]) -> Make:
    alpha = node._saved_alpha

    def make(gradients, scaled):
        gradient = scaled(gradients[0], flattened)
        return {n: gradient * alpha if n == 1 and alpha != 1 else gradient for n in numbers}

    return make


def _embedding(node: Node, flattened: bool, numbers: list[int]) -> Make:
    rows, padding = node._saved_weight_sym_argsize_0, node._saved_padding_idx
    padding -= 2**64 if padding >= 2**63 else 0  # autograd shows -1, for none, without its sign
    indices, options = node._saved_indices.detach(), (node._saved_scale_grad_by_freq, node._saved_sparse)

    def make(gradients, scaled):
        gradient = scaled(gradients[0], flattened)
        return [torch.ops.aten.embedding_backward(gradient, indices, rows, padding, *options)]

    return make


def _layer_norm(node: Node, flattened: bool, numbers: list[int]) -> Make:
    tensors = [getattr(node, f"_saved_{name}") for name in ("input", "result1", "result2", "weight", "bias")]
    x, mean, rstd, weight, bias = (None if t is None else t.detach() for t in tensors)
    shape, wanted = node._saved_normalized_shape, [False, 1 in numbers, 2 in numbers]

    def make(gradients, scaled):
        gradient = scaled(gradients[0], flattened)
        return torch.ops.aten.native_layer_norm_backward(gradient, x, shape, mean, rstd, weight, bias, wanted)

    return make


# By name of the node: what makes its gradients from what it saved, and of which inputs.
_TAKEN_OVER = {
    "MmBackward0": (_gemm, (1,)),
    "AddmmBackward0": (_gemm, (0, 2)),
    "MulBackward0": (_product, (0, 1)),
    "AddBackward0": (_sum, (0, 1)),
    "EmbeddingBackward0": (_embedding, (0,)),
    "NativeLayerNormBackward0": (_layer_norm, (1, 2)),
}
