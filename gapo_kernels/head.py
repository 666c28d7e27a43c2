"""The LM head on a tile of rows: logits into one buffer, their gradient over them, and what that gives each operand.

    logits = cap(logit_scale * (hidden @ weight^T + bias)),    cap(x) = softcap * tanh(x / softcap)

Arithmetic: the GEMMs are torch's, in the dtype of the operands with float32 accumulation; 16-bit operands on a CPU are
computed in float32, a slice of the vocabulary at a time. The softmax is a back end's launchers', each row by itself.
With a process group the vocabulary is sharded over its ranks: a row's maximum and sum are combined, O(rows) numbers.
Slices of the vocabulary, where not even a row of logits is to be in memory, are shards on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gapo_kernels import cpu, host_memory
from gapo_kernels.validation import HALF

CAST_BYTES = 16 * 2**20  # of the weight, or of the logits' gradient, cast at a time
BIAS_ROWS = 16  # of the logits' gradient, summed at a time in its dtype
SOFTCAP_BYTES = 8 * 2**20  # of the logits, kept at a time for softcap's derivative


class Statistics(NamedTuple):
    """Of every row: what its softmax is rebuilt from, and its label's log-probability."""

    shift: Tensor  # (R,)
    total: Tensor  # (R,) sum_j exp(x_j - shift), over all shards
    logps: Tensor  # (R,)


class VocabularyShard(NamedTuple):
    group: torch.distributed.ProcessGroup | None  # None: a slice of a rank's own rows
    start: int  # the first token whose row of the weight is on this rank
    largest: int  # rows of the largest shard: all ranks must cut their tiles alike
    vocabulary: int  # rows of all of them


class Head(NamedTuple):
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float
    launchers: ModuleType
    shard: VocabularyShard | None = None

    @property
    def buffer_dtype(self) -> torch.dtype:
        """Of logits: 16-bit GEMMs on a CPU are slow and round every logit."""
        return torch.float32 if self._casts else self.weight.dtype

    @property
    def _casts(self) -> bool:
        return self.weight.device.type == "cpu" and self.weight.dtype in HALF

    @property
    def leaves_terms(self) -> bool:
        """Whether the softmax's terms may stand in the logits' place (`terms_`). Softcap's derivative needs the logits,
        and 16-bit hidden states would be rounded once more by each row's number."""
        return self.launchers is cpu and self.buffer_dtype not in HALF and self.softcap is None and self.shard is None

    @property
    def vocabulary(self) -> int:
        """Tokens, on all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocabulary

    @property
    def row_bytes(self) -> int:
        """Of a row of logits, on the rank that has most of them."""
        vocabulary = self.weight.shape[0] if self.shard is None else self.shard.largest
        return vocabulary * self.buffer_dtype.itemsize

    def slices(self, columns: int) -> Iterator[tuple[slice, Head]]:
        """The head in slices of so many tokens, and where they begin and end; itself, if it has no more."""
        size, first = self.weight.shape[0], 0 if self.shard is None else self.shard.start
        if columns >= size:
            yield slice(0, size), self
            return
        for start in range(0, size, columns):
            part = slice(start, min(start + columns, size))
            shard = VocabularyShard(None, first + start, columns, self.vocabulary)
            bias = None if self.bias is None else self.bias[part]
            yield part, self._replace(weight=self.weight[part], bias=bias, shard=shard)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The logits (R, V) of hidden (R, H), in `out`."""
        hidden = hidden.to(out.dtype)
        if self.logit_scale != 1 and self.bias is None:
            hidden = hidden * self.logit_scale
        for columns, weight in self._weights():
            target = out[:, columns]
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=target)
            else:
                bias, scale = self.bias[columns].to(out.dtype), self.logit_scale
                torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=target)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def statistics(self, logits: Tensor, labels: Tensor) -> Statistics:
        """Of logits (R, V) and their labels (R,)."""
        part = self.partial(logits, labels)
        return part if self.shard is None else self.combined([part])

    def terms_(self, logits: Tensor, labels: Tensor) -> Statistics:
        """The same, and over the logits what `row_numbers` make d(-log-prob) of."""
        return Statistics(*cpu.terms_(logits, labels))

    def row_numbers(self, total: Tensor, scale: Tensor) -> Tensor:
        """What the rows of `terms_` (R, V) are to be multiplied by: 0 where the scale (R,) is, whatever the row is."""
        numbers = (scale.to(total.dtype) * self.logit_scale).masked_fill_(~total.isfinite(), torch.nan)
        return numbers.masked_fill_(scale == 0, 0)

    def partial(self, logits: Tensor, labels: Tensor) -> Statistics:
        """Of a shard: with the label's logit, 0 if that is another's, in the log-probability's place."""
        shard_labels, elsewhere = self.local(labels)
        options = (_rows_apart(logits), False, False, _NO_LABEL)
        logps, _, shift, total = self.launchers.logps_forward(logits, shard_labels, *options)
        if self.shard is None:
            return Statistics(shift, total, logps)
        own = logits.gather(1, shard_labels[:, None]).squeeze(1).to(shift.dtype).masked_fill(elsewhere, 0)
        own.masked_fill_((labels < 0) | (labels >= self.vocabulary), torch.nan)  # no rank's: as the launchers have it
        return Statistics(shift, total, own)

    def combined(self, parts: list[Statistics]) -> Statistics:
        """Of all the slices of this rank's, and all ranks'."""
        shift, total, label_logit = (torch.stack(part) for part in zip(*parts))
        group = None if self.shard is None else self.shard.group
        # A shard whose logits are all -inf takes no part: its sum is 0 (exp(-inf - -inf) made it NaN), its maximum finite.
        total = total.masked_fill(shift == -torch.inf, 0)
        # The maximum itself, as whole rows have it: shift + log(total) is rounded, which a confident token's 1 - p shows.
        largest = shift.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(shift.dtype).min).amax(0)
        if group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
        # In float64: where one token has nearly all of a sum of 1, every rounding shows in what the others have.
        sums = torch.stack([(total.double() * (shift - largest).exp()).sum(0), label_logit.double().sum(0)])
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        logps = sums[1] - largest - sums[0].log()
        return Statistics(largest, *(values.to(shift.dtype) for values in (sums[0], logps)))

    def differentiate_(self, logits: Tensor, labels: Tensor, shift: Tensor, total: Tensor, scale: Tensor) -> Tensor:
        """scale[row] * d(-log-prob of the row's label) / d(hidden @ weight^T + bias), over the logits (R, V)."""
        scale = scale.to(shift.dtype) * self.logit_scale
        if self.softcap is None:
            self._softmax_gradient_(logits, labels, shift, total, scale)
            return logits
        rows = max(1, SOFTCAP_BYTES // (logits.shape[1] * logits.element_size()))
        for parts in zip(*(tensor.split(rows) for tensor in (logits, labels, shift, total, scale))):
            slope = (parts[0].to(shift.dtype) / self.softcap).square_().neg_().add_(1)
            self._softmax_gradient_(*parts)
            # 0 * NaN: a row without a coefficient (of an inert pair, say) has no gradient, whatever its logits are
            parts[0].mul_(slope.masked_fill_((parts[4] == 0)[:, None], 0))
        return logits

    def _softmax_gradient_(self, logits: Tensor, labels: Tensor, shift: Tensor, total: Tensor, scale: Tensor) -> None:
        shard_labels, elsewhere = self.local(labels)
        if elsewhere is not None:
            # The label that stands in for one on another rank has a plain softmax's gradient.
            at = elsewhere.nonzero().flatten()
            column = shard_labels[at]
            plain = ((logits[at, column].to(shift.dtype) - shift[at]).exp() / total[at] * scale[at]).to(logits.dtype)
        options = (_rows_apart(logits), shift, total, False, _NO_LABEL)
        self.launchers.logps_backward(scale, logits, shard_labels, *options, inplace=True)
        if elsewhere is not None:
            logits[at, column] = plain.masked_fill(scale[at] == 0, 0)

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels as columns of this rank's shard, and which of them (R,) are another rank's: these become column 0."""
        if self.shard is None:
            return labels, None
        local = labels - self.shard.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        return local.masked_fill(elsewhere, 0), elsewhere

    def hidden_gradient(self, gradient: Tensor) -> Tensor:
        """gradient (R, V) @ weight, (R, H): of this rank's shard."""
        if not self._casts:
            return _mm_float32(gradient, self.weight) if self.weight.dtype in HALF else gradient @ self.weight
        summed = gradient.new_zeros(gradient.shape[0], self.weight.shape[1])
        for columns, weight in self._weights():
            summed.addmm_(gradient[:, columns], weight)
        return summed

    def _weights(self):
        """The weight in slices of the vocabulary as the GEMMs take it: whole, unless it has to be cast."""
        vocabulary, width = self.weight.shape
        rows = max(1, CAST_BYTES // max(1, 4 * width)) if self._casts else vocabulary
        for start in range(0, vocabulary, rows):
            columns = slice(start, min(start + rows, vocabulary))
            yield columns, self.weight[columns].to(self.buffer_dtype)


_NO_LABEL = -(2**63)  # every row of a tile predicts a label


def _rows_apart(logits: Tensor) -> Tensor:
    """cu_seqlens (R + 1,) that make every row a sequence of its own."""
    return torch.arange(logits.shape[0] + 1, dtype=torch.int32, device=logits.device)


class WeightGradient:
    """gradient^T @ hidden and the bias's sums over all tiles: in float32 for 16-bit weights."""

    def __init__(self, head: Head, weight: bool, bias: bool, one_tile: bool) -> None:
        self._wanted, self._like = (weight, bias), head.weight
        self._dtype = torch.promote_types(head.weight.dtype, torch.float32)
        # The only tile's GEMM accumulates in float32 inside and rounds once itself.
        self._direct = one_tile and not head._casts
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(
        self,
        gradient: Tensor,
        hidden: Tensor,
        columns: slice = slice(None),
        factor: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """gradient (R, C), of the tokens `columns`; `factor` (): that of what there is of these so far; `numbers` (R,): of
        the gradient's rows, which hidden (R, H) has in it already."""
        self._begin(weight=gradient.shape[1] < self._like.shape[0])  # the zeros that slices are added to
        if self._wanted[1]:
            total = _times(self.bias[columns], factor)
            if numbers is None:
                total.add_(gradient.sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32)))
            else:
                for rows, own in zip(gradient.split(BIAS_ROWS), numbers.split(BIAS_ROWS)):
                    total.add_(rows.t() @ own)
        if not self._wanted[0]:
            return
        total = None if self.weight is None else self.weight[columns]
        if self._direct or gradient.dtype not in HALF:
            hidden = hidden.to(gradient.dtype)
            if total is None:
                shape = (gradient.shape[1], hidden.shape[1])
                total = host_memory.uninitialized(shape, gradient.dtype, gradient.device, host_memory.WEIGHT)
                torch.mm(gradient.t(), hidden, out=total)
            elif factor is not None and factor.device.type == "cpu":  # in the GEMM: no pass of its own
                total.addmm_(gradient.t(), hidden, beta=factor.item())
            else:
                _times(total, factor).addmm_(gradient.t(), hidden)
        else:
            total = None if total is None else _times(total, factor)
            total = _added_float32(total, gradient.t(), hidden)
        self.weight = total if self.weight is None else self.weight

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """Yet to be rounded, unless an only tile's GEMM did; zeros if there was no tile."""
        self._begin(weight=True)
        return self.weight, None if self.bias is None else self.bias.to(self._dtype)

    def _begin(self, weight: bool) -> None:
        """With zeros, where there is nothing yet. The bias's in float64: what adds rows one after the other, a product with
        a vector or tile after tile, loses digits."""
        if weight and self._wanted[0] and self.weight is None:
            self.weight = self._like.new_zeros(self._like.shape, dtype=self._dtype)
        if self._wanted[1] and self.bias is None:
            self.bias = self._like.new_zeros(self._like.shape[0], dtype=torch.float64)


def _times(total: Tensor, factor: Tensor | None) -> Tensor:
    return total if factor is None else total.mul_(factor.to(total.dtype))


@lru_cache
def _gives_float32(gemm: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether torch.mm, or torch.addmm to a float32 total (from torch 2.10 on), has 16-bit operands and a float32 result."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = [one.float()] if gemm is torch.addmm else []
    try:
        gemm(*total, one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _mm_float32(one: Tensor, other: Tensor) -> Tensor:
    if _gives_float32(torch.mm, one.device):
        return torch.mm(one, other, out_dtype=torch.float32)
    return (one @ other).float()


def _added_float32(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """total + one @ other, over the total, nothing of it rounded to the operands' 16 bits."""
    if total is None and _gives_float32(torch.mm, one.device):
        return _mm_float32(one, other)
    if total is None:
        total = one.new_zeros(one.shape[0], other.shape[1], dtype=torch.float32)
    if _gives_float32(torch.addmm, one.device):
        return torch.addmm(total, one, other, out_dtype=torch.float32, out=total)
    if _gives_float32(torch.mm, one.device):
        return total.add_(_mm_float32(one, other))
    rows, other = max(1, CAST_BYTES // max(1, 4 * one.shape[1])), other.float()
    for part, of_one in zip(total.split(rows), one.split(rows)):
        part.addmm_(of_one.float(), other)
    return total
