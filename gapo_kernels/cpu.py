"""The torch implementation of the three kernels: cache-blocked, scratch reused, ignored rows compacted away.

Same launchers as `kernels/` (`logps_forward`, `loss_forward`, `logps_backward`). Floor: one exponential for each logit
of a predicting row and pass. What makes eager slow here is memory, not arithmetic: a fresh tensor the size of the
logits costs more in page faults than the exponentials that fill it. So nothing of that size is made but the gradient.

Row statistics, with the row's maximum a: logp = (x_label - a) - log sum_j exp(x_j - a). The label's term is left out of
the sum and added after: a probable label has logp = -log1p(rest / term), with all its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gapo_kernels import host_memory, threads
from gapo_kernels.layout import align_targets, sequence_count, sequence_of_rows
from gapo_kernels.objective import PairResults, pair_results, sequence_means

# The block of powers in flight, in the accumulation dtype: it and the logits it is made of stay in the near caches.
SCRATCH_BYTES = 2 * 2**20
LOG2E = math.log2(math.e)
MODERATE = 4096  # far beyond the logits of models
Result = TypeVar("Result")


class Rows(NamedTuple):
    """The K predicting rows among the S * T (or N) rows of the logits, in order."""

    index: Tensor  # (K,) int64, position among all rows
    label: Tensor  # (K,) int64, clamped to the vocabulary
    in_range: Tensor  # (K,) bool, whether the label was in the vocabulary
    sequence: Tensor  # (K,) int64
    counts: Tensor  # (S,) int64, predicting rows of each sequence

    def where(self, keep: Tensor) -> Rows:
        """The rows marked in keep (K,) bool; the counts stay those of all."""
        return Rows(*(field[keep] for field in self[:-1]), self.counts)


def find_rows(labels: Tensor, vocabulary: int, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Rows:
    sequences = sequence_count(labels, cu_seqlens)
    targets = align_targets(labels, cu_seqlens, shift, ignore_index)
    sequence = sequence_of_rows(targets, cu_seqlens)
    targets = targets.flatten()
    index = ((targets != ignore_index) & (sequence < sequences)).nonzero().flatten()
    label, sequence = targets[index], sequence[index]
    in_range = (label >= 0) & (label < vocabulary)
    counts = torch.bincount(sequence, minlength=sequences)
    return Rows(index, label.clamp(0, vocabulary - 1), in_range, sequence, counts)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class Run(NamedTuple):
    """Neighbouring rows of one sequence: the unit that is read and written as a view."""

    rows: tuple[int | slice, ...]  # index into logits (S, T, V) or (N, V)
    block: slice  # where they stand in their block of scratch rows


class Block(NamedTuple):
    at: slice  # the block's rows among the K predicting rows
    runs: list[Run]


def cut_blocks(logits: Tensor, rows: Rows) -> list[Block]:
    """The predicting rows in blocks, each block the runs it is made of: nearly as many rows as SCRATCH_BYTES hold, in as
    many blocks for each thread.

    What fits into the scratch of all threads is one block, whose operations torch splits over them: there a thread that
    waits for its turn to call the next one costs more than the barrier of each operation.
    """
    index, kept = rows.index, rows.index.shape[0]
    length = logits.shape[1] if logits.dim() == 3 else None  # T if padded
    breaks = index.diff() != 1
    if length is not None:
        breaks |= index[1:] % length == 0
    starts = (breaks.nonzero().flatten() + 1).tolist()
    limit = max(1, SCRATCH_BYTES // (logits.shape[-1] * accumulation_dtype(logits).itemsize))
    at_once = limit * torch.get_num_threads()
    if kept <= at_once:
        limit = max(1, kept)
    else:
        limit = -(-kept // (-(-kept // at_once) * torch.get_num_threads()))
    first_rows = index[[0, *starts]].tolist() if kept else []
    found: list[Block] = []
    for row, start, stop in zip(first_rows, [0, *starts], [*starts, kept]):
        while start < stop:
            if start % limit == 0:
                found.append(Block(slice(start, min(start + limit, kept)), []))
            place = start % limit
            count = min(stop - start, limit - place)
            view = slice(row, row + count) if length is None else slice(row % length, row % length + count)
            key = (view,) if length is None else (row // length, view)
            found[-1].runs.append(Run(key, slice(place, place + count)))
            start, row = start + count, row + count
    return found


def _sources(logits: Tensor, block: Block, scratch: Tensor) -> list[tuple[Tensor, slice]]:
    """A block's logits in the accumulation dtype, and which of its rows each part is: views, or copies in scratch."""
    if logits.dtype == scratch.dtype:
        return [(logits[run.rows], run.block) for run in block.runs]
    for run in block.runs:
        scratch[run.block].copy_(logits[run.rows])
    every = slice(0, block.at.stop - block.at.start)
    return [(scratch[every], every)]


def _powers(x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """exp(x - shift), (R, V), times a number close to 1 that is the same in all of a row: what rounding makes of exp(0).

    As powers of 2, for torch's exp2 takes less time than its exp, and difference and product are one operation.
    """
    return torch.add(shift * -LOG2E, x, alpha=LOG2E, out=out).exp2_()


def _powers_in_steps(x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    return torch.sub(x, shift, out=out).mul_(LOG2E).exp2_()


def _powers_for(shift: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In steps if some row's shift is so large that what is rounded off its product may be, too."""
    return _powers_in_steps if (shift.isfinite() & (shift.abs() > MODERATE)).any() else _powers


def for_each_block(logits: Tensor, blocks: list[Block], work: Callable[[Block, Tensor], None]) -> None:
    """Calls work(block, scratch) on every block; results do not depend on which thread takes which block."""
    rows = blocks[0].at.stop if blocks else 0

    def drain(queue: Iterator[Block]) -> None:
        scratch = torch.empty(rows, logits.shape[-1], dtype=accumulation_dtype(logits), device=logits.device)
        for block in queue:
            work(block, scratch)

    threads.share(blocks, drain, logits.device)


def between_blocks(logits: Tensor, blocks: list[Block], work: Callable[[], Result]) -> Result:
    """work(), which is little, so that the blocks of the next pass find the threads idle."""
    return work() if len(blocks) <= 1 else threads.alone(work, logits.device)


def label_logits(logits: Tensor, rows: Rows) -> Tensor:
    """The label logits (K,) in the accumulation dtype."""
    place = places(logits, rows.index)
    return logits[(*place, rows.label)].to(accumulation_dtype(logits))


def places(logits: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    if logits.dim() == 2:
        return (index,)
    length = logits.shape[1]
    return index // length, index % length


def row_statistics(
    logits: Tensor, rows: Rows, blocks: list[Block]
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor]:
    """The powers that fit these logits, and of each predicting row, (K,), the shift a and the sum of the powers of all
    logits but the label's."""
    shift = torch.empty(rows.index.shape[0], dtype=accumulation_dtype(logits), device=logits.device)
    rest, label, shifts = torch.empty_like(shift), rows.label[:, None], shift[:, None]

    def sum_block(block: Block, scratch: Tensor) -> None:
        for x, part in _sources(logits, block, scratch):
            powers(x, torch.amax(x, 1, keepdim=True, out=shifts[block.at][part]), scratch[part])
        terms = scratch[: block.at.stop - block.at.start].scatter_(1, label[block.at], 0)
        torch.sum(terms, 1, out=rest[block.at])

    for powers in (_powers, _powers_in_steps):
        for_each_block(logits, blocks, sum_block)
        if powers is _powers_for(shift):
            break
    return powers, shift, rest


def _token_logps(
    label_logit: Tensor, shift: Tensor, label_term: Tensor, rest: Tensor, in_range: Tensor
) -> tuple[Tensor, Tensor]:
    """log-prob and total of each row (K,), in float64."""
    label_term, rest = label_term.double(), rest.double()
    total = rest + label_term
    logps = (label_logit.double() - shift.double()) - total.log()
    logps = torch.log1p(rest / label_term).neg_().where(label_term > total * 1e-3, logps)
    return logps.where(in_range, torch.nan), total


def terms_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, total and log-prob of each row (R,) of logits (R, V), in their dtype, and over the logits the softmax, at the
    label less 1: the gradient of -log-prob. Of a row that is not finite it is zeros: the total is NaN.

    In torch's own operations on all rows at once: its softmax goes over each row while the row is in the caches.
    """
    in_range = (labels >= 0) & (labels < logits.shape[1])
    labels = labels.clamp(0, logits.shape[1] - 1)[:, None]
    label_logit, shift = logits.gather(1, labels).squeeze(1), logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    share = logits.gather(1, labels).squeeze(1)
    rest = logits.scatter_(1, labels, 0).sum(1)
    logits.scatter_(1, labels, -rest[:, None])
    label_term = (label_logit.double() - shift).exp()
    total = label_term / share
    lost = (share < torch.finfo(logits.dtype).tiny).nonzero().flatten()  # to underflow: some digits, or all
    for rows in lost.split(max(1, SCRATCH_BYTES // (logits.shape[1] * logits.element_size()))):
        total[rows] = 1 / logits[rows].amax(1).double()
    logits.index_fill_(0, (~rest.isfinite()).nonzero().flatten(), 0)
    logps, total = _token_logps(label_logit, shift, label_term, rest * total, in_range)
    return shift, total.where(in_range, torch.nan).to(shift.dtype), logps.to(shift.dtype)


def _sums(logits: Tensor, rows: Rows, blocks: list[Block]) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-prob sums (S,) in float64, and of each predicting row, (K,), the shift and total for the backward."""
    logits = logits.detach()
    powers, shift, rest = row_statistics(logits, rows, blocks)

    def summed() -> tuple[Tensor, Tensor]:
        label_logit = label_logits(logits, rows)
        label_term, unit = (powers(x, shift, torch.empty_like(shift)) for x in (label_logit, shift))
        label_logit = label_logit.double() + unit.double().log()  # as the powers have it
        logps, total = _token_logps(label_logit, shift, label_term, rest, rows.in_range)
        sums = torch.zeros(rows.counts.shape[0], dtype=torch.float64, device=logits.device)
        return sums.index_add_(0, rows.sequence, logps), total.to(shift.dtype)

    sums, total = between_blocks(logits, blocks, summed)
    return sums, shift, total


def _spread(rows: Rows, every: int, *values: Tensor) -> Iterator[Tensor]:
    """Values (K,) of the predicting rows among all rows (S * T,) or (N,), zero elsewhere."""
    for value in values:
        yield value.new_zeros(every).index_copy_(0, rows.index, value)


def logps_forward(
    logits: Tensor,  # (S, T, V) or (N, V)
    labels: Tensor,
    cu_seqlens: Tensor | None,
    length_normalized: bool,
    shift: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (S,), counts (S,) int64, and per row the shift and total that the backward needs."""
    rows = find_rows(labels, logits.shape[-1], cu_seqlens, shift, ignore_index)
    sums, *statistics = _sums(logits, rows, cut_blocks(logits, rows))
    logps = sequence_means(sums, rows.counts, length_normalized).to(accumulation_dtype(logits))
    return logps, rows.counts, *_spread(rows, labels.numel(), *statistics)


def loss_forward(
    logits: Tensor,  # (2B, T, V) or (N, V)
    labels: Tensor,
    anchor_logits: Tensor | None,
    anchor_margin: Tensor | None,  # (B,)
    cu_seqlens: Tensor | None,
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    sft_weight: float,
    shift: bool,
    ignore_index: int,
    reduction: str,
) -> tuple[PairResults, Tensor, Tensor]:
    """Every field of the output with the gradient's coefficients, and per row the shift and total."""
    rows = find_rows(labels, logits.shape[-1], cu_seqlens, shift, ignore_index)
    blocks = cut_blocks(logits, rows)
    if anchor_logits is not None:
        anchor_sums, _, _ = _sums(anchor_logits, rows, blocks)
        chosen, rejected = sequence_means(anchor_sums, rows.counts, length_normalized).chunk(2)
        anchor_margin = chosen - rejected
    # The policy last: what the caches still hold of it, the backward reads from them.
    sums, *statistics = _sums(logits, rows, blocks)
    combine = partial(
        pair_results,
        sums,
        rows.counts,
        anchor_margin,
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        length_normalized=length_normalized,
        sft_weight=sft_weight,
        reduction=reduction,
    )
    results = between_blocks(logits, blocks, combine)
    dtype = accumulation_dtype(logits)
    # A copy in every case: an operator's outputs may not share memory with its inputs or with one another.
    return (
        PairResults(*(field.to(dtype, copy=True) if field.is_floating_point() else field for field in results)),
        *_spread(rows, labels.numel(), *statistics),
    )


def logps_backward(
    scale: Tensor,  # (S,) d logits[row] = scale[sequence] * (softmax - onehot)
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    row_shift: Tensor,  # (S * T,) or (N,)
    row_total: Tensor,
    shift: bool,
    ignore_index: int,
    inplace: bool,
) -> Tensor:
    """The gradient, zero on rows that predict nothing; over the logits' storage with `inplace`."""
    rows = find_rows(labels, logits.shape[-1], cu_seqlens, shift, ignore_index)
    logits = logits.detach()
    dtype = accumulation_dtype(logits)
    powers = _powers_for(row_shift[rows.index])  # as in the forward, which had all rows
    # A sequence without upstream gradient has none, even if its logits are NaN (an inert pair, say): 0 * NaN is left out.
    rows = rows.where(scale[rows.sequence] != 0)
    gradient = logits if inplace else host_memory.zeros_but(logits, rows.index)
    row_scale = scale.to(dtype)[rows.sequence]
    shifts, totals = row_shift[rows.index], row_total[rows.index]
    factor = (row_scale / totals).where(rows.in_range, torch.nan)
    label_term = powers(label_logits(logits, rows), shifts, torch.empty_like(shifts))
    shifts, factor = shifts[:, None], factor[:, None]

    def write_block(block: Block, scratch: Tensor) -> None:
        if gradient.dtype == dtype:  # in the gradient itself: a sixth less time than by way of the scratch rows
            for run in block.runs:
                at = slice(block.at.start + run.block.start, block.at.start + run.block.stop)
                powers(logits[run.rows], shifts[at], gradient[run.rows]).mul_(factor[at])
        else:
            ((x, _),) = _sources(logits, block, scratch)
            softmax = powers(x, shifts[block.at], x).mul_(factor[block.at])
            for run in block.runs:
                gradient[run.rows].copy_(softmax[run.block])

    for_each_block(logits, cut_blocks(logits, rows), write_block)
    # softmax - onehot in the accumulation dtype, before any rounding: a confident token keeps its digits.
    at_label = ((label_term / totals - 1) * row_scale).where(rows.in_range, torch.nan)
    gradient[(*places(logits, rows.index), rows.label)] = at_label.to(gradient.dtype)
    if inplace:
        ignored = torch.ones(row_shift.shape[0], dtype=torch.bool, device=logits.device)
        ignored[rows.index] = False
        gradient[places(logits, ignored.nonzero().flatten())] = 0
    return gradient
