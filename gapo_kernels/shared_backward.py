"""The final backward from what the probe's left: no second pass through the activations.

The gradient of a weight is a sum over sequences s of upstream_s * (d logp_s / d weight). Where a layer y = f(x, W)
keeps the sequences apart, that is W's own derivative at d logp / d y, which the probe's backward has computed already,
times one number a sequence. Of a backward's two parts, gradients of activations and of weights, only the latter is
left to do: a linear layer's is one GEMM, (ratio_s * x)^T (d probe / d y), ratio_s = upstream_s / probe_s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapo_kernels import distributed, leaf_uses
from gapo_kernels.autocast import without_autocast
from gapo_kernels.interrupts import interrupt_held

TINY = 1e-20  # a probe's weight below which the gradients that it scaled may have lost digits
# (of a parameter's gradient, of all) that may differ when sequences are told apart, by the coarsest dtype on the way.
TOLERANCES = {torch.float64: (1e-6, 1e-9), torch.float32: (2e-3, 1e-5), torch.bfloat16: (0.05, 3e-3)}

# Of each anchor: how many there were of each form of graph, and whether a gradient was zeros.
_steps: WeakKeyDictionary = WeakKeyDictionary()


class SharedBackward:
    """Of one graph: log-probs (S,), and the parameters that the probe's backward reaches.

    Raises NotImplementedError where some part of a gradient cannot be had without a backward.
    """

    def __init__(self, logps: Tensor, anchor: object, moved: Sequence[Tensor]) -> None:
        if any(map(distributed.is_sharded, moved)):
            raise NotImplementedError(
                "share_backward=True cannot be used with sharded parameters (FSDP2), got DTensors"
            )
        self._sequences, self._root = logps.shape[0], logps.grad_fn
        self._uses = leaf_uses.find(self._root, self._sequences, {id(p) for p in moved if p.requires_grad})
        self.leaves = list({id(leaf): leaf for use in self._uses for *_, leaf in use.leaves}.values())
        if not self.leaves:
            raise NotImplementedError("share_backward=True found no parameter that the log-probs are made of")
        nodes = tuple(node.name() for node in leaf_uses.leaves_first(self._root))
        self._form = (self._sequences, nodes, *((use.node.name(), use.flattened) for use in self._uses))
        self._steps = _steps.setdefault(anchor, {})
        done, had_zeros = self._steps.get(self._form, (0, False))
        self._number = number = done + 1
        # The 1st, 4th, 16th, ... of a form: what a batch's own values decide may be as it should be once, by chance. And
        # the 2nd and 3rd after a gradient of zeros, as what adapters begin with has.
        self._is_compared = number & (number - 1) == 0 and number.bit_length() % 2 == 1 or had_zeros and number < 4
        self._in_full = number == 1 or had_zeros
        self._has_zeros = False
        # A second forward, in the place of a kept graph, is not for one rank alone: DDP's has collectives.
        several_ranks = distributed.ranks(anchor.process_group) > 1
        self._keeps_graph = several_ranks or any(use.needs_graph for use in self._uses)
        self._output = logps.output_nr
        self._probe: Tensor | None = None  # (S,), d objective / d log-prob

    @property
    def needs_graph(self) -> bool:
        """Whether the probe's backward must keep it."""
        return self._is_compared or self._keeps_graph

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps what the backward that runs in here makes of the log-probs and of each use's outputs."""
        handles = [self._root.register_prehook(self._keep_probe)]
        try:
            handles += [use.record() for use in self._uses]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_probe(self, gradients: Sequence[Tensor]) -> None:
        self._probe = gradients[self._output]

    def tells_apart(self, valid: Tensor) -> bool:
        """Whether the probe gave every pair (B,), of those that count, a weight that can be divided by."""
        return not ((self._probe.abs() < TINY) & valid.repeat(2)).any()

    def compare(self, logps: Tensor) -> None:
        """With a real backward, now and then: whether the sequences are apart.

        Raises RuntimeError where they are not: what batch normalisation, say, makes of them is not a sum over them.
        """
        if not self._is_compared:
            return
        generator = torch.Generator("cpu").manual_seed(self._number)
        order = torch.randperm(self._sequences, generator=generator, device="cpu")
        # In a form's first step any two sequences are far apart in one comparison of several: in a bit of their numbers.
        bits = range((self._sequences - 1).bit_length()) if self._in_full else [0]
        found = []
        for bit in bits:
            ratio = (0.5 + (order >> bit) % 2).to(self._probe.device, self._probe.dtype)
            found.append(self._errors(logps, ratio, self._keeps_graph or bit != bits[-1]))
        dtypes = {metadata.dtype for use in self._uses for metadata in use.node._input_metadata}
        relative, absolute = TOLERANCES[next(d for d in reversed(TOLERANCES) if d in dtypes)]
        exact, errors = torch.stack(found, -1)
        self._has_zeros = bool((exact == 0).any())
        if not (errors <= relative * exact + absolute * exact.norm(dim=0)).all():
            raise RuntimeError(
                "share_backward=True gave other gradients than a backward: something in logps_fn mixes the sequences "
                "of a batch (batch normalisation, a router's capacity), or orders them in another way. Use "
                "share_backward=False"
            )

    def _errors(self, logps: Tensor, ratio: Tensor, retain_graph: bool) -> Tensor:
        """(2, leaves reached): the norm of the gradient of each, for the probe's times ratio (S,), and that of what is
        shared less it."""
        norms: dict[int, Tensor] = {}

        def measure(leaf):
            def hook(exact):
                if exact is None:
                    return None
                scaled = leaf_uses.Scaled(ratio)
                parts = (part for use in self._uses for _, part in use.gradients(scaled, lambda other: other is leaf))
                own = sum(part.to_dense() if part.is_sparse else part for part in parts)
                whole = exact.to_dense() if exact.is_sparse else exact
                norms[id(leaf)] = torch.stack([whole.double().norm(), (own - whole).double().norm()])
                # Of the model's size there is never more than one.
                return None if exact.is_sparse else exact.new_zeros(()).expand_as(exact)

            return hook

        with without_autocast(logps.device), _alone(self.leaves, measure), distributed.no_iteration_of_ddp(logps):
            options = dict(retain_graph=retain_graph, allow_unused=True)
            torch.autograd.grad(logps, self.leaves, ratio * self._probe, **options)
        return torch.stack(list(norms.values()), -1) if norms else ratio.new_zeros(2, 0)

    def loss(self, loss: Tensor, logps: Tensor) -> Tensor:
        """The loss () of these log-probs, which are a leaf here, as one of the model's leaves."""
        (upstream,) = torch.autograd.grad(loss, logps)
        ratio = torch.where(upstream == 0, upstream, upstream / self._probe)
        self._root = None
        self._steps[self._form] = self._number, self._has_zeros
        return _SharedLoss.apply(loss.detach(), ratio, self, *self.leaves)

    def gradients(self, ratio: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of every leaf that is wanted: the sum over sequences of ratio (S,) times the probe's part of its gradient.
        What was kept for it goes on the way."""
        total: dict[int, Tensor] = {}
        chosen = {id(leaf) for leaf, is_wanted in zip(self.leaves, wanted) if is_wanted}
        scaled = leaf_uses.Scaled(ratio)
        uses, self._uses = self._uses[::-1], []
        while uses:
            for leaf, gradient in uses.pop().gradients(scaled, lambda leaf: id(leaf) in chosen):
                own = total.get(id(leaf))
                if own is not None:
                    gradient = own + gradient if own.is_sparse or gradient.is_sparse else own.add_(gradient)
                total[id(leaf)] = gradient
        return [total.get(id(leaf)) for leaf in self.leaves]


@contextmanager
def _alone(leaves: Sequence[Tensor], hook_of: Callable[[Tensor], Callable]) -> Iterator[None]:
    """With one hook on each of the leaves, in the place of somebody's own, which may do anything with a gradient.

    One that stayed would take the parameter's gradient away in every later backward: so no signal comes between the lines
    of an entry or exit.
    """
    handles, users = [], []
    with interrupt_held():
        try:
            for leaf in leaves:
                users.append((leaf._backward_hooks, dict(leaf._backward_hooks or {})))
                if leaf._backward_hooks:
                    leaf._backward_hooks.clear()
                handles.append(leaf.register_hook(hook_of(leaf)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for hooks, own in users:
                if own:
                    hooks.update(own)


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
        wanted = [leaf_uses.will_run(node) for node, _ in ctx.next_functions[-len(sharing.leaves) :]]
        return (None, None, None, *sharing.gradients(ctx.ratio * upstream, wanted))
