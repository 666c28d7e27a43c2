"""`GeometricAnchor`: random weights are moved where float64 says, on their grid, and come back bit for bit."""

import math
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from configurations import DTYPES, INF, NAN, SEEDS, Memory, Placed, memories
from gapo_kernels import GeometricAnchor, displacement
from grids import BF16, F16, assert_rounded, bits, cast_to_grid, coarsest
from test_anchor_rounding import Keeps

SMALL = st.one_of(
    st.tuples(),
    st.tuples(st.integers(0, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
)
TILES = st.sampled_from([(1023,), (8191,), (8193,), (3, 5001)])
CHUNKS = st.sampled_from([(200_003,), (800, 501)])
# The lower ones are those of float16's subnormal numbers, on whose grid wider dtypes' weights may be as well.
POWERS = st.one_of(st.integers(-6, 6), st.integers(-20, -7))
# How a gradient comes out of the objective's backward: in memory of its own, as a view, expanded, as one tensor for two
# parameters, as what the graph keeps for its next backward, looked at by a hook; or not at all.
SOURCES = ["product", "linear", "sum", "shared", "kept", "hook", "none"]


class Weight(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: Memory
    transposed: bool  # first and last dimension, in memory
    power: int  # of two, that the values are multiplied by
    awkward: bool  # among them zeros, subnormal numbers and, where their gradient does not depend on them, NaN and inf
    source: str  # of SOURCES


class Gradient(NamedTuple):
    """One that is passed in, for the weight of the same number."""

    dtype: torch.dtype
    memory: Memory
    transposed: bool
    power: int


class Anchor(NamedTuple):
    seed: int
    weights: tuple[Weight, ...]
    gradients: tuple[Gradient, ...] | None  # None: from an objective
    broken: float | None  # NaN or inf in the gradients that are passed in
    rho: float
    geometry: str
    direction: str
    rounding: str
    compute_dtype: torch.dtype | None
    anchor_seed: int
    step: int


def anchors(interpreted):
    weight = st.builds(
        Weight,
        shape=st.one_of(SMALL, SMALL, TILES, *([] if interpreted else [CHUNKS])),
        dtype=st.sampled_from(DTYPES),
        memory=memories(expanded=False),
        transposed=st.booleans(),
        power=POWERS,
        awkward=st.booleans(),
        source=st.sampled_from(SOURCES),
    )
    gradient = st.builds(
        Gradient,
        dtype=st.sampled_from(DTYPES),
        memory=memories(),
        transposed=st.booleans(),
        power=POWERS,
    )
    numbers = st.integers(1, 2 if interpreted else 4)
    return st.builds(
        Anchor,
        seed=SEEDS,
        weights=numbers.flatmap(lambda n: st.tuples(*[weight] * n)),
        gradients=st.one_of(st.none(), st.tuples(*[gradient] * 4)),
        broken=st.sampled_from([None] * 8 + [NAN, INF]),
        rho=st.sampled_from([0.05, 0.5, 5.0, 0.0]),
        geometry=st.sampled_from(["asam", "sam"]),
        direction=st.sampled_from(["pessimistic"] * 3 + ["gaussian"]),
        rounding=st.sampled_from(["stochastic", "nearest"]),
        compute_dtype=st.sampled_from([None, *DTYPES]),
        anchor_seed=st.sampled_from([0, 1, -5, 2**40 + 1, 2**64 - 1]),
        step=st.sampled_from([0, 1, 2**31]),
    )


class Problem:
    """A configuration's parameters, and what their gradients come from."""

    def __init__(self, case: Anchor, device: torch.device) -> None:
        self.case, self._device = case, device
        self._generator = torch.Generator().manual_seed(case.seed)
        self._placed: list[Placed] = []
        self.params, terms = [], []
        self._seen: list[Tensor] = []  # by hooks
        for weight in case.weights:
            param = self._param(weight)
            self.params.append(param)
            if weight.source == "shared":
                other = self._param(weight)
                self.params.append(other)
                terms.append(((param + other) * self._normal(weight.shape, weight.dtype)).sum())
            elif weight.source != "none":
                terms.append(self._term(weight, param))
        self._objective = torch.stack([term.double() for term in terms]).sum() if terms else None
        self._given: list[Tensor | None] | None = None
        if case.gradients is not None:
            self._given = [self._gradient(*one) for one in zip(self._sources(), case.gradients * 2, self.params)]

    def _sources(self) -> list[str]:
        return [weight.source for weight in self.case.weights for _ in range(1 + (weight.source == "shared"))]

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._device, dtype)

    def _place(self, values: Tensor, memory: Memory, transposed: bool) -> Tensor:
        if not values.dim():
            return self._place(values.view(1), memory, transposed).view(())
        if transposed:
            return self._place(values.transpose(0, -1).contiguous(), memory, False).transpose(0, -1)
        self._placed.append(Placed(values, memory))
        return self._placed[-1].view

    def _param(self, weight: Weight) -> nn.Parameter:
        values = self._normal(weight.shape, torch.float64).mul_(2.0**weight.power).to(weight.dtype)
        if weight.awkward:
            tiny = torch.finfo(weight.dtype).smallest_normal
            strange = [0.0, -0.0, tiny, -tiny / 4]
            if self.case.geometry == "sam" and weight.source != "kept":
                strange += [NAN, INF, -INF]
            flat = values.view(-1)[: len(strange)]
            flat.copy_(torch.tensor(strange[: len(flat)], dtype=torch.float64))
        return nn.Parameter(self._place(values, weight.memory, weight.transposed))

    def _term(self, weight: Weight, param: nn.Parameter) -> Tensor:
        if weight.source == "sum":
            return param.sum()
        if weight.source == "linear" and param.dim() == 2:
            return F.linear(self._normal((3, param.shape[1]), param.dtype), param).sum()
        if weight.source == "kept":
            return Keeps.apply(torch.ones_like(param), param, True)
        if weight.source == "hook":
            param.register_hook(self._seen.append)
        return (param * self._normal(weight.shape, weight.dtype)).sum()

    def _gradient(self, source: str, gradient: Gradient, param: nn.Parameter) -> Tensor | None:
        if source == "none":
            return None
        values = self._normal(param.shape, torch.float64).mul_(2.0**gradient.power).to(gradient.dtype)
        if self.case.broken is not None:
            values.view(-1)[-1:] = self.case.broken
        memory = gradient.memory
        return self._place(values, memory._replace(expanded=memory.expanded and values.dim() > 0), gradient.transposed)

    def arguments(self) -> dict:
        """perturbed()'s."""
        if self.case.direction == "gaussian":
            return {}
        return dict(objective=self._objective) if self._given is None else dict(grads=self._given)

    def directions(self) -> list[Tensor | None]:
        """g of each parameter, in memory of its own."""
        if self.case.direction == "gaussian":
            return displacement.noise(self.params, self.case.step, self.case.anchor_seed % 2**64)
        if self._given is not None:
            return [None if gradient is None else gradient.clone() for gradient in self._given]
        if self._objective is None:
            return [None] * len(self.params)
        gradients = torch.autograd.grad(self._objective, self.params, retain_graph=True, allow_unused=True)
        return [None if gradient is None else gradient.clone() for gradient in gradients]

    def check_untouched(self, directions: list[Tensor | None]) -> None:
        """Weights, gradients that were passed in, and what the graph and hooks have: as before."""
        for placed in self._placed:
            placed.check()
        assert all(param.grad is None for param in self.params)
        for one, other in zip(self.directions(), directions):
            assert one is other is None or torch.equal(bits(one.contiguous()), bits(other.contiguous()))
        hooked = [g for source, g in zip(self._sources(), directions) if source == "hook" and self._given is None]
        for seen in self._seen:
            assert any(seen.shape == g.shape and torch.equal(seen, g) for g in hooked)


def check_anchor(case: Anchor, device: torch.device) -> None:
    problem = Problem(case, device)
    params = problem.params
    keywords = dict(rho=case.rho, geometry=case.geometry, direction=case.direction, rounding=case.rounding)
    keywords |= dict(compute_dtype=case.compute_dtype, seed=case.anchor_seed)
    if any({case.compute_dtype, param.dtype} == {BF16, F16} for param in params):
        with pytest.raises(ValueError, match="cannot hold the values of compute_dtype"):
            GeometricAnchor(params, **keywords)
        return
    anchor = GeometricAnchor(params, **keywords)
    state = {"step": case.step, "seed": case.anchor_seed}
    anchor.load_state_dict(state)
    directions = problem.directions()
    before = [param.detach().clone() for param in params]
    pairs = [(t.double(), g.double()) for t, g in zip(before, directions) if g is not None]
    norm = math.sqrt(sum((t * g if case.geometry == "asam" else g).square().sum().item() for t, g in pairs))
    failure = None if math.isfinite(norm) else FloatingPointError
    if all(direction is None for direction in directions):
        failure = ValueError
    if failure is not None:
        with pytest.raises(failure), anchor.perturbed(**problem.arguments()):
            pytest.fail("entered")
        problem.check_untouched(directions)
        assert anchor.state_dict() == state
        return
    anchor_weights = []
    for _ in range(2):  # a repetition from the same state is the same, bit for bit
        anchor.load_state_dict(state)
        with anchor.perturbed(**problem.arguments()):
            anchor_weights.append([param.detach().clone() for param in params])
            stats = repr(anchor.stats)
        problem.check_untouched(directions)
        assert repr(anchor.stats) == stats
        assert anchor.state_dict() == {"step": case.step + 1, "seed": case.anchor_seed}
    moved, again = anchor_weights
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(moved, again))
    assert anchor.stats.grad_norm == pytest.approx(norm, **NEAR)
    check_weights(case, anchor, before, moved, directions)


# Of norms, whose squares are summed in float32 in short parts: where they are all alike, as those of an expanded gradient,
# each addition is rounded in the same direction.
NEAR = dict(rel=1e-5, abs=1e-18)


def check_weights(
    case: Anchor, anchor: GeometricAnchor, before: list[Tensor], moved: list[Tensor], directions: list[Tensor | None]
) -> None:
    """Where the weights were, and that the statistics say so."""
    step_size = case.rho / (anchor.stats.grad_norm + 1e-12)
    intended, applied, changed = 0.0, 0.0, 0
    for theta, at, g in zip(before, moved, directions):
        if g is None:
            assert torch.equal(bits(theta), bits(at))
            continue
        grid = coarsest(case.compute_dtype or theta.dtype, theta.dtype)
        base = cast_to_grid(theta, grid)
        delta = step_size * (theta.double().square() * g.double() if case.geometry == "asam" else g.double())
        finite = base.isfinite()
        assert torch.equal(at.isfinite(), finite)
        assert_rounded(at[finite], theta[finite], grid, base[finite], delta[finite], case.rounding == "stochastic")
        anchor_on_grid = cast_to_grid(at, grid)
        intended += delta.square().sum().item()
        applied += (anchor_on_grid - base).square().sum().item()
        changed += (anchor_on_grid != base).sum().item()
    stats = anchor.stats
    assert stats.intended_norm == pytest.approx(math.sqrt(intended), **NEAR)
    if math.isfinite(applied):
        assert stats.applied_norm == pytest.approx(math.sqrt(applied), **NEAR)
        assert stats.changed_fraction == changed / max(1, sum(theta.numel() for theta in before))


def test_geometric_anchor(explore, passes, device, interpreted):
    def check(configuration: Anchor):
        with warnings.catch_warnings():  # of perturbations that rounding to nearest loses
            warnings.simplefilter("ignore", UserWarning)
            check_anchor(configuration, device)

    explore("GeometricAnchor", check, anchors(interpreted))
