"""Dense tensors as flat memory: their elements fill it, in any order of the dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

REORDERED_AT_ONCE = 40 * 2**20  # bytes of a gradient whose elements lie in another order than its parameter's
MOST_RUNS = 2**19  # of elements that stay together where a matrix is transposed in its own memory


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of a dense tensor that is laid out like this one: its own if it is dense."""
    return torch.empty_like(tensor, device="meta").stride()


def is_dense(tensor: Tensor) -> bool:
    return strides(tensor) == tensor.stride()


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, whatever the order of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,))


def ordered_as(strides: Sequence[int], tensor: Tensor, exclusive: bool) -> tuple[Tensor, bool]:
    """The tensor with these strides, in its own memory if that is nobody else's or lies in this order; and whether what it
    has then is nobody else's."""
    if is_dense(tensor):
        ordered = tensor.as_strided(tensor.shape, strides)
        if all(size == 1 or own == wanted for size, own, wanted in zip(tensor.shape, tensor.stride(), strides)):
            return ordered, exclusive
        if exclusive:
            _reorder(ordered, tensor)
            return ordered, True
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor), True


def _reorder(target: Tensor, source: Tensor) -> None:
    """Copies from one order to the other in the same memory: parts of it that hold the same elements in both orders, experts'
    matrices say, one after the other."""
    if source.nbytes > REORDERED_AT_ONCE:
        for dim, size in enumerate(source.shape):
            stride = source.numel() // size
            if size > 1 and source.stride(dim) == target.stride(dim) == stride:  # the outermost one of both
                count = max(1, REORDERED_AT_ONCE // (stride * source.element_size()))
                for first in range(0, size, count):
                    length = min(count, size - first)
                    _reorder(target.narrow(dim, first, length), source.narrow(dim, first, length))
                return
        if _transposed_in_parts(target, source):
            return
    target.copy_(source.clone())


def _transposed_in_parts(target: Tensor, source: Tensor) -> bool:
    """`_reorder` of what lies as a matrix whose transpose is wanted, each of its sides some dimensions. False, and nothing
    done, where neither side can be cut into equal parts of the right length.

    A matrix (R, C, b) of runs of b elements becomes (C, R, b), run by run, and each of its (R, b) then (b, R); or first its
    (b, C) become (C, b), and (R, C, b) then (C, R, b).
    """
    dims = [dim for dim, size in enumerate(source.shape) if size > 1]
    held, wanted = (sorted(dims, key=tensor.stride, reverse=True) for tensor in (source, target))
    turn = held.index(wanted[0]) if dims else 0
    if turn == 0 or held[turn:] + held[:turn] != wanted:
        return False
    columns = math.prod(source.shape[dim] for dim in held[turn:])
    rows = source.numel() // columns
    most = REORDERED_AT_ONCE // source.element_size()
    by_column, by_row = _parts(columns, rows, most), _parts(rows, columns, most)
    if not (by_column or by_row):
        return False
    memory = flat(source)
    if by_column and not 0 < by_row * columns < by_column * rows:  # the fewer runs
        _transpose_runs(memory, rows, by_column, columns // by_column)
        _transpose_each(memory, rows, columns // by_column)
    else:
        _transpose_each(memory, rows // by_row, columns)
        _transpose_runs(memory, by_row, columns, rows // by_row)
    return True


def _parts(cut: int, whole: int, most: int) -> int:
    """Into how many parts a side is cut, so that each, with all of the other side, has at most so many elements; 0: into
    none without too many runs."""
    least = -(-cut * whole // max(1, most))
    return next((count for count in range(least, min(cut, MOST_RUNS // whole) + 1) if cut % count == 0), 0)


def _transpose_each(memory: Tensor, rows: int, columns: int) -> None:
    """Of the matrices (rows, columns) that the memory is made of, one after the other."""
    scratch = memory.new_empty(rows, columns)
    for matrix in memory.view(-1, rows, columns):
        scratch.copy_(matrix)
        matrix.view(columns, rows).copy_(scratch.t())


def _transpose_runs(memory: Tensor, rows: int, columns: int, length: int) -> None:
    """(rows, columns) runs of elements become (columns, rows)."""
    runs = memory.view(rows * columns, length)
    at_once = max(1, REORDERED_AT_ONCE // (4 * length * memory.element_size()))
    scratch = runs.new_empty(2, min(at_once, len(runs)), length)
    for swaps in _swaps(rows, columns):
        for places in zip(*(side.to(memory.device, torch.int64).split(at_once) for side in swaps)):
            kept = scratch[:, : len(places[0])]
            for side, place in zip(kept, places):
                torch.index_select(runs, 0, place, out=side)
            for side, place in zip(kept, reversed(places)):
                runs.index_copy_(0, place, side)


@lru_cache(maxsize=16)
def _swaps(rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of places that change contents, all pairs of the first list at once, then all of the second, so that a matrix
    (rows, columns), row after row, becomes its transpose. A cycle of places is passed on by turning it round, and then once
    more without one of them; all cycles are found together, in steps that double."""
    with torch.inference_mode(False), torch.no_grad():
        own = torch.arange(rows * columns, device="cpu")
        takes = own.view(rows, columns).t().flatten()  # from where each place does
        doublings = len(own).bit_length()
        first, ahead = own, takes  # of its cycle; as many places ahead as have been looked at
        for _ in range(doublings):
            first, ahead = torch.minimum(first, first[ahead]), ahead[ahead]
        is_first = first == own
        steps, ahead = (~is_first).long(), torch.where(is_first, own, takes)  # to the first place, where one stays
        for _ in range(doublings):
            steps, ahead = steps + steps[ahead], ahead[ahead]
        length = torch.bincount(first, minlength=len(own))[first]
        order = (first * len(own) + steps).argsort()  # a place takes from the one before, the first from the last
        steps, length = steps[order], length[order]
        swaps = []
        for mirrored in (own - 2 * steps + length - 1, torch.where(steps > 0, own - 2 * steps + length, own)):
            pairs = mirrored > own
            swaps.append(tuple(order[side[pairs]].int() for side in (own, mirrored)))
        return swaps
