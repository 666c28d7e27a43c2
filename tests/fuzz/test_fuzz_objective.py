"""`gapo_objective` in every dtype against itself in float64, and against what its parts must add up to."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from bounds import Results, assert_close_to_truth, largest
from configurations import DTYPES, INF, NAN, OBJECTIVES, SEEDS, UPSTREAM, Objective, upstream_gradient
from gapo_kernels import gapo_objective


class Margins(NamedTuple):
    seed: int
    pairs: int
    dtype: torch.dtype
    spread: float
    special: tuple[float, ...]  # the first margins
    anchor: torch.dtype | None  # of the anchor's margins, if there are any
    valid: float | None  # share of the pairs, None for no argument
    objective: Objective
    upstream: float


MARGINS = st.builds(
    Margins,
    seed=SEEDS,
    pairs=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1.0, 0.01, 30.0, 1e4]),
    special=st.one_of(st.just(()), st.lists(st.sampled_from([0.0, INF, -INF, NAN]), max_size=3).map(tuple)),
    anchor=st.sampled_from([None, *DTYPES]),
    valid=st.sampled_from([None, 0.0, 0.5, 1.0]),
    objective=OBJECTIVES,
    upstream=UPSTREAM,
)


def run(margin: Tensor, anchor: Tensor | None, valid: Tensor | None, upstream: Tensor, **options) -> Results:
    margin = margin.detach().requires_grad_()
    loss, weight = gapo_objective(margin, anchor, valid=valid, **options)
    (gradient,) = torch.autograd.grad(loss, margin, upstream.to(loss.dtype))
    return {"loss": loss.detach(), "weight": weight, "gradient": gradient}


def check_objective(case: Margins) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    margin = torch.randn(case.pairs, generator=generator).mul_(case.spread)
    special = torch.tensor(case.special[: case.pairs])
    margin[: len(special)] = special
    margin, anchor, valid = margin.to(case.dtype), None, None
    if case.anchor is not None:
        anchor = torch.randn(case.pairs, generator=generator).mul_(case.spread).to(case.anchor)
    if case.valid is not None:
        valid = torch.rand(case.pairs, generator=generator) < case.valid
    options = case.objective._asdict()
    reduction = options.pop("reduction")
    del options["length_normalized"], options["sft_weight"]
    shape = () if reduction == "mean" else (case.pairs,)
    upstream = upstream_gradient(shape, case.upstream, generator)

    in_float64 = (margin.double(), None if anchor is None else anchor.double(), valid)
    truth = run(*in_float64, upstream, reduction=reduction, **options)
    found = run(margin, anchor, valid, upstream, reduction=reduction, **options)
    beta, gamma = options["beta"], options["gamma"]
    z = beta * largest(margin.float(), *([] if anchor is None else [anchor.float()])) + abs(gamma) + 1
    sizes = {"loss": z, "weight": beta * z, "gradient": beta * z * largest(upstream)}
    for name, expected in truth.items():
        # There is no other eager path: rounding alone is allowed.
        assert_close_to_truth(name, found[name], expected, expected, sizes[name])
    assert found["gradient"].dtype == case.dtype

    # w = -dL/dM of each pair, inert pairs have none, and the mean is over the others.
    each = run(*in_float64, torch.ones(case.pairs), reduction="none", **options)
    torch.testing.assert_close(each["weight"], -each["gradient"], rtol=1e-10, atol=1e-10, equal_nan=True)
    assert torch.equal(each["weight"].nan_to_num(), truth["weight"].nan_to_num())
    counted = torch.ones(case.pairs, dtype=torch.bool) if valid is None else valid
    assert not each["loss"][~counted].any() and not each["weight"][~counted].any()
    mean = gapo_objective(*in_float64[:2], valid=valid, **options)[0]
    wanted = each["loss"][counted].mean() if counted.any() else torch.tensor(0.0).double()
    torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-10, equal_nan=True)
    # A NaN stays in its own pair.
    undefined = margin.isnan() & counted
    assert torch.equal(each["loss"].isnan(), undefined) and torch.equal(each["weight"].isnan(), undefined)


def test_gapo_objective(explore):
    explore("gapo_objective", check_objective, MARGINS)
