"""`fused_gapo_loss` and `sequence_logps` against the float64 reference, on random configurations of everything."""

from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st

from batches import Batch, in_float64, run_logps, run_loss
from bounds import assert_close_to_truth, sizes_of_logps, sizes_of_loss
from configurations import (
    DTYPES,
    FILLS,
    OBJECTIVES,
    ORDINARY,
    SEEDS,
    SPLITS,
    UPSTREAM,
    Labels,
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
from gapo_kernels import cpu


class Logits(NamedTuple):
    """What both functions take."""

    seed: int
    dtype: torch.dtype
    vocabulary: int
    rows: Rows
    fill: str
    memory: Memory
    upstream: float
    inplace_backward: bool
    block: int | None  # rows that the CPU path takes at a time
    splits: int | None  # of a row, among the kernels' programs


class Loss(NamedTuple):
    logits: Logits
    objective: Objective
    anchor: str  # "none", "logits" or "margin"
    anchor_fill: str
    anchor_memory: Memory
    margin_dtype: torch.dtype


class Logps(NamedTuple):
    logits: Logits
    length_normalized: bool


def logits(sequences, interpreted):
    return st.builds(
        Logits,
        seed=SEEDS,
        dtype=st.sampled_from(DTYPES),
        vocabulary=vocabularies(interpreted),
        rows=rows(sequences, longest=3 if interpreted else 7),
        fill=st.one_of(ORDINARY, st.sampled_from(list(FILLS))),
        memory=memories(),
        upstream=UPSTREAM,
        inplace_backward=st.booleans(),
        block=st.sampled_from([None, 1, 2, 5]),
        splits=SPLITS,
    )


def losses(interpreted):
    return st.builds(
        Loss,
        logits=logits(st.integers(1, 2 if interpreted else 4).map(lambda pairs: 2 * pairs), interpreted),
        objective=OBJECTIVES,
        anchor=st.sampled_from(["none", "logits", "margin"]),
        anchor_fill=st.one_of(ORDINARY, ORDINARY, st.sampled_from(list(FILLS))),
        anchor_memory=memories(),
        margin_dtype=st.sampled_from(DTYPES),
    )


def logps(interpreted):
    return st.builds(
        Logps, logits=logits(st.integers(1, 3 if interpreted else 7), interpreted), length_normalized=st.booleans()
    )


def blocks_of(case: Logits):
    """The CPU path takes this many rows at a time."""
    if case.block is None:
        return nullcontext()
    itemsize = max(4, case.dtype.itemsize)
    return mock.patch.object(cpu, "SCRATCH_BYTES", case.block * case.vocabulary * itemsize)


class Problem:
    """A configuration's tensors, and the comparison of what a back end makes of them."""

    def __init__(self, case: Logits, device: torch.device) -> None:
        self.case, self._device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        self.labels: Labels = make_labels(case.rows, case.vocabulary, self.generator).to(device)
        self._placed: list[Placed] = []
        self.logits = self.place(case.fill, case.memory)
        self.options = dict(shift=case.rows.shift, ignore_index=case.rows.ignore_index)
        # Where several logits share memory the gradient cannot replace them: refused, which tests/test_loss.py holds.
        self.inplace = case.inplace_backward and not case.memory.expanded

    def place(self, fill: str, memory: Memory) -> torch.Tensor:
        on_host = self.labels.to(torch.device("cpu"))
        values = make_values(fill, self.case.vocabulary, on_host, self.generator, self.case.dtype)
        self._placed.append(Placed(values.to(self._device), memory))
        return self._placed[-1].view

    def compare(self, run, sizes_of, backend, upstream, **options) -> None:
        """`sizes_of(truth)`: bounds.Sizes."""
        batch = Batch(self.logits, None, self.labels.labels, self.labels.cu_seqlens)
        options |= self.options
        truth = in_float64(run, batch, upstream, **options)
        eager = run(batch, "eager", upstream, **options)
        with blocks_of(self.case), split_among(self.case.splits):
            found = run(batch, backend, upstream, inplace_backward=self.inplace, **options)
        first, *others = self._placed
        first.check(written=self.inplace)
        for placed in others:
            placed.check()
        sizes = sizes_of(truth.fields)
        for name, field in truth.fields.items():
            assert_close_to_truth(name, found.fields[name], field, eager.fields[name], sizes.of(name))
        assert found.gradient.dtype == self.case.dtype
        assert (found.gradient[(truth.gradient == 0).all(-1)] == 0).all(), "a gradient where there is none"
        gradients = (found.gradient, truth.gradient, eager.gradient)
        size = truth.gradient.nan_to_num(0).abs() * sizes.slope
        size.view(-1, self.case.vocabulary)[self.labels.predicted, self.labels.targets] += sizes.coefficient
        assert_close_to_truth("gradient", *gradients, size)


def test_fused_gapo_loss(explore, backend, device, interpreted):
    def check(configuration: Loss):
        problem, objective = Problem(configuration.logits, device), configuration.objective
        pairs = len(configuration.logits.rows.lengths) // 2
        anchors = {}
        if configuration.anchor == "logits":
            anchors["anchor_logits"] = problem.place(configuration.anchor_fill, configuration.anchor_memory)
        elif configuration.anchor == "margin":
            margin = torch.randn(pairs, generator=problem.generator).to(device, configuration.margin_dtype)
            anchors["anchor_margin"] = margin
        shape = () if objective.reduction == "mean" else (pairs,)
        upstream = upstream_gradient(shape, configuration.logits.upstream, problem.generator).to(device)
        tokens = 1 if objective.length_normalized else max(configuration.logits.rows.lengths)

        def sizes(truth):
            return sizes_of_loss(truth, objective, tokens, pairs, upstream)

        problem.compare(run_loss, sizes, backend, upstream, **anchors, **objective._asdict())

    explore("fused_gapo_loss", check, losses(interpreted))


def test_sequence_logps(explore, backend, device, interpreted):
    def check(configuration: Logps):
        problem, lengths = Problem(configuration.logits, device), configuration.logits.rows.lengths
        normalized = configuration.length_normalized
        upstream = upstream_gradient((len(lengths),), configuration.logits.upstream, problem.generator).to(device)

        def sizes(truth):
            return sizes_of_logps(truth, 1 if normalized else max(lengths), upstream)

        problem.compare(run_logps, sizes, backend, upstream, length_normalized=normalized)

    explore("sequence_logps", check, logps(interpreted))
