"""The final backward from what the probe's left: no second pass through the activations.

The gradient of a weight is a sum over sequences s of upstream_s * (d logp_s / d weight). Where a layer y = f(x, W)
keeps the sequences apart, that is W's own derivative at d logp / d y, which the probe's backward has computed already,
times one number a sequence. Of a backward's two parts, gradients of activations and of weights, only the latter is
left to do: a linear layer's is one GEMM, (ratio_s * x)^T (d probe / d y), ratio_s = upstream_s / probe_s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gapo_kernels import distributed, leaf_uses

TINY = 1e-20  # a probe's weight below which the gradients that it scaled may have lost digits
# (of a parameter's gradient, of all) that may differ when sequences are told apart, by the coarsest dtype on the way.
TOLERANCES = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-2, 1e-4), torch.bfloat16: (0.1, 1e-2)}

_compared: WeakKeyDictionary = WeakKeyDictionary()  # of each anchor: the forms that were compared with a real backward


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
        self._leaves = list({id(leaf): leaf for use in self._uses for *_, leaf in use.leaves}.values())
        self._form = tuple((use.node.name(), use.flattened) for use in self._uses)
        self._seen = _compared.setdefault(anchor, set())
        self._probe: Tensor | None = None  # (S,), d objective / d log-prob

    @property
    def needs_graph(self) -> bool:
        """Whether the probe's backward must keep it."""
        return self._form not in self._seen or any(use.needs_graph for use in self._uses)

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
        self._probe = gradients[0]

    def tells_apart(self, valid: Tensor) -> bool:
        """Whether the probe gave every pair (B,), of those that count, a weight that can be divided by."""
        return not ((self._probe.abs() < TINY) & valid.repeat(2)).any()

    def compare(self, logps: Tensor) -> None:
        """With a real backward, once for each form that an anchor's graphs take: whether the sequences are apart.

        Raises RuntimeError where they are not: what batch normalisation, say, makes of them is not a sum over them.
        """
        if self._form in self._seen:
            return
        ratio = torch.linspace(0.5, 1.5, self._sequences, dtype=self._probe.dtype, device=self._probe.device)
        norms: dict[int, tuple[Tensor, Tensor]] = {}

        def measure(leaf):
            def hook(exact):
                own = sum(part for use in self._uses for _, part in use.gradients(leaf_uses.Scaled(ratio), leaf))
                norms[id(leaf)] = torch.stack([exact.double().norm(), (own - exact).double().norm()])
                return exact.new_zeros(()).expand_as(exact)  # of the model's size there is never more than one

            return hook

        handles = [leaf.register_hook(measure(leaf)) for leaf in self._leaves]
        try:
            with distributed.no_iteration_of_ddp(logps):
                torch.autograd.grad(logps, self._leaves, ratio * self._probe, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        dtypes = {metadata.dtype for use in self._uses for metadata in use.node._input_metadata}
        relative, absolute = TOLERANCES[next(d for d in reversed(TOLERANCES) if d in dtypes)]
        exact, errors = torch.stack(list(norms.values())).t()
        if not (errors <= relative * exact + absolute * exact.norm()).all():
            raise RuntimeError(
                "share_backward=True gave other gradients than a backward: something in logps_fn mixes the sequences "
                "of a batch (batch normalisation, a router's capacity), or orders them in another way. Use "
                "share_backward=False"
            )
        self._seen.add(self._form)

    def loss(self, loss: Tensor, logps: Tensor) -> Tensor:
        """The loss () of these log-probs, which are a leaf here, as one of the model's leaves."""
        (upstream,) = torch.autograd.grad(loss, logps)
        ratio = torch.where(upstream == 0, upstream, upstream / self._probe)
        self._root = None
        return _SharedLoss.apply(loss.detach(), ratio, self, *self._leaves)

    def gradients(self, ratio: Tensor) -> list[Tensor]:
        """Of every leaf: the sum over sequences of ratio (S,) times the probe's part of its gradient. What was kept
        for it goes on the way."""
        total: dict[int, Tensor] = {}
        scaled = leaf_uses.Scaled(ratio)
        uses, self._uses = self._uses[::-1], []
        while uses:
            for leaf, gradient in uses.pop().gradients(scaled):
                own = total.get(id(leaf))
                total[id(leaf)] = gradient if own is None else own.add_(gradient)
        return [total[id(leaf)] for leaf in self._leaves]


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
        return (None, None, None, *sharing.gradients(ctx.ratio * upstream))
