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

VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
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


Step = Callable[[Tensor], Tensor]  # the gradient of what was made of a leaf, to that of what it was made of
# Of the gradients of a node's outputs: those of the inputs that leaves enter, by the inputs' numbers.
Make = Callable[[Sequence[Tensor | None], Scaled], Sequence[Tensor | None] | dict[int, Tensor]]


@dataclass
class Use:
    node: Node
    needs_graph: bool  # whether the graph must be kept for it
    flattened: bool  # its rows are those of all sequences, one after the other
    leaves: list[tuple[int, list[Step], Tensor]]  # through which input, by way of what, which leaf
    _make: Make
    _taken: list[tuple[Tensor, int]]  # what has been taken over of what nodes saved, and its version then
    outputs: Sequence[Tensor | None] = ()  # their gradients, as a backward leaves them here while it is recorded

    def record(self) -> RemovableHandle:
        def hook(gradients):
            self.outputs = gradients

        return self.node.register_prehook(hook)

    def gradients(self, scaled: Scaled, wanted: Callable[[Tensor], bool]) -> Iterator[tuple[Tensor, Tensor]]:
        """(leaf, this use's part of its gradient), each sequence's times its ratio, of the leaves that are wanted."""
        if not any(wanted(leaf) for *_, leaf in self.leaves) or all(output is None for output in self.outputs):
            return
        if any(tensor._version != version for tensor, version in self._taken):
            raise RuntimeError(
                f"a tensor that {self.node.name()} saved for the backward of share_backward=True was modified in place "
                "since the step"
            )
        found = self._make(self.outputs, scaled)
        for number, way, leaf in self.leaves:
            if wanted(leaf):
                gradient = found[number]
                if gradient is None:
                    raise RuntimeError(
                        f"share_backward=True runs {self.node.name()} in the backward, which must then be of all "
                        "parameters: loss.backward() without inputs"
                    )
                for step in way:
                    gradient = step(gradient)
                yield leaf, gradient if gradient.is_sparse else gradient.sum_to_size(leaf.shape).to(leaf.dtype)


def find(root: Node, sequences: int, moved: set[int]) -> list[Use]:
    """Every use of a leaf in the graph of log-probs (sequences,), in the order of the forward. moved: ids of the leaves
    which the probe's backward is for.

    Raises NotImplementedError where a use needs more than the gradient of its outputs, each sequence's by itself.
    """
    made_of: dict[Node, tuple[list[Node], Tensor] | None] = {}  # of what is made of one leaf: the way back to it
    users: dict[Node, list[Node]] = {}
    reached: dict[Node, bool] = {}  # whether the probe's backward runs a node: it lies on the way to what is moved
    found: list[tuple[Node, bool, list[tuple[int, list[Node], Tensor]]]] = []
    for node in leaves_first(root):
        following = [(number, child) for number, (child, _) in enumerate(node.next_functions) if child is not None]
        for _, child in following:
            users.setdefault(child, []).append(node)
        if hasattr(node, "variable"):
            made_of[node], reached[node] = None, id(node.variable) in moved
            if isinstance(node.variable, torch.nn.Parameter) or reached[node]:
                made_of[node] = [], node.variable
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
        found.append((node, reached[node], entering))
    if any(node.ddp_weakref().static_graph for node in made_of if hasattr(node, "ddp_weakref")):
        raise NotImplementedError(
            "share_backward=True cannot be used under DDP(static_graph=True), which waits for a backward through the "
            "model's outputs"
        )
    uses = []
    for node, is_reached, entering in sorted(found, key=lambda item: item[0]._sequence_nr()):
        why = _obstacle(node, is_reached, sequences, users.get(node, ()), len(entering))
        if why is not None:
            shape = tuple(entering[0][2].shape)
            raise NotImplementedError(
                f"share_backward=True cannot take {node.name()}, which a parameter of shape {shape} enters: {why}"
            )
        uses.append(_use(node, sequences, entering))
    return uses


# Nodes that make activations of parameters and what has no gradient: token ids, say, or frozen activations. Those of the
# second line have more than one parameter then.
_OF_DATA_TOO = {f"{name}Backward0" for name in ("Addmm", "NativeLayerNorm", "Convolution", "NativeGroupNorm")}
_OF_DATA = _OF_DATA_TOO | {
    f"{name}Backward0"
    for name in ("Embedding", "Index", "IndexSelect", "Gather", "Expand", "Repeat", "Mm", "Mul", "Add", "Sub", "Div")
}


def will_run(node: Node | None) -> bool:
    """Within a backward: whether it will run this node, too."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it does not tell about a leaf whose gradient autograd.grad was asked for
        return True


def shapes(node: Node) -> list[tuple[int, ...]]:
    return [tuple(metadata.shape) for metadata in node._input_metadata]


def leaves_first(root: Node) -> Iterator[Node]:
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
    """Whether a node's output is a leaf in another form, no activation: an embedding of a batch is (S, T, H)."""
    shape = shapes(node)[0]
    if node.name() == "EmbeddingBackward0":  # that of positions, which all sequences share
        return len(shape) == 2 or shape[0] == 1
    return node.name() in _STEPS and math.prod(shape) == leaf.numel()


def _obstacle(node: Node, reached: bool, sequences: int, users: Sequence[Node], entering: int) -> str | None:
    """Why a node's part of the gradient cannot be had without a backward. entering: inputs that are leaves, or made of
    one."""
    if not reached:
        return "the probe's backward stops before it, because the anchor's scope does"
    own = isinstance(node, BackwardCFunction)
    if own and not hasattr(getattr(node, "_forward_cls", None), "parameter_gradients"):
        return "it is compiled, reentrantly checkpointed, or another library's own function"
    if any(metadata.dtype == torch.float16 for metadata in node._input_metadata):
        return "it computes in float16, whose gradients the loss scale would overflow"
    outputs = shapes(node)[:1] if own else shapes(node)  # what else our own functions return has no gradient
    apart = all(len(shape) > 0 and shape[0] == sequences for shape in outputs)
    # The rows of (S, T, ...), which a linear layer's product is of: nothing else says whose a row is.
    unflattened = [user.name() in VIEWS and shapes(user)[0][0] == sequences for user in users]
    rows = len(outputs) == 1 and len(outputs[0]) == 2 and len(unflattened) > 0 and all(unflattened)
    if not rows and (not apart or node.name() in GEMMS):
        expected = f"the {sequences} sequences as their first dimension, or all of their rows"
        return f"expected outputs with {expected}, got {', '.join(map(str, outputs))}"
    differentiated = sum(child is not None for child, _ in node.next_functions)
    if not own and entering == differentiated and node.name() not in (_OF_DATA if entering == 1 else _OF_DATA_TOO):
        return "no activation enters it, and so nothing says that its output is one of each sequence"
    return "its activations are checkpointed or offloaded, and would be made once more" if _unpack_hooks(node) else None


def is_checkpointed(node: Node) -> bool:
    """Whether what the node saved is made anew for each backward."""
    return any(getattr(hook, "__qualname__", "").startswith("_checkpoint_hook") for hook in _unpack_hooks(node))


def _unpack_hooks(node: Node) -> list[Callable[..., Tensor]]:
    """Of those who pack what the node saved."""
    raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
    saved = [item for value in raw for item in (value if isinstance(value, (tuple, list)) else (value,))]
    hooks = (getattr(item, "unpack_hook", None) for item in saved)
    return [hook for hook in hooks if hook is not None]


# ---- A node's gradients of the inputs that leaves enter ----


class _Taken(list):
    """What is taken over of what nodes saved, with its version: a later change would go unseen otherwise."""

    def take(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        self.append((tensor.detach(), tensor._version))
        return self[-1][0]


def _use(node: Node, sequences: int, leaves: list[tuple[int, list[Node], Tensor]]) -> Use:
    name, flattened, taken = node.name(), shapes(node)[0][0] != sequences, _Taken()
    maker, numbers = _TAKEN_OVER.get(name, (None, ()))
    is_own, is_known = isinstance(node, BackwardCFunction), all(number in numbers for number, *_ in leaves)
    if is_own:
        make = _own(node, taken)
    elif is_known:
        make = maker(node, flattened, [number for number, *_ in leaves], taken)
    else:
        make = _run(node, flattened)
    ways = [(number, [_step(one, taken) for one in way], leaf) for number, way, leaf in leaves]
    return Use(node, not (is_own or is_known), flattened, ways, make, taken)


def _run(node: Node, flattened: bool) -> Make:
    def make(gradients, scaled):
        found = node(*(None if g is None else scaled(g, flattened) for g in gradients))
        return (found,) if isinstance(found, Tensor) else found

    return make


def _own(node: BackwardCFunction, taken: _Taken) -> Make:
    of_class, saved = node._forward_cls, [taken.take(tensor) for tensor in node.saved_tensors]

    def make(gradients, scaled):
        return of_class.parameter_gradients(node, saved, *(None if g is None else scaled(g, False) for g in gradients))

    return make


def _gemm(node: Node, flattened: bool, numbers: list[int], taken: _Taken) -> Make:
    name, bias, weight = GEMMS[node.name()]
    x = taken.take(getattr(node, name)) if weight in numbers else None
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
        return (scaled(gradient, True).sum(0, keepdim=True, dtype=wide) * beta).to(gradient.dtype)

    def make(gradients, scaled):
        return {n: (of_weight if n == weight else of_bias)(gradients[0], scaled) for n in numbers}

    return make


def _product(node: Node, flattened: bool, numbers: list[int], taken: _Taken) -> Make:
    factors = {n: _other_factor(node, n, taken) for n in numbers}
    return lambda gradients, scaled: {n: scaled(gradients[0], flattened) * factors[n] for n in numbers}


def _sum(node: Node, flattened: bool, numbers: list[int], taken: _Taken) -> Make:
    factors = (1, getattr(node, "_saved_alpha", 1))
    return lambda gradients, scaled: {n: scaled(gradients[0], flattened).mul_(factors[n]) for n in numbers}


def _embedding(node: Node, flattened: bool, numbers: list[int], taken: _Taken) -> Make:
    step = _embedding_step(node, taken)
    return lambda gradients, scaled: [step(scaled(gradients[0], flattened))]


def _layer_norm(node: Node, flattened: bool, numbers: list[int], taken: _Taken) -> Make:
    x, mean, rstd = (taken.take(getattr(node, f"_saved_{name}")) for name in ("input", "result1", "result2"))
    weight, bias = (None if t is None else t.detach() for t in (node._saved_weight, node._saved_bias))
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
    "ExpandBackward0": (_sum, (0,)),
    "EmbeddingBackward0": (_embedding, (0,)),
    "NativeLayerNormBackward0": (_layer_norm, (1, 2)),
}


# ---- What is made of a leaf before it meets activations ----


def _step(node: Node, taken: _Taken) -> Step:
    """To the gradient of the node's one input, from that of its output as whoever used it gives it."""
    number, child = next((n, child) for n, (child, _) in enumerate(node.next_functions) if child is not None)
    step = _STEPS.get(node.name(), _embedding_step)(node, taken, number)
    shape, dtype = shapes(node)[0], node._input_metadata[0].dtype
    leaf = getattr(child, "variable", None)
    before = tuple(leaf.shape) if leaf is not None else shapes(child)[0]
    before_dtype = leaf.dtype if leaf is not None else child._input_metadata[0].dtype

    def run(gradient):
        gradient = step(gradient.sum_to_size(shape).to(dtype))
        return gradient if gradient.is_sparse else gradient.reshape(before).to(before_dtype)

    return run


def _embedding_step(node: Node, taken: _Taken, number: int = 0) -> Step:
    rows, padding = node._saved_weight_sym_argsize_0, _signed(node._saved_padding_idx)  # -1: none
    indices, options = taken.take(node._saved_indices), (node._saved_scale_grad_by_freq, node._saved_sparse)
    return lambda gradient: torch.ops.aten.embedding_backward(gradient, indices, rows, padding, *options)


def _transpose_step(node: Node, taken: _Taken, number: int) -> Step:
    dims = _signed(node._saved_dim0), _signed(node._saved_dim1)
    return lambda gradient: gradient.transpose(*dims)


def _signed(saved: int) -> int:
    """Autograd shows what a node saved without its sign."""
    return saved - 2**64 if saved >= 2**63 else saved


def _factor_step(node: Node, taken: _Taken, number: int) -> Step:
    factor = _other_factor(node, number, taken)
    return lambda gradient: gradient * factor


def _other_factor(node: Node, number: int, taken: _Taken) -> Tensor:
    return taken.take(node._saved_self if number else node._saved_other)


_UNCHANGED = [f"{name}Backward0" for name in "ToCopy Clone Alias Unsqueeze Squeeze".split()]
_UNCHANGED += [*VIEWS, "SqueezeBackward1"]
_STEPS = {
    **{name: lambda node, taken, number: lambda gradient: gradient for name in _UNCHANGED},
    "TBackward0": lambda node, taken, number: lambda gradient: gradient.t(),
    "TransposeBackward0": _transpose_step,
    "NegBackward0": lambda node, taken, number: lambda gradient: -gradient,
    "AddBackward0": lambda node, taken, number: lambda gradient: gradient * (node._saved_alpha if number else 1),
    "MulBackward0": _factor_step,
}
