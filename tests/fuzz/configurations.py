"""Random batches as plain values, which print as such when a test fails, and the tensors that they stand for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from gapo_kernels.layout import align_targets, sequence_of_rows
from grids import bits

try:
    from gapo_kernels.kernels import config
except ImportError:  # no Triton
    config = None

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = torch.inf, torch.nan
SEEDS = st.integers(0, 2**16)


# ---- Memory ----


class Memory(NamedTuple):
    """Where values (..., X) lie in a larger tensor."""

    steps: tuple[int, int] = (1, 1)  # of the larger tensor's sequences, and of its rows, every n-th is taken
    before: int = 0  # elements of the larger tensor before each row
    after: int = 0
    swapped: bool = False  # rows outside, sequences inside
    expanded: bool = False  # one sequence's memory (packed: one row's) for all


def memories(expanded: bool = True) -> st.SearchStrategy[Memory]:
    anywhere = st.builds(
        Memory,
        steps=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        before=st.integers(0, 9),
        after=st.integers(0, 9),
        swapped=st.booleans(),
        expanded=st.integers(0, 5).map(lambda n: n == 5) if expanded else st.just(False),
    )
    return st.one_of(st.just(Memory()), anywhere)


class Placed:
    """Values in their memory: reading or writing outside of them shows."""

    def __init__(self, values: Tensor, memory: Memory) -> None:
        shape = values.shape
        values = values[:1] if memory.expanded else values
        steps = memory.steps[: values.dim() - 1]
        outer = [n * step for n, step in zip(values.shape, steps)]
        swapped = memory.swapped and len(outer) == 2
        base_shape = (*(reversed(outer) if swapped else outer), memory.before + shape[-1] + memory.after)
        self._base = torch.full(base_shape, NAN, dtype=values.dtype, device=values.device)
        self._outside = torch.ones(base_shape, dtype=torch.bool, device=values.device)
        key = (*(slice(None, None, step) for step in steps), slice(memory.before, memory.before + shape[-1]))
        base, outside = ((t.transpose(0, 1) if swapped else t) for t in (self._base, self._outside))
        base[key].copy_(values)
        outside[key] = False
        self._saved = self._base.clone()
        self.view = base[key].expand(shape)

    def check(self, written: bool = False) -> None:
        """Nothing but, at most, the values themselves was written."""
        assert self._base[self._outside].isnan().all(), "written outside of the view"
        assert written or torch.equal(bits(self._base), bits(self._saved)), "an input was changed"


# ---- Sequences and their labels ----


def _prompts(kept: Tensor, generator: torch.Generator) -> Tensor:
    begins = torch.randint(kept.shape[1] + 1, (kept.shape[0], 1), generator=generator)
    return torch.arange(kept.shape[1]) >= begins


def _one_only(kept: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.zeros_like(kept)
    if kept.numel():
        chosen.view(-1)[torch.randint(kept.numel(), (), generator=generator)] = True
    return chosen


def _but_one_sequence(kept: Tensor, generator: torch.Generator) -> Tensor:
    return kept.index_fill(0, torch.randint(kept.shape[0], (1,), generator=generator), False)


# Which labels are kept, from a tensor of True (S, T).
MASKS = {
    "some": lambda kept, generator: torch.rand(kept.shape, generator=generator) > 0.4,
    "every label": lambda kept, generator: kept,
    "completions": _prompts,
    "all but one sequence's": _but_one_sequence,
    "one label": _one_only,
    "no label": lambda kept, generator: ~kept,
}


class Rows(NamedTuple):
    """Sequences of rows, and which of them predict a label."""

    lengths: tuple[int, ...]  # of each sequence; the rest is padding, unless packed
    packed: bool
    kept: str  # of MASKS
    shift: bool
    ignore_index: int
    label_dtype: torch.dtype
    gaps: bool  # labels and cu_seqlens are not contiguous
    first_is_no_token: bool  # with shift nothing predicts a sequence's first label: it may be anything


def rows(sequences: st.SearchStrategy[int], longest: int) -> st.SearchStrategy[Rows]:
    # One in three may predict nothing, whatever its labels are.
    length = st.one_of(st.integers(2, longest), st.integers(2, longest), st.integers(0, longest))
    return st.builds(
        Rows,
        lengths=sequences.flatmap(lambda n: st.tuples(*[length] * n)),
        packed=st.booleans(),
        kept=st.one_of(st.sampled_from(["some", "every label", "completions"]), st.sampled_from(list(MASKS))),
        shift=st.booleans(),
        ignore_index=st.sampled_from([-100, -1, 10_000, 0]),
        label_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
        gaps=st.booleans(),
        first_is_no_token=st.booleans(),
    )


class Labels(NamedTuple):
    labels: Tensor  # (S, T) or (N,)
    cu_seqlens: Tensor | None  # (S + 1,)
    predicted: Tensor  # (R,) int64, the rows that predict a label, of all
    targets: Tensor  # (R',) int64, what they predict
    sequence: Tensor  # (R,) int64, of all rows
    without_pair: Tensor  # (R,) bool, rows of pairs with an empty completion

    def to(self, device: torch.device) -> Labels:
        return Labels(*(None if tensor is None else _same_strides(tensor, device) for tensor in self))


def _same_strides(tensor: Tensor, device: torch.device) -> Tensor:
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)


def make_labels(rows: Rows, vocabulary: int, generator: torch.Generator) -> Labels:
    shape = (len(rows.lengths), max(rows.lengths))
    labels = torch.randint(vocabulary, shape, generator=generator)
    kept = MASKS[rows.kept](torch.ones(shape, dtype=torch.bool), generator)
    real = torch.arange(shape[1]) < torch.tensor(rows.lengths)[:, None]
    labels = labels.where(kept & real, rows.ignore_index)
    if rows.first_is_no_token and rows.shift:
        labels[:, :1] = 12345
    labels, cu_seqlens = labels.to(rows.label_dtype), None
    if rows.packed:
        labels = labels[real]
        cu_seqlens = torch.tensor([0, *rows.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if rows.gaps:
        labels = labels.repeat_interleave(2, -1)[..., ::2]
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.repeat_interleave(2)[::2]
    targets = align_targets(labels, cu_seqlens, rows.shift, rows.ignore_index)
    sequence = sequence_of_rows(targets, cu_seqlens)
    targets = targets.flatten()
    predicted = (targets != rows.ignore_index).nonzero().flatten()
    counts = torch.bincount(sequence[predicted], minlength=shape[0])
    pairs = shape[0] // 2 * 2
    empty = (counts[:pairs] == 0).view(2, -1).any(0).repeat(2)
    without_pair = empty[sequence] if pairs == shape[0] else torch.zeros_like(targets, dtype=torch.bool)
    return Labels(labels, cu_seqlens, predicted, targets[predicted], sequence, without_pair)


# ---- Values ----


class Values(NamedTuple):
    """Logits to fill, or hidden states."""

    x: Tensor  # (R, X) float64
    rows: Tensor  # (R',) int64, those that predict a label
    labels: Tensor  # (R',) int64
    generator: torch.Generator
    dtype: torch.dtype  # what they will be rounded to

    def beside_labels(self, value: float) -> None:
        """About half of what predicts, but no label, becomes the value."""
        half = torch.rand(self.x.shape, generator=self.generator) < 0.5
        half[self.rows, self.labels] = False
        self.x.masked_fill_(half, value)

    def at_labels(self, value: float) -> None:
        self.x[self.rows, self.labels] = value

    def once(self, value: float, at_label: bool = False, whole_row: bool = False) -> None:
        """In one predicting row, where there is one."""
        if not len(self.rows):
            return
        chosen = torch.randint(len(self.rows), (), generator=self.generator)
        column = torch.randint(self.x.shape[1], (), generator=self.generator)
        columns = slice(None) if whole_row else self.labels[chosen] if at_label else column
        self.x[self.rows[chosen], columns] = value

    def where_nothing_is_predicted(self, value: float) -> None:
        others = torch.ones(len(self.x), dtype=torch.bool)
        others[self.rows] = False
        self.x[others] = value


FILLS = {
    "ordinary": lambda v: None,
    "near zero": lambda v: v.x.mul_(1e-3),
    "wide": lambda v: v.x.mul_(15),
    "far below": lambda v: v.x.sub_(300),
    "far above": lambda v: v.x.add_(300),
    "all the same": lambda v: v.x.fill_(0.25),
    "+-1e4": lambda v: v.x.sign_().mul_(1e4),
    "+- float16's largest": lambda v: v.x.sign_().mul_(65504),
    "the lowest number everywhere": lambda v: v.x.fill_(torch.finfo(v.dtype).min),
    "the lowest number beside labels": lambda v: v.beside_labels(torch.finfo(v.dtype).min),
    "certain labels": lambda v: v.at_labels(40),
    "improbable labels": lambda v: v.at_labels(-40),
    "impossible labels": lambda v: v.at_labels(-200),
    "-inf beside labels": lambda v: v.beside_labels(-INF),
    "-inf at a label": lambda v: v.once(-INF, at_label=True),
    "a row of -inf": lambda v: v.once(-INF, whole_row=True),
    "+inf somewhere": lambda v: v.once(INF),
    "+inf at a label": lambda v: v.once(INF, at_label=True),
    "NaN somewhere": lambda v: v.once(NAN),
    "NaN where nothing is predicted": lambda v: v.where_nothing_is_predicted(NAN),
}
ORDINARY = st.just("ordinary")


def make_values(
    fill: str, width: int, labels: Labels, generator: torch.Generator, dtype: torch.dtype, spread: float = 1.5
) -> Tensor:
    """(S, T, width) or (N, width) in the dtype, a unit or two apart before they are filled."""
    x = torch.randn(labels.labels.numel(), width, dtype=torch.float64, generator=generator).mul_(spread)
    FILLS[fill](Values(x, labels.predicted, labels.targets, generator, dtype))
    return x.view(*labels.labels.shape, width).to(dtype)


# ---- The loss ----


class Objective(NamedTuple):
    """fused_gapo_loss's keywords that are numbers or choices."""

    beta: float
    gamma: float
    label_smoothing: float
    loss_type: str
    length_normalized: bool
    sft_weight: float
    reduction: str


# gamma = -1 is left out: with a gap of 0 it puts the hinge exactly on its kink, where rounding chooses the weight.
OBJECTIVES = st.builds(
    Objective,
    beta=st.one_of(st.sampled_from([2.0, 0.1, 10.0, 1 / 3]), st.integers(1, 2000).map(lambda n: n / 100)),
    gamma=st.one_of(st.sampled_from([0.5, 0.0, 1e-9, -1 / 3]), st.integers(-90, 300).map(lambda n: n / 100)),
    label_smoothing=st.sampled_from([0.0, 0.1, 1 / 3, 0.499999]),
    loss_type=st.sampled_from(["sigmoid", "hinge"]),
    length_normalized=st.booleans(),
    sft_weight=st.sampled_from([0.0, 0.3, 1 / 7]),
    reduction=st.sampled_from(["mean", "none"]),
)
# Numbers that float32 holds: the upstream gradient is the same for all.
UPSTREAM = st.sampled_from([1.0, -0.75, 0.3125, 256.0])


def upstream_gradient(shape: tuple[int, ...], factor: float, generator: torch.Generator) -> Tensor:
    """The factor for a scalar, else one number an element."""
    return torch.randn(shape, generator=generator).mul_(factor).double() if shape else torch.tensor(factor).double()


def vocabularies(interpreted: bool) -> st.SearchStrategy[int]:
    """Around the ends of vectors and of tiles of 128; several blocks of rows and of columns where that is quick."""
    around = [31, 64, 97, 127, 128, 129, 136, 255, 257, 264, 331]
    return st.one_of(st.integers(1, 20), st.sampled_from(around if interpreted else [*around, 1009, 4099]))


# Programs that share a row. The device's choice, None, is one for each tile here: so few rows are far from filling it.
SPLITS = st.sampled_from([None, 1, 2])


def split_among(programs: int | None) -> AbstractContextManager:
    """Kernels go through a row's tiles one after the other, each of at most so many programs through its part."""
    if programs is None or config is None:
        return nullcontext()

    def split_row(device: torch.device, rows: int, vocabulary: int, block: int) -> tuple[int, int]:
        blocks = -(-vocabulary // block)
        chunk = -(-blocks // programs)
        return -(-blocks // chunk), chunk * block

    return mock.patch.object(config, "split_row", split_row)
