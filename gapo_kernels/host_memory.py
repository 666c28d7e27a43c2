"""Memory for a tensor the size of the logits, a gradient or a buffer, on the CPU: kept from one step to the next.

A fresh tensor of that size costs a page fault for each of its pages, and the operating system zeroes them all before
anyone writes. So the pages of the last gradient stay mapped when it dies, huge where the system has such, and marked as
free for the taking: under memory pressure the system takes them back. Of a kind, one's memory is kept at most.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from gapo_kernels import threads

HUGE_PAGE = 2**21

# One of each kind: LOGITS, their gradient or a buffer of them, and WEIGHT, a head's gradient.
LOGITS, WEIGHT = "logits", "weight"
_spare: dict[str, mmap.mmap] = {}
_asked: dict[str, int] = {}  # bytes, the last time
_lent: set[int] = set()  # the storages that are alive, by torch's own addresses


def zeros_but(like: Tensor, written: Tensor) -> Tensor:
    """A contiguous tensor like `like` (..., V), zero but in the rows that the caller is about to write.

    `written`: (K,) int64, ascending, those rows' positions among all rows: they hold anything.
    """
    mapped = _mapped(like.shape, like.dtype, like.device, LOGITS)
    if mapped is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    flat, memory, fresh = mapped
    if not fresh:
        row = like.numel() * like.element_size() // like.shape[:-1].numel()

        def drain(gaps: Iterator[tuple[int, int]]) -> None:
            for start, stop in gaps:
                _zero(memory, flat, start * row, stop * row)

        threads.share(_gaps(written, like.shape[:-1].numel()), drain, like.device)
    return _shaped(flat, like.shape)


def uninitialized(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str) -> Tensor:
    """torch.empty, in kept memory where that pays. kind: LOGITS or WEIGHT."""
    mapped = _mapped(torch.Size(shape), dtype, device, kind)
    return torch.empty(shape, dtype=dtype, device=device) if mapped is None else _shaped(mapped[0], shape)


def _shaped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    # No view for autograd, which would add to one out of place.
    return flat.view(shape).detach()


def _mapped(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, kind: str
) -> tuple[Tensor, mmap.mmap, bool] | None:
    """A flat tensor, its memory, and whether that is new (all zeros); None where torch's own allocator serves."""
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE_PAGE:
        return None
    memory = _spare.pop(kind, None)
    if memory is not None and len(memory) < size:
        memory = None  # unmapped before its successor is mapped
    fresh = memory is None
    if memory is not None:
        # No more stays in memory than was asked for now or the time before: where short and long batches take turns, the
        # long ones would find their pages gone.
        _discard(memory, max(size, _asked[kind]), len(memory))
    else:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # no memory: torch's own error says so as users expect it
            return None
        _advise(memory, mmap.MADV_HUGEPAGE, 0, size)
    _asked[kind] = size
    view = memoryview(memory)
    flat = torch.frombuffer(view, dtype=dtype, count=shape.numel())
    storage = flat.untyped_storage()._cdata
    # The tensor owns the view: when it dies, the memory comes back.
    weakref.finalize(view, _keep, memory, kind, storage).atexit = False
    _lent.add(storage)
    return flat, memory, fresh


def is_lent(storage: torch.UntypedStorage) -> bool:
    """Whether its memory comes from here: nobody else's, until the storage dies."""
    return storage._cdata in _lent


def release() -> None:
    """Gives the kept memory back to the system."""
    _spare.clear()


def _keep(memory: mmap.mmap, kind: str, storage: int) -> None:
    _lent.discard(storage)
    _advise(memory, mmap.MADV_FREE, 0, len(memory))
    _spare[kind] = memory


def _gaps(written: Tensor, rows: int) -> list[tuple[int, int]]:
    """The runs [start, stop) of rows in between the written ones."""
    edges = torch.cat([written.new_tensor([-1]), written, written.new_tensor([rows])])
    before = (edges.diff() > 1).nonzero().flatten()
    return list(zip((edges[before] + 1).tolist(), edges[before + 1].tolist()))


def _zero(memory: mmap.mmap, flat: Tensor, start: int, stop: int) -> None:
    """Zeroes the bytes [start, stop): whole huge pages by unmapping, which costs next to nothing until they are read."""
    first, last = _discard(memory, start, stop)
    size = flat.element_size()
    flat[start // size : first // size].zero_()
    flat[last // size : stop // size].zero_()


def _discard(memory: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """Unmaps the huge pages within [start, stop), which then read as zeros, and says which bytes these are."""
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, stop // HUGE_PAGE * HUGE_PAGE
    if first < last and _advise(memory, mmap.MADV_DONTNEED, first, last - first):
        return first, last
    return stop, stop


def _advise(memory: mmap.mmap, advice: int, start: int, length: int) -> bool:
    try:
        memory.madvise(advice, start, length)
    except OSError:  # a kernel without that advice
        return False
    return True
