"""How far a result may be from the float64 reference.

float64: 1e-10, as everywhere in these tests, or a few roundings of the numbers that the result was made of where they
are so large that this is more. The other dtypes: root mean square errors at most 1.5 times those of the eager path, which
is the reference on the inputs as they are. That alone is no fair bound for a handful of numbers: the eager path's
error is now and then zero by luck. So what a correctly rounded result of float32 arithmetic may be off by always passes:

    - the rounding of the result itself to its dtype;
    - ROUNDINGS * 2^-24 of what the result was made of: float32 rounds each of those numbers when it is stored, and a
      difference of large log-probs keeps their error, as does everything that beta multiplies it into. How large these
      numbers are is `Sizes`. Where logits are stored in 16 bits, the same with their digits, if that is a small share of
      the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from configurations import Objective
from grids import spacing

# Exponential, sum, logarithm, difference; or exponential, quotient, difference, product.
ROUNDINGS = 2
# What roundings to 16 bits may always add, of a result's own size: a weight in the logistic's tail goes with e^z.
LEAST_SHARE = 0.25
Results = dict[str, Tensor]


class Sizes(NamedTuple):
    """What rounding errors are relative to."""

    logps: float  # of a sequence's log-prob: itself, and what it is the sum of
    loss: float
    weight: float
    coefficient: float  # |c| of a gradient, c * (softmax - onehot), in which 1 is a number that is rounded
    slope: float  # of c and the softmax, each relative to itself

    def of(self, name: str) -> float:
        """Of a field of the output."""
        return {"loss": self.loss, "weight": self.weight}.get(name, self.logps)


def largest(*tensors: Tensor) -> float:
    """The largest finite magnitude."""
    return max((t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any()), default=0.0)


def sizes_of_logps(truth: Results, tokens: int, upstream: Tensor, logits: float = 1.0) -> Sizes:
    """`tokens`: that a sequence sums; `logits`: what their rounding errors are relative to, or 1 for a softmax's."""
    return Sizes(tokens * logits + largest(truth["logps"]), 0.0, 0.0, largest(upstream), logits)


def sizes_of_loss(
    truth: Results, objective: Objective, tokens: int, pairs: int, upstream: Tensor, logits: float = 1.0
) -> Sizes:
    logps = tokens * logits
    logps += largest(*(truth[name] for name in ("chosen_logps", "rejected_logps", "anchor_margin")))
    beta, sft = objective.beta, objective.sft_weight
    # z and what it is made of; and each pair's share of the NLL, of as many pairs.
    loss = beta * logps + abs(objective.gamma) + 1 + sft * pairs * max(logps, largest(truth["sft_loss"]))
    # w = beta (sigma(-z) - eps): relative to itself, its error is that of z; what is subtracted keeps its own.
    slope = logits + beta * logps
    weight = largest(truth["weight"]) + beta * objective.label_smoothing
    return Sizes(logps, loss, weight * slope, largest(upstream) * (weight + sft), slope)


def assert_close_to_truth(
    name: str,
    found: Tensor,
    truth: Tensor,
    eager: Tensor,
    size: float | Tensor,
    fine: float | Tensor | None = None,
) -> None:
    """`size`: of what the result was made of, for all or each of its elements. fine: where `size` counts roundings to 16
    bits, the same in float32. Such roundings, at their worst all at once, are more than a result is; the eager path has them,
    too, most of them the same. So beyond 1.5 times its error they may be a LEAST_SHARE of the result."""
    expected = truth.to(found.dtype)
    special = ~expected.isfinite()  # also what overflows the result's dtype
    torch.testing.assert_close(
        found.masked_fill(~special, 0),
        expected.masked_fill(~special, 0),
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda text: f"{name}, infinities and NaN: {text}",
    )
    assert found[~special].isfinite().all(), f"{name}: not finite where the reference is: {found}, not {truth}"
    if found.dtype == torch.bool or not found.is_floating_point():
        assert torch.equal(found, truth), f"{name}: {found}, not {truth}"
        return
    error, exact = (found.double() - truth)[~special], truth[~special]
    size, fine = (
        torch.as_tensor(one, dtype=torch.float64, device=truth.device).expand_as(truth)[~special]
        for one in (size, size if fine is None else fine)
    )
    if found.dtype == torch.float64:
        allowed = (ROUNDINGS * 2.0**-53 * size).clamp(min=1e-10) + 1e-10 * exact.abs()
        assert (error.abs() <= allowed).all(), f"{name}: off by {error.abs().max():.2e}: {found}, not {truth}"
        return
    rounded, coarse = _rounding_error(exact, found.dtype), ROUNDINGS * 2.0**-24 * _rms(size)
    floor = rounded + max(ROUNDINGS * 2.0**-24 * _rms(fine), min(coarse, LEAST_SHARE * _rms(exact)))
    of_eager = (eager.double() - truth)[~special].nan_to_num(0, 0, 0)
    allowed = max(1.5 * _rms(of_eager), floor)
    assert _rms(error) <= allowed, (
        f"{name}: error {_rms(error):.2e}, eager {_rms(of_eager):.2e}, correctly rounded {floor:.2e}: {found}, not {truth}"
    )


def _rounding_error(exact: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of the error of numbers rounded to the dtype: at random 1 / sqrt(12) of the distance between
    neighbours, at four standard deviations of that for as many numbers as differ, at most the half of it."""
    if not exact.numel():
        return 0.0
    squares = spacing(exact.abs().unique(), dtype).square()
    independent = squares.sum() ** 2 / squares.square().sum()
    # The square of a number in [-1/2, 1/2] has variance 1/180.
    share = min(1 / 4, 1 / 12 + 4 * (1 / 180 / independent.item()) ** 0.5)
    return _rms(spacing(exact, dtype)) * share**0.5


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
