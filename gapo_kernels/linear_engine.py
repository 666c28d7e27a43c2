"""Hidden states and LM head to log-probs and gradients, in tiles of rows that share one buffer of logits.

Rows that predict nothing are left out before any GEMM. With kept rows K: the logits cost 2 K H V flops, d hidden and
d weight as much each. Where a tile holds whole pairs their loss, and so every row's coefficient, is known while their
logits, or the softmax's terms in their place, are still there: nothing is computed twice. What of a pair goes beyond the
budget is, unless the head is frozen: then each sequence's d hidden is made up to its coefficient, at once. Below the
budget of one row there are slices of the vocabulary, too: a head's gradient has all their logits computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gapo_kernels import cpu, host_memory
from gapo_kernels.head import HALF, Head, Statistics, WeightGradient
from gapo_kernels.layout import align_targets, sequence_count, sequence_of_rows
from gapo_kernels.objective import PairResults, margin_shares, pair_results, sequence_means

PART_BYTES = 4 * 2**20  # of float32 hidden states or their gradient, gathered or made at a time


class Rows(NamedTuple):
    """The K predicting rows of the hidden states, sequence by sequence (pair by pair where there are pairs)."""

    index: Tensor  # (K,) int64, position among all rows
    label: Tensor  # (K,) int64
    sequence: Tensor  # (K,) int64
    position: Tensor  # (K,) int64, position within the sequence's own rows
    counts: Tensor  # (S,) int64
    ends: list[int]  # for each sequence, in the rows' order, where its rows end among the K
    longest: int

    def part(self, start: int, stop: int) -> Rows:
        """The rows from start to stop alone, of every sequence."""
        return self._replace(sequence=self.sequence[start:stop], position=self.position[start:stop])

    def sums(self, logps: Tensor) -> Tensor:
        """(S,) float64, of (K,): in a fixed order, which a GPU's atomic additions would not have."""
        if logps.device.type == "cpu":
            sums = torch.zeros(self.counts.shape[0], dtype=torch.float64, device="cpu")
            return sums.index_add_(0, self.sequence, logps.double())
        table = torch.zeros(self.counts.shape[0], self.longest, dtype=torch.float64, device=logps.device)
        table[self.sequence, self.position] = logps.double()
        return table.sum(1)


def find_rows(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int, in_pairs: bool) -> Rows:
    sequences = sequence_count(labels, cu_seqlens)
    targets = align_targets(labels, cu_seqlens, shift, ignore_index)
    sequence = sequence_of_rows(targets, cu_seqlens)
    targets = targets.flatten()
    index = ((targets != ignore_index) & (sequence >= 0) & (sequence < sequences)).nonzero().flatten()
    counts = torch.zeros(sequences, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, sequence[index], torch.ones_like(index))  # for bincount a GPU would be waited for
    order = torch.arange(sequences, device=labels.device)
    if in_pairs:
        order = order.view(2, -1).t().flatten()  # chosen, rejected, chosen, ...
        place = torch.empty_like(order).scatter_(0, order, torch.arange(sequences, device=labels.device))
        index = index[torch.argsort(place[sequence[index]], stable=True)]
    ends = counts[order].cumsum(0)
    sequence = sequence[index]
    begins = torch.empty_like(ends).scatter_(0, order, ends - counts[order])
    position = torch.arange(index.shape[0], device=labels.device) - begins[sequence]
    ends = ends.tolist()
    longest = max((stop - start for start, stop in zip([0, *ends], ends)), default=0)
    return Rows(index, targets[index], sequence, position, counts, ends, longest)


class Buffer:
    """The one buffer of logits."""

    def __init__(self, head: Head, kept: int, max_logits_bytes: int) -> None:
        self.limit = max(1, max_logits_bytes // head.row_bytes)
        self.columns = min(head.weight.shape[0], max(1, max_logits_bytes // head.buffer_dtype.itemsize))
        self._rows = min(self.limit, max(kept, 1))
        self._head = head
        self._memory: Tensor | None = None

    def rows(self, count: int, columns: int | None = None) -> Tensor:
        if self._memory is None:
            shape = (self._rows, self.columns)
            options = self._head.buffer_dtype, self._head.weight.device, host_memory.LOGITS
            self._memory = host_memory.uninitialized(shape, *options)
        return self._memory[:count, :columns]

    def tiles(self, start: int, stop: int) -> list[slice]:
        """The last as large as may be: what it holds is used before another tile takes its place."""
        last = max(start, stop - self.limit)
        return [*_evenly(start, last, self.limit), *_evenly(last, stop, self.limit)]


def _evenly(start: int, stop: int, limit: int) -> list[slice]:
    """[start, stop) in slices of at most `limit`, of nearly the same size."""
    count = max(1, -(-(stop - start) // limit))
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:]) if a < b]


class Operands(NamedTuple):
    hidden: Tensor  # (S, T, H) or (N, H)
    rows: Rows
    head: Head

    def of(self, tile: slice) -> Tensor:
        return self.hidden[cpu.places(self.hidden, self.rows.index[tile])]

    @property
    def few(self) -> int:
        return max(1, PART_BYTES // (4 * self.hidden.shape[-1]))

    def parts(self, tile: slice) -> Iterator[tuple[slice, slice]]:
        """The tile's rows as GEMMs take them, and where they stand in it: of a wide head on a CPU a few at a time. A
        GPU's GEMMs stay whole: there a row of logits is much larger than one of hidden states."""
        limit = self.few if self.hidden.device.type == "cpu" else max(1, tile.stop - tile.start)
        for part in _evenly(tile.start, tile.stop, limit):
            yield part, slice(part.start - tile.start, part.stop - tile.start)

    def logits(self, tile: slice, buffer: Buffer, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = buffer.rows(tile.stop - tile.start, self.head.weight.shape[0])
        for part, of_tile in self.parts(tile):
            self.head.project(self.of(part), out[of_tile])
        return out


class Gradients:
    """d hidden, d weight and d bias, as they are needed, tile by tile; 16-bit operands' in float32.

    `kept_only`: d hidden (K, H) of the kept rows, instead of all.
    """

    def __init__(
        self,
        operands: Operands,
        needs: Sequence[bool],
        buffer: Buffer,
        one_tile: bool = False,
        kept_only: bool = False,
    ) -> None:
        self._operands, self._needs, self._buffer, self._kept_only = operands, needs, buffer, kept_only
        self.hidden: Tensor | None = None
        if needs[0]:
            dtype, kept = cpu.accumulation_dtype(operands.hidden), operands.rows.index.shape[0]
            shape = (kept if kept_only else operands.hidden.shape[:-1].numel(), operands.hidden.shape[-1])
            self.hidden = (torch.empty if kept_only else torch.zeros)(shape, dtype=dtype, device=operands.hidden.device)
        self._head = WeightGradient(operands.head, needs[1], needs[2], one_tile)

    def add(
        self,
        tile: slice,
        logits: Tensor | None,
        statistics: Statistics,
        scale: Tensor,
        factor: Tensor | None = None,
        start: int = 0,
    ) -> None:
        """`scale` (rows of the tile,): of d(-log-prob). The logits are used up; where the head leaves terms they must be
        those, and stay. None: they are computed again. `factor` (): that of all there is so far, which came from the rows
        from `start` on."""
        rows = self._operands.rows
        if factor is not None:
            self.scale_hidden(slice(start, tile.start), factor)
        for columns, head in self._operands.head.slices(self._buffer.columns):
            operands = self._operands._replace(head=head)
            gradient = operands.logits(tile, self._buffer) if logits is None else logits
            if head.leaves_terms:
                if logits is None:
                    head.terms_(gradient, rows.label[tile])
                numbers = head.row_numbers(statistics.total, scale)
            else:
                head.differentiate_(gradient, rows.label[tile], statistics.shift, statistics.total, scale)
                numbers = None
            for part, of_tile in operands.parts(tile):
                if self._needs[0]:
                    at = part if self._kept_only else rows.index[part]
                    d_hidden = head.hidden_gradient(gradient[of_tile])
                    if numbers is not None:
                        d_hidden = _scaled(d_hidden, numbers[of_tile])
                    self.hidden[at] = d_hidden if columns.start == 0 else d_hidden.add_(self.hidden[at])
                if self._needs[1] or self._needs[2]:
                    # 0 * NaN: rows without a coefficient (an inert pair, say) have no part, whatever they are
                    hidden, own_factor = operands.of(part), factor if part.start == tile.start else None
                    if numbers is None:
                        hidden = hidden.masked_fill_((scale[of_tile] == 0)[:, None], 0)
                        self._head.add(gradient[of_tile], hidden, columns, own_factor)
                    else:
                        hidden = _scaled(hidden.to(gradient.dtype), numbers[of_tile])
                        self._head.add(gradient[of_tile], hidden, columns, own_factor, numbers[of_tile])

    def put_hidden(self, tile: slice, d_hidden: Tensor) -> None:
        self.hidden[tile if self._kept_only else self._operands.rows.index[tile]] = d_hidden

    def scale_hidden(self, tile: slice, factor: Tensor) -> None:
        """The tile's rows of d hidden, times a number () or one for each."""
        if self._needs[0]:
            index, few = self._operands.rows.index[tile], self._operands.few
            for part, factors in zip(index.split(few), factor.expand(len(index)).split(few)):
                self.hidden[part] = _scaled(self.hidden[part], factors)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._needs[0] and self._operands.head.shard is not None:
            torch.distributed.all_reduce(self.hidden, group=self._operands.head.shard.group)
        return (self.hidden, *self._head.results())


def _statistics(
    operands: Operands, tile: slice, buffer: Buffer, out: Tensor | None = None
) -> tuple[Tensor | None, Statistics]:
    """And the logits, in `out` or the buffer, or the terms that the head leaves there; None if that does not hold a row of
    them."""
    head, label = operands.head, operands.rows.label[tile]
    if buffer.columns == head.weight.shape[0]:
        logits = operands.logits(tile, buffer, out)
        return logits, (head.terms_ if head.leaves_terms else head.statistics)(logits, label)
    slices = (part for _, part in head.slices(buffer.columns))
    return None, head.combined([s.partial(operands._replace(head=s).logits(tile, buffer), label) for s in slices])


def _statistics_and_unit(operands: Operands, tile: slice, buffer: Buffer) -> tuple[Statistics, Tensor]:
    """And d(-log-prob of the row's label) / d hidden (R, H), from slices of the vocabulary, of which each is computed once.

    The terms exp(x - shift) of all tokens but the label, and their product with the weight, are added up from slice to
    slice, weighed anew where the maximum grows, and divided once. The label's part is -(1 - p) times its row of the weight:
    so a confident token, for which p - 1 has few digits, keeps them.
    """
    head, labels = operands.head, operands.rows.label[tile]
    shift = labels.new_full(labels.shape, -torch.inf, dtype=cpu.accumulation_dtype(head.weight))
    rest, label_logit, unit = torch.zeros_like(shift), torch.zeros_like(shift), shift.new_zeros(1)
    nowhere, one = torch.full_like(labels, -1), torch.ones_like(shift)

    def times(values: Tensor, weight: Tensor) -> Tensor:
        return (values * weight[:, None]).masked_fill((weight == 0)[:, None], 0)

    for _, part in head.slices(buffer.columns):
        logits = operands._replace(head=part).logits(tile, buffer)
        column, elsewhere = part.local(labels)
        at = (~elsewhere).nonzero().flatten()
        label = at, column[at]
        label_logit[at] = logits[label].to(shift.dtype)
        logits[label] = -torch.inf
        others = part.partial(logits, nowhere)
        largest = torch.maximum(shift, others.shift)
        before, new = ((m - largest).exp().masked_fill(m == -torch.inf, 0) for m in (shift, others.shift))
        rest = rest * before + (others.total * new).masked_fill(others.shift == -torch.inf, 0)
        shift = largest
        logits[label] = 0  # softcap's slope at -inf would be none
        part.differentiate_(logits, nowhere, others.shift, one, one)
        logits[label] = 0
        unit = times(unit, before) + times(part.hidden_gradient(logits), new)
    first = 0 if head.shard is None else head.shard.start
    column = (labels - first).clamp(0, head.weight.shape[0] - 1)
    here = column == labels - first
    # No rank's: NaN, as the launchers have it.
    label_logit.masked_fill_((labels < 0) | (labels >= head.vocabulary), torch.nan)
    of_label = Statistics(label_logit.masked_fill(~here, -torch.inf), one, label_logit)
    statistics = head.combined([Statistics(shift, rest, torch.zeros_like(rest)), of_label])
    share = ((shift - statistics.shift).exp() / statistics.total).masked_fill(shift == -torch.inf, 0)
    on_one_rank = head.shard is None or head.shard.group is None
    others = rest * share if on_one_rank else -torch.expm1(statistics.logps)
    slope = others * head.logit_scale
    if head.softcap is not None:
        slope = slope * (1 - (label_logit / head.softcap).square())
    return statistics, times(unit, share).sub_(times(head.weight[column].to(unit.dtype), slope.masked_fill(~here, 0)))


class LossResults(NamedTuple):
    fields: PairResults
    shift: Tensor  # (K,)
    total: Tensor  # (K,)
    # Of the loss with reduction="mean", and not rounded: the upstream gradient is to be folded in before.
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def loss(
    hidden: Tensor,  # (2B, T, H) or (N, H)
    rows: Rows,
    head: Head,
    anchor_hidden: Tensor | None,
    anchor_head: Head,
    anchor_margin: Tensor | None,  # (B,)
    max_logits_bytes: int,
    options: dict,  # pair_results'
    needs: Sequence[bool],  # gradients: hidden, weight, bias
) -> LossResults:
    """The loss of pairs and, as they are needed, its gradients.

    A pair with more rows than the buffer has the logits that went beyond it computed again once its coefficients are known.
    Not the first pair: until then there is nothing else in d weight, and all that its coefficients have in common can wait.
    """
    operands, kept = Operands(hidden, rows, head), rows.index.shape[0]
    buffer = Buffer(head, kept, max_logits_bytes)
    if anchor_hidden is not None:
        anchor = Operands(anchor_hidden, rows, anchor_head)
        every = [_statistics(anchor, tile, buffer)[1] for tile in buffer.tiles(0, kept)]
        chosen, rejected = sequence_means(_sums(rows, every), rows.counts, options["length_normalized"]).chunk(2)
        anchor_margin = chosen - rejected
    gradients = Gradients(operands, needs, buffer)
    sliced = buffer.columns < head.weight.shape[0]
    every: list[Statistics] = []
    sums = torch.zeros_like(rows.counts, dtype=torch.float64)
    shares = None if options["sft_weight"] else margin_shares(rows.counts, options["length_normalized"])
    for start, stop in _whole_pairs(rows, buffer.limit):
        tiles, found = buffer.tiles(start, stop), []
        unit = (len(tiles) > 1 or sliced) and needs[0] and not (needs[1] or needs[2])
        ahead = not every and _goes_ahead(head, tiles, needs, shares)
        for tile in tiles:
            if unit and sliced:
                statistics, d_hidden = _statistics_and_unit(operands, tile, buffer)
                gradients.put_hidden(tile, d_hidden)
                found.append(statistics)
                continue
            logits, statistics = _statistics(operands, tile, buffer)
            if unit or ahead and tile.stop < stop:
                share = shares[rows.sequence[tile]] if ahead else torch.ones_like(statistics.total)
                gradients.add(tile, logits, statistics, share)
            found.append(statistics)
        every += found
        sums += _sums(rows.part(start, stop), found)
        if not any(needs):
            continue
        # Those of pairs still to come are not read.
        coefficients = pair_results(sums, rows.counts, anchor_margin, **options).coefficients
        scale = coefficients[rows.sequence[start:stop]]
        if unit:
            gradients.scale_hidden(slice(start, stop), scale)
            continue
        if ahead:
            factor = _common(coefficients, shares, rows.sequence[start])
            gradients.add(tile, logits, statistics, scale[tile.start - start :], factor, start)
            continue
        for tile, statistics in _last_first([*zip(tiles, found)]):
            gradients.add(tile, logits, statistics, scale[tile.start - start : tile.stop - start])
            logits = None  # the others' are computed again
    dtype = cpu.accumulation_dtype(hidden)
    fields = pair_results(sums, rows.counts, anchor_margin, **options)
    fields = PairResults(*(f.to(dtype, copy=True) if f.is_floating_point() else f for f in fields))
    return LossResults(fields, *_joined(every, hidden), gradients.results())


def _goes_ahead(head: Head, tiles: list[slice], needs: Sequence[bool], shares: Tensor | None) -> bool:
    """Whether the first pair's tiles can be used up before its coefficients are known, but for a factor. 16 bits would round
    all labels' share of a sequence alike, and no later factor takes that back."""
    return len(tiles) > 1 and (needs[1] or needs[2]) and shares is not None and head.buffer_dtype not in HALF


def _last_first(tiles: list) -> list:
    """In the order in which `loss` makes the gradients of a pair with more rows than the buffer."""
    return [*tiles[-1:], *tiles[:-1]]


def _common(coefficients: Tensor, shares: Tensor, sequence: Tensor) -> Tensor:
    """What the coefficients of a sequence's pair have in common, beyond the shares: 0 of an inert pair."""
    share = shares[sequence]
    return (coefficients[sequence] / share).masked_fill(share == 0, 0)


def _whole_pairs(rows: Rows, limit: int) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of neighbouring pairs with at most `limit` rows together, or of one pair with more."""
    ends = rows.ends[1::2]
    start = 0
    for stop, following in zip(ends, [*ends[1:], None]):
        if stop > start and (following is None or following - start > limit):
            yield start, stop
            start = stop


def _sums(rows: Rows, statistics: list[Statistics]) -> Tensor:
    """(S,) float64, of the rows' log-probs."""
    none = torch.empty(0, device=rows.label.device)
    return rows.sums(torch.cat([none, *(part.logps for part in statistics)]))


def _joined(statistics: list[Statistics], like: Tensor) -> tuple[Tensor, Tensor]:
    if not statistics:
        empty = like.new_zeros(0, dtype=cpu.accumulation_dtype(like))
        return empty, empty.clone()
    return torch.cat([s.shift for s in statistics]), torch.cat([s.total for s in statistics])


class LogpsResults(NamedTuple):
    sums: Tensor  # (S,) float64
    shift: Tensor  # (K,)
    total: Tensor  # (K,)
    unit: Tensor | None  # (K, H) d(-log-prob of the row's label) / d hidden: each backward scales it
    logits: Tensor | None  # (K, V), or the terms that the head leaves there, if they were to be kept and fit


def logps(
    hidden: Tensor, rows: Rows, head: Head, max_logits_bytes: int, needs: Sequence[bool], keep: bool
) -> LogpsResults:
    """Log-probs, and what any number of backwards need: d hidden but for a scale, and the logits if d weight needs them."""
    operands, kept = Operands(hidden, rows, head), rows.index.shape[0]
    # Statistics alone take few rows at a time: a graph that waits for its backward may keep the rest of the budget, and
    # leaves them so much (gapo_step's does, while the anchor is measured).
    buffer = (Buffer if any(needs) else _small_buffer)(head, kept, max_logits_bytes)
    logits_kept = None
    if keep and (needs[1] or needs[2]) and kept + _least_tile(kept) <= max_logits_bytes // head.row_bytes:
        shape = (kept, head.weight.shape[0])
        logits_kept = host_memory.uninitialized(shape, head.buffer_dtype, hidden.device, host_memory.LOGITS)
        buffer = buffer if head.leaves_terms else _beside_kept(head, kept, max_logits_bytes)
    # Not rounded to 16 bits before a coefficient scales it.
    unit = Gradients(operands, (needs[0], False, False), buffer, kept_only=True)
    every: list[Statistics] = []
    for tile in buffer.tiles(0, kept):
        if needs[0] and buffer.columns < head.weight.shape[0]:
            statistics, d_hidden = _statistics_and_unit(operands, tile, buffer)
            unit.put_hidden(tile, d_hidden)
            every.append(statistics)
            continue
        logits, statistics = _statistics(operands, tile, buffer, None if logits_kept is None else logits_kept[tile])
        every.append(statistics)
        if needs[0]:
            if logits_kept is not None and not head.leaves_terms:
                logits = buffer.rows(tile.stop - tile.start).copy_(logits)
            unit.add(tile, logits, statistics, torch.ones_like(statistics.total))
    return LogpsResults(_sums(rows, every), *_joined(every, hidden), unit.results()[0], logits_kept)


def _scaled(unit: Tensor, scale: Tensor) -> Tensor:
    """scale (R,) * unit (R, H), zero where the scale is, whatever the unit is."""
    return (unit * scale[:, None].to(unit.dtype)).masked_fill_((scale == 0)[:, None], 0)


def _least_tile(kept: int) -> int:
    """Rows of a buffer beside kept logits, this call's or another's: fewer would make the GEMMs slow."""
    return min(kept, max(256, kept // 8))


def _small_buffer(head: Head, kept: int, max_logits_bytes: int) -> Buffer:
    rows = _least_tile(kept)
    return Buffer(head, rows, min(max_logits_bytes, rows * head.row_bytes))


def _beside_kept(head: Head, kept: int, max_logits_bytes: int) -> Buffer:
    return _small_buffer(head, kept, max_logits_bytes - kept * head.row_bytes)


def logps_gradients(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    max_logits_bytes: int,
    scale: Tensor,  # (S,) of d(-log-prob) of each sequence's rows
    shift: Tensor,  # (K,)
    total: Tensor,  # (K,)
    unit: Tensor | None,  # as LogpsResults has them
    logits: Tensor | None,
    needs: Sequence[bool],
    in_pairs: bool,
    shares: Tensor | None,  # (S,) margin_shares, if that is what the scales of every pair have in common
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of sum(scale * -log-prob): nothing that was kept is used up. Those of pairs as `loss` makes them."""
    kept = rows.index.shape[0]
    row_scale = scale[rows.sequence]
    hidden_needed = needs[0] and unit is None
    copied = logits is not None and not head.leaves_terms
    buffer = (_beside_kept if copied else Buffer)(head, kept, max_logits_bytes)
    operands = Operands(hidden, rows, head)
    one_tile = kept <= buffer.limit and buffer.columns == head.weight.shape[0]
    gradients = Gradients(operands, (hidden_needed, *needs[1:]), buffer, one_tile)
    groups = _whole_pairs(rows, buffer.limit) if in_pairs else [(0, kept)]
    for start, stop in groups if hidden_needed or needs[1] or needs[2] else []:
        tiles = buffer.tiles(start, stop)
        ahead = start == 0 and _goes_ahead(head, tiles, needs, shares)
        for tile in tiles if ahead or not in_pairs else _last_first(tiles):
            own = None if logits is None else logits[tile]
            if copied:
                own = buffer.rows(tile.stop - tile.start).copy_(own)
            last = tile.stop == stop
            tile_scale = row_scale[tile] if last or not ahead else shares[rows.sequence[tile]]
            factor = _common(scale, shares, rows.sequence[start]) if last and ahead else None
            gradients.add(tile, own, Statistics(shift[tile], total[tile], total[tile]), tile_scale, factor, start)
    found = list(gradients.results())
    del gradients  # what is rounded below goes at once, one after the other
    for i in range(len(found)):
        found[i] = None if found[i] is None else found[i].to(hidden.dtype)
    if needs[0] and unit is not None:
        found[0] = hidden.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
        for index, part, scales in zip(*(t.split(operands.few) for t in (rows.index, unit, row_scale))):
            found[0][index] = _scaled(part, scales).to(hidden.dtype)
    return tuple(found)
