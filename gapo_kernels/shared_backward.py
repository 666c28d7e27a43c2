"""The final backward from what the probe's left: no second pass through the activations.

The gradient of a weight is a sum over sequences s of upstream_s * (d logp_s / d weight): where a layer y = f(x, W) keeps
the sequences apart, that is W's own derivative at d logp / d y, which the probe's backward has computed once already,
times one number a sequence. Of a backward's two parts, gradients of activations and of weights, only the latter is
left to do: a linear layer's is one GEMM, (ratio_s * x)^T (d probe / d y), ratio_s = upstream_s / probe_s.

What is to be done is read off autograd's graph: leaves, through views and casts of them, and the nodes that they enter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node

from gapo_kernels import distributed

# What is made of a weight before it meets activations: of one tensor, and with as many elements.
DERIVED = tuple(
    f"{name}Backward0" for name in "T Transpose Permute View UnsafeView ToCopy Clone Alias Unsqueeze Squeeze Add Mul Neg".split()
)
TINY = 1e-20  # a probe's weight below which the gradients that it scaled may have lost digits
# (of a parameter's gradient, of all) that may differ when sequences are told apart, by the coarsest dtype on the way.
TOLERANCES = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-4), torch.bfloat16: (0.1, 1e-2)}

_compared: WeakKeyDictionary = WeakKeyDictionary()  # of each anchor: the forms that were compared with a real backward


class _Use(NamedTuple):
    """A node that leaves enter: through each of these inputs, by way of these nodes."""

    node: Node
    flattened: bool  # its rows are those of all sequences, one after the other
    leaves: list[tuple[int, list[Node], Tensor]]


class SharedBackward:
    """Of one graph: log-probs (S,), and the parameters that the probe's backward reaches.

    Raises NotImplementedError where the graph has something whose part of the gradient cannot be had without a backward.
    """

    def __init__(self, logps: Tensor, moved: Sequence[Tensor]) -> None:
        if any(map(distributed.is_sharded, moved)):
            raise NotImplementedError("share_backward=True cannot be used with sharded parameters (FSDP2), got DTensors")
        self.sequences = logps.shape[0]
        self._root = logps.grad_fn
        self.uses = _uses(self._root, self.sequences, {id(param) for param in moved if param.requires_grad})
        self.leaves = list({id(leaf): leaf for use in self.uses for *_, leaf in use.leaves}.values())
        self._gradients: dict[Node, tuple[Tensor | None, ...]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps what the backward that runs in here makes of the log-probs and of each use's outputs."""
        handles = []
        try:
            for node in {self._root, *(use.node for use in self.uses)}:
                handles.append(node.register_prehook(self._keep(node)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, node: Node):
        def hook(gradients):
            self._gradients[node] = gradients

        return hook

    @property
    def probe(self) -> Tensor:
        """(S,), d objective / d log-prob."""
        return self._gradients[self._root][0]

    def tells_apart(self, valid: Tensor) -> bool:
        """Whether the probe gave every pair (B,), of those that count, a weight that can be divided by."""
        return not ((self.probe.abs() < TINY) & valid.repeat(2)).any()

    def compare(self, logps: Tensor, anchor: object) -> None:
        """Against a real backward, once for each form that an anchor's graphs take: whether the sequences are apart.

        Raises RuntimeError where they are not: what batch normalisation, say, makes of them is not a sum over them.
        """
        form = tuple((use.node.name(), use.flattened) for use in self.uses)
        seen = _compared.setdefault(anchor, set())
        if form in seen:
            return
        ratio = torch.linspace(0.5, 1.5, self.sequences, dtype=self.probe.dtype, device=self.probe.device)
        with distributed.no_iteration_of_ddp(logps):
            exact = torch.autograd.grad(logps, self.leaves, ratio * self.probe, retain_graph=True)
        dtypes = {metadata.dtype for use in self.uses for metadata in use.node._input_metadata}
        relative, absolute = TOLERANCES[next(d for d in reversed(TOLERANCES) if d in dtypes)]
        norms = torch.stack([grad.double().norm() for grad in exact])
        errors = torch.stack([(own - grad).double().norm() for own, grad in zip(self.gradients(ratio), exact)])
        if not (errors <= relative * norms + absolute * norms.norm()).all():
            raise RuntimeError(
                "share_backward=True gave other gradients than a backward: something in logps_fn mixes the sequences of "
                "a batch (batch normalisation, a router's capacity), or orders them in another way. Use "
                "share_backward=False"
            )
        seen.add(form)

    def gradients(self, ratio: Tensor, last: bool = False) -> list[Tensor]:
        """Of every leaf: the sum over sequences of ratio (S,) times the probe's part of its gradient. The last time what
        was kept of the probe's goes on the way."""
        total: dict[int, Tensor] = {}
        scaled = _ScaledInputs(ratio)
        for use in self.uses:
            outputs = _parameter_gradients(use, self._gradients[use.node], scaled)
            if last:
                del self._gradients[use.node]
            for (_, way, leaf), gradient in zip(use.leaves, outputs):
                for node in way:
                    gradient = node(gradient.sum_to_size(_shapes(node)[0]))
                    gradient = gradient if isinstance(gradient, Tensor) else next(g for g in gradient if g is not None)
                gradient, own = gradient.sum_to_size(leaf.shape), total.get(id(leaf))
                total[id(leaf)] = gradient if own is None else own.add_(gradient)
        return [total[id(leaf)] for leaf in self.leaves]

    def loss(self, loss: Tensor, logps: Tensor) -> Tensor:
        """The loss () of these log-probs, which are a leaf here, as one of the model's leaves."""
        (upstream,) = torch.autograd.grad(loss, logps)
        ratio = torch.where(upstream == 0, upstream, upstream / self.probe)
        return _SharedLoss.apply(loss.detach(), ratio, self, *self.leaves)


class _SharedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, ratio, sharing, *leaves):
        ctx.ratio, ctx.sharing = ratio, sharing
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.sharing is None:
            raise RuntimeError(
                "the loss of share_backward=True has one backward: what it needs of the probe's is gone after it"
            )
        sharing, ctx.sharing = ctx.sharing, None
        return (None, None, None, *sharing.gradients(ctx.ratio * upstream, last=True))


class _ScaledInputs:
    """What is multiplied by its sequences' ratios: the input of several layers once."""

    def __init__(self, ratio: Tensor) -> None:
        self._ratio = ratio
        self._last: tuple[object, Tensor | None] = None, None

    def scale(self, tensor: Tensor, flattened: bool) -> Tensor:
        """Rounded once: a ratio in 16 bits would be wrong for all of its sequence alike."""
        ratio = self._ratio
        if flattened:
            ratio = ratio.repeat_interleave(tensor.shape[0] // ratio.shape[0])
        return (tensor * ratio.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)

    def rows(self, tensor: Tensor) -> Tensor:
        if not self.has(tensor):
            self._last = _place(tensor), self.scale(tensor, flattened=True)
        return self._last[1]

    def has(self, tensor: Tensor) -> bool:
        return self._last[0] == _place(tensor)


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _parameter_gradients(use: _Use, gradients: Sequence[Tensor | None], scaled: _ScaledInputs) -> list[Tensor]:
    """What a node gives the inputs through which leaves enter it."""
    if use.node.name() in _GEMMS:
        return _of_gemm(use, gradients[0], scaled)
    gradients = [None if g is None else scaled.scale(g, use.flattened) for g in gradients]
    if isinstance(use.node, BackwardCFunction):
        outputs = use.node._forward_cls.parameter_gradients(use.node, *gradients)
    else:
        outputs = use.node(*gradients)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [outputs[number] for number, *_ in use.leaves]


# y = beta * bias + alpha * (x @ W): the names of x, and the numbers of bias and W among the inputs.
_GEMMS = {"MmBackward0": ("_saved_self", None, 1), "AddmmBackward0": ("_saved_mat1", 0, 2)}


def _of_gemm(use: _Use, gradient: Tensor, scaled: _ScaledInputs) -> list[Tensor]:
    node = use.node
    name, bias, weight = _GEMMS[node.name()]
    found = []
    for number, *_ in use.leaves:
        if number == weight:
            x = getattr(node, name)
            if scaled.has(x) or x.numel() <= gradient.numel():
                x, g = scaled.rows(x), gradient
            else:
                x, g = x, scaled.scale(gradient, flattened=True)
            # In the layout of W, so that the gradient of W^T^T is contiguous.
            transposed = node._saved_mat2_sym_strides[0] == 1
            product = (g.t() @ x).t() if transposed else x.t() @ g
            found.append(product if bias is None or node._saved_alpha == 1 else product * node._saved_alpha)
        else:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums = scaled.scale(gradient, flattened=True).sum(0, dtype=wide)
            found.append((sums * node._saved_beta).to(gradient.dtype))
    return found


def _uses(root: Node, sequences: int, moved: set[int]) -> list[_Use]:
    """In the order of the forward."""
    leaf: dict[Node, tuple[list[Node], Tensor] | None] = {}  # of what is made of one leaf: the way back to it
    reached: dict[Node, bool] = {}  # whether the probe's backward runs a node: it lies on the way to what is moved
    found = []
    for node in _leaves_first(root):
        following = [(number, child) for number, (child, _) in enumerate(node.next_functions) if child is not None]
        if hasattr(node, "variable"):
            leaf[node], reached[node] = ([], node.variable), id(node.variable) in moved
            continue
        reached[node] = any(reached[child] for _, child in following)
        entering = [(number, *leaf[child]) for number, child in following if leaf[child] is not None]
        leaf[node] = None
        if not entering:
            continue
        _, way, variable = entering[0]
        if len(following) == 1 and _is_derived(node, variable):
            leaf[node] = [node, *way], variable
            continue
        if (why := _obstacle(node, reached[node], sequences)) is not None:
            raise NotImplementedError(
                f"share_backward=True cannot take {node.name()}, which a parameter of shape {tuple(variable.shape)} enters: {why}"
            )
        found.append(_Use(node, _shapes(node)[0][0] != sequences, entering))
    if any(node.ddp_weakref().static_graph for node in leaf if hasattr(node, "ddp_weakref")):
        raise NotImplementedError(
            "share_backward=True cannot be used under DDP(static_graph=True), which waits for a backward through the "
            "model's outputs"
        )
    found.sort(key=lambda use: use.node._sequence_nr())
    return found


def _is_derived(node: Node, leaf: Tensor) -> bool:
    shape = _shapes(node)[0]
    position = node.name() == "EmbeddingBackward0" and shape[0] == 1  # those of positions, which all sequences share
    return position or node.name() in DERIVED and math.prod(shape) == leaf.numel()


def _shapes(node: Node) -> list[tuple[int, ...]]:
    return [tuple(metadata.shape) for metadata in node._input_metadata]


def _obstacle(node: Node, reached: bool, sequences: int) -> str | None:
    """Why a node's part of the gradient cannot be had without a backward."""
    if not reached:
        return "the probe's backward stops before it, because the anchor's scope does"
    own = isinstance(node, BackwardCFunction)
    if own and not hasattr(getattr(node, "_forward_cls", None), "parameter_gradients"):
        return "it is compiled, reentrantly checkpointed, or another library's own function"
    if any(metadata.dtype == torch.float16 for metadata in node._input_metadata):
        return "it computes in float16, whose gradients the loss scale would overflow"
    shapes = _shapes(node)[:1] if own else _shapes(node)  # what else our own functions return has no gradient
    apart = all(len(shape) > 0 and shape[0] == sequences for shape in shapes)
    rows = all(len(shape) == 2 and shape[0] > 0 and shape[0] % sequences == 0 for shape in shapes)
    if not rows and (not apart or node.name() in _GEMMS):
        found = ", ".join(map(str, shapes))
        return f"expected outputs with the {sequences} sequences as their first dimension, or all of their rows, got {found}"
    return "its activations are checkpointed or offloaded, and would be made once more" if _has_hooks(node) else None


def _has_hooks(node: Node) -> bool:
    """Whether somebody else packs what the node saved."""
    raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
    saved = [item for value in raw for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return any(getattr(item, "unpack_hook", None) is not None for item in saved)


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
