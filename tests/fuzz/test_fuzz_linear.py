"""`fused_linear_gapo_loss` and `linear_sequence_logps` against the float64 reference, for any head and budget."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from bounds import Results, Sizes, assert_close_to_truth, largest, sizes_of_logps, sizes_of_loss
from configurations import (
    DTYPES,
    INF,
    OBJECTIVES,
    ORDINARY,
    SEEDS,
    SPLITS,
    UPSTREAM,
    Memory,
    Objective,
    Placed,
    Rows,
    make_labels,
    make_values,
    memories,
    rows,
    split_among,
    upstream_gradient,
    vocabularies,
)
from gapo_kernels import fused_linear_gapo_loss, linear_sequence_logps, reference
from gapo_kernels.outputs import GAPOOutput

OPERANDS = ("hidden", "weight", "bias")
# Of the hidden states. float16's largest number is beyond what its gradients hold; the logits' own are the other file's.
FILLS = ["ordinary", "near zero", "wide", "all the same", "NaN somewhere", "NaN where nothing is predicted"]


class Linear(NamedTuple):
    """What both functions take."""

    seed: int
    dtype: torch.dtype
    vocabulary: int
    width: int
    rows: Rows
    fill: str
    hidden: Memory
    weight: Memory
    transposed: bool  # the weight's memory is (H, V)
    bias: bool
    banned: bool  # -inf in the bias of tokens that are no label
    softcap: float | None
    logit_scale: float
    budget: int | None  # rows of logits; 0 is a third of one, None all
    needs: tuple[bool, bool, bool]  # of the operands, which ones require grad
    again: bool  # the gradient compared is that of a second backward on the same graph
    upstream: float
    splits: int | None  # of a row, among the kernels' programs


class LinearLoss(NamedTuple):
    linear: Linear
    objective: Objective
    anchor: str  # "none", "hidden", "hidden and weight" or "margin"
    anchor_fill: str
    anchor_memory: Memory


class LinearLogps(NamedTuple):
    linear: Linear
    length_normalized: bool


def linears(sequences, interpreted):
    return st.builds(
        Linear,
        seed=SEEDS,
        dtype=st.sampled_from(DTYPES),
        vocabulary=vocabularies(interpreted),
        width=st.integers(1, 9),
        rows=rows(sequences, longest=3 if interpreted else 7),
        fill=st.one_of(ORDINARY, st.sampled_from(FILLS)),
        hidden=memories(),
        weight=memories(expanded=False),
        transposed=st.booleans(),
        bias=st.booleans(),
        banned=st.booleans(),
        softcap=st.sampled_from([None, 30.0, 1.5]),
        logit_scale=st.sampled_from([1.0, 0.7, -1.3, 20.0]),
        budget=st.sampled_from([None, 0, 1, 2, 3, 5, 8]),
        needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        again=st.booleans(),
        upstream=UPSTREAM,
        splits=SPLITS,
    )


def losses(interpreted):
    return st.builds(
        LinearLoss,
        linear=linears(st.integers(1, 2 if interpreted else 4).map(lambda pairs: 2 * pairs), interpreted),
        objective=OBJECTIVES,
        anchor=st.sampled_from(["none", "hidden", "hidden and weight", "margin"]),
        anchor_fill=st.one_of(ORDINARY, ORDINARY, st.sampled_from(FILLS)),
        anchor_memory=memories(),
    )


def logps(interpreted):
    return st.builds(
        LinearLogps, linear=linears(st.integers(1, 3 if interpreted else 7), interpreted), length_normalized=st.booleans()
    )


class Problem:
    """A configuration's tensors, and the comparison of what a back end makes of them."""

    def __init__(self, case: Linear, device: torch.device) -> None:
        self.case, self._device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        self._labels = make_labels(case.rows, case.vocabulary, self.generator)
        self.labels = self._labels.to(device)
        self._placed: list[Placed] = []
        self._hidden = self.place_hidden(case.fill, case.hidden)
        self._weight, bias = self.place_weight(), None
        if case.bias:
            bias = torch.randn(case.vocabulary, generator=self.generator)
            if case.banned and case.logit_scale > 0:
                banned = torch.rand(case.vocabulary, generator=self.generator) < 0.3
                banned[self._labels.targets] = False
                bias.masked_fill_(banned, -INF)
            bias = bias.to(device, case.dtype)
        self._bias = bias
        # A GPU's GEMMs write 16-bit logits, and their gradient is written over them; a CPU widens such heads.
        widens = device.type == "cpu" or case.dtype not in (torch.float16, torch.bfloat16)
        self.coarser = 1.0 if widens else torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps
        head = dict(softcap=case.softcap, logit_scale=case.logit_scale)
        layout = dict(cu_seqlens=self.labels.cu_seqlens, shift=case.rows.shift, ignore_index=case.rows.ignore_index)
        self.options = head | layout

    def place(self, values: Tensor, memory: Memory) -> Tensor:
        self._placed.append(Placed(values.to(self._device), memory))
        return self._placed[-1].view

    def place_hidden(self, fill: str, memory: Memory) -> Tensor:
        case = self.case
        return self.place(make_values(fill, case.width, self._labels, self.generator, case.dtype), memory)

    def place_weight(self) -> Tensor:
        case = self.case
        weight = torch.randn(case.vocabulary, case.width, generator=self.generator).to(case.dtype)
        if case.transposed:
            return self.place(weight.t().contiguous(), case.weight).t()
        return self.place(weight, case.weight)

    def run(self, function, operands: list[Tensor | None], upstream: Tensor, **options) -> Results:
        """The output's fields, and the gradients that are needed."""
        needs = [needed and tensor is not None for needed, tensor in zip(self.case.needs, operands)]
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().requires_grad_(needed) for tensor, needed in zip(operands, needs)
        )
        out = function(hidden, weight, self.labels.labels, bias=bias, **options)
        fields = out._asdict() if isinstance(out, GAPOOutput) else dict(zip(("logps", "counts"), out))
        value = next(iter(fields.values()))
        results = {name: field.detach() for name, field in fields.items()}
        wanted = [name for name, needed in zip(OPERANDS, needs) if needed]
        leaves = [leaf for leaf, needed in zip((hidden, weight, bias), needs) if needed]
        if not leaves:
            assert not value.requires_grad
            return results
        upstream = upstream.to(value.dtype)
        if self.case.again:
            torch.autograd.grad(value, leaves, upstream * 0.5, retain_graph=True)
        gradients = torch.autograd.grad(value, leaves, upstream)
        return results | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}

    def eager(self, function, operands: list[Tensor | None], upstream: Tensor, without: Tensor, **options) -> Results:
        """What the reference makes of the operands. It multiplies hidden states of rows that take no part by zero, and
        NaN among them reach its gradients of the head: there such rows are zeros. `without` (R,): these rows."""
        results = self.run(function, operands, upstream, **options)
        blank = operands[0].masked_fill(without.view(self.labels.labels.shape).unsqueeze(-1), 0)
        gradients = self.run(function, [blank, *operands[1:]], upstream, **options)
        return results | {name: gradient for name, gradient in gradients.items() if name.startswith("d ")}

    def logits_size(self, anchor_hidden: Tensor | None = None, anchor_weight: Tensor | None = None, **_) -> float:
        """What rounding errors of the logits, to float32, are relative to: the root of the sum of squares of what they sum."""
        weights = (self._weight, self._weight if anchor_weight is None else anchor_weight)
        bias = 0.0 if self._bias is None else largest(self._bias)
        sums = [
            hidden.double().nan_to_num(0).square() @ weight.double().square().t()
            for hidden, weight in zip((self._hidden, anchor_hidden), weights)
            if hidden is not None
        ]
        return 1 + abs(self.case.logit_scale) * (largest(*sums) ** 0.5 + bias)

    def compare(self, functions, sizes_of, backend: str, upstream: Tensor, in_pairs: bool, anchors=None, **options):
        """`functions`: the one under test, and the reference's; `sizes_of(truth, logits)`: bounds.Sizes."""
        case = self.case
        function, eager_function = functions
        options |= self.options
        anchors = anchors or {}
        operands = [self._hidden, self._weight, self._bias]
        without = self.labels.without_pair.clone() if in_pairs else torch.zeros_like(self.labels.without_pair)
        ignored = torch.ones_like(without)
        ignored[self.labels.predicted] = False
        without |= ignored
        in_float64 = [None if t is None else t.double() for t in operands]
        anchors_in_float64 = {name: t.double() for name, t in anchors.items()}
        truth = self.eager(eager_function, in_float64, upstream, without, **anchors_in_float64, **options)
        eager = self.eager(eager_function, operands, upstream, without, **anchors, **options)
        row = case.vocabulary * max(4, case.dtype.itemsize)
        budget = 2**30 if case.budget is None else case.budget * row or max(8, row // 3)
        with split_among(case.splits):
            found = self.run(function, operands, upstream, max_logits_bytes=budget, backend=backend, **anchors, **options)
        for placed in self._placed:
            placed.check()
        assert found.keys() == truth.keys()
        logits = self.logits_size(**anchors)
        both = [(sizes_of(truth, logits * coarser), coarser) for coarser in (self.coarser, 1.0)]
        for name, expected in truth.items():
            if name.startswith("d "):
                magnitude = expected.nan_to_num(0).abs()
                size = [magnitude * one.slope + coarser * self._gradient_size(name, one) for one, coarser in both]
            else:
                size = [both[0][0].of(name)]
            assert_close_to_truth(name, found[name], expected, eager[name], *size)
        if "d hidden" in found:
            assert found["d hidden"].dtype == case.dtype
            assert (found["d hidden"].flatten(0, -2)[ignored] == 0).all(), "a gradient where nothing is predicted"

    def _gradient_size(self, name: str, sizes: Sizes) -> float:
        """Of one of the products that a gradient sums."""
        other = {"d hidden": self._weight, "d weight": self._hidden, "d bias": torch.ones(1)}[name]
        return sizes.coefficient * abs(self.case.logit_scale) * largest(other)


def test_fused_linear_gapo_loss(explore, backend, device, interpreted):
    def check(configuration: LinearLoss):
        problem, objective = Problem(configuration.linear, device), configuration.objective
        lengths = configuration.linear.rows.lengths
        pairs, tokens = len(lengths) // 2, 1 if objective.length_normalized else max(lengths)
        anchors = {}
        if configuration.anchor.startswith("hidden"):
            fill, memory = configuration.anchor_fill, configuration.anchor_memory
            anchors["anchor_hidden"] = problem.place_hidden(fill, memory)
        if configuration.anchor == "hidden and weight":
            anchors["anchor_weight"] = problem.place_weight()
        if configuration.anchor == "margin":
            anchors["anchor_margin"] = torch.randn(pairs, generator=problem.generator).to(device)
        shape = () if objective.reduction == "mean" else (pairs,)
        upstream = upstream_gradient(shape, configuration.linear.upstream, problem.generator).to(device)

        def sizes(truth, logits):
            return sizes_of_loss(truth, objective, tokens, pairs, upstream, logits)

        functions = (fused_linear_gapo_loss, reference.fused_linear_gapo_loss)
        problem.compare(functions, sizes, backend, upstream, True, anchors, **objective._asdict())

    explore("fused_linear_gapo_loss", check, losses(interpreted))


def test_linear_sequence_logps(explore, backend, device, interpreted):
    def check(configuration: LinearLogps):
        problem, lengths = Problem(configuration.linear, device), configuration.linear.rows.lengths
        normalized = configuration.length_normalized
        upstream = upstream_gradient((len(lengths),), configuration.linear.upstream, problem.generator).to(device)

        def sizes(truth, logits):
            return sizes_of_logps(truth, 1 if normalized else max(lengths), upstream, logits)

        functions = (linear_sequence_logps, reference.linear_sequence_logps)
        options = dict(length_normalized=normalized, return_counts=True)
        problem.compare(functions, sizes, backend, upstream, False, **options)

    explore("linear_sequence_logps", check, logps(interpreted))
