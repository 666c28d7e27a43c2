"""Batches of preference pairs for the tests, and the comparison of a back end with the float64 reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gapo_kernels import fused_gapo_loss, reference, sequence_logps


class Batch(NamedTuple):
    logits: Tensor  # (S, T, V) or (N, V)
    anchor_logits: Tensor
    labels: Tensor  # (S, T) or (N,), about 40 % of them -100
    cu_seqlens: Tensor | None  # (S + 1,)

    def to(self, dtype: torch.dtype) -> Batch:
        return self._replace(logits=self.logits.to(dtype), anchor_logits=self.anchor_logits.to(dtype))


def make_batch(
    sequences: int = 4,
    length: int = 5,
    vocabulary: int = 67,
    *,
    packed: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    ignore_index: int = -100,
    seed: int = 0,
) -> Batch:
    """Random logits, a unit or two apart. Every sequence predicts a token, whatever the shift, where length >= 2."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, vocabulary, dtype=torch.float64, generator=generator).mul_(1.5)

    labels = torch.randint(vocabulary, (sequences, length), generator=generator)
    ignored = torch.rand(sequences, length, generator=generator) < 0.4
    ignored[:, 1:2] = False
    labels[ignored] = ignore_index
    shape, cu_seqlens = (sequences, length), None
    if packed:
        lengths = torch.randint(min(2, length), length + 1, (sequences,), generator=generator)
        labels = torch.cat([row[:n] for row, n in zip(labels, lengths)])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device)
        shape = labels.shape
    return Batch(random(*shape).to(device, dtype), random(*shape).to(device, dtype), labels.to(device), cu_seqlens)


class Results(NamedTuple):
    fields: dict[str, Tensor]
    gradient: Tensor  # d (loss . upstream) / d logits, or of the log-probs


def run_loss(batch: Batch, backend: str, upstream: Tensor | None = None, **keywords) -> Results:
    """fused_gapo_loss and its gradient; backend "eager" is the reference on the inputs as they are."""
    logits = batch.logits.detach().requires_grad_()
    function = reference.fused_gapo_loss if backend == "eager" else fused_gapo_loss
    if backend != "eager":
        keywords["backend"] = backend
    out = function(logits, batch.labels, cu_seqlens=batch.cu_seqlens, **keywords)
    if upstream is None:
        upstream = torch.ones_like(out.loss)
    (gradient,) = torch.autograd.grad(out.loss, logits, upstream.to(out.loss.dtype))
    return Results({name: field.detach() for name, field in out._asdict().items()}, gradient)


def run_logps(batch: Batch, backend: str, upstream: Tensor | None = None, **keywords) -> Results:
    """sequence_logps and its gradient; backend "eager" is the reference on the inputs as they are."""
    logits = batch.logits.detach().requires_grad_()
    function = reference.sequence_logps if backend == "eager" else sequence_logps
    if backend != "eager":
        keywords["backend"] = backend
    logps, counts = function(logits, batch.labels, cu_seqlens=batch.cu_seqlens, return_counts=True, **keywords)
    if upstream is None:
        upstream = torch.ones_like(logps)
    (gradient,) = torch.autograd.grad(logps, logits, upstream.to(logps.dtype))
    return Results({"logps": logps.detach(), "counts": counts}, gradient)


def in_float64(run, batch: Batch, upstream: Tensor | None = None, **keywords) -> Results:
    """The truth: the reference in float64 on the same numbers."""
    if keywords.get("anchor_logits") is not None:
        keywords["anchor_logits"] = keywords["anchor_logits"].double()
    if keywords.get("anchor_margin") is not None:
        keywords["anchor_margin"] = keywords["anchor_margin"].double()
    return run(batch._replace(logits=batch.logits.double()), "eager", upstream, **keywords)


def assert_same(found: Results, expected: Results, tolerance: float = 1e-10, context: object = "") -> None:
    """Every field and the gradient, NaN equal to NaN, an absolute and relative tolerance."""
    pairs = [(name, found.fields[name], field) for name, field in expected.fields.items()]
    for name, have, want in [*pairs, ("gradient", found.gradient, expected.gradient)]:
        torch.testing.assert_close(
            have.to(want.dtype),
            want,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name} {context}: {text}",
        )


def assert_equals_reference(
    run, batch: Batch, backend: str, upstream: Tensor | None = None, tolerance: float = 1e-10, **keywords
) -> Results:
    """Every field and the gradient equal the float64 reference; returns what was found."""
    # first, because with inplace_backward the logits are gone afterwards
    expected = in_float64(run, batch, upstream, **{k: v for k, v in keywords.items() if k != "inplace_backward"})
    found = run(batch, backend, upstream, **keywords)
    assert_same(found, expected, tolerance, {k: v for k, v in keywords.items() if not isinstance(v, Tensor)})
    return found
