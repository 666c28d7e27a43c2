"""Work shared out over CPU threads, each item whole on one thread.

Splitting every torch operation over the threads instead costs a barrier an operation: no difference on idle cores, but
a hundred times slower where another process holds one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def share(
    items: Sequence[Item], drain: Callable[[Iterator[Item]], None], device: torch.device, most: int | None = None
) -> None:
    """Calls drain(queue) on as many threads as torch uses, at most `most`, all with the same queue of items; on a GPU on
    this one.

    drain owns what it allocates; its torch operations are not split further. It sees this thread's inference mode, and
    no grad mode.
    """
    queue = iter(items)
    threads = min(torch.get_num_threads(), len(items), most or len(items)) if device.type == "cpu" else 1
    if threads <= 1 or not _ran(threads, lambda: drain(queue)):
        with torch.no_grad():
            drain(queue)


def alone(work: Callable[[], Result], device: torch.device) -> Result:
    """work() on one of the threads of `share`, for small work in between: even of a few numbers MKL splits a logarithm
    over its own threads, and those then wait busily, for about 10 ms, on the cores that `share` needs next."""
    results: list[Result] = []
    split = device.type == "cpu" and torch.get_num_threads() > 1
    if not split or not _ran(1, lambda: results.append(work())):
        with torch.no_grad():
            return work()
    return results[0]


def _ran(threads: int, work: Callable[[], None]) -> bool:
    """Runs work() on so many threads, each once, or on as many as there are to be had. Whether there was any."""
    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        # Grad mode and inference mode are a thread's own: tensors made in the caller's may be written only in it. Not in the
        # caller's own: cut off there by a signal, inference mode's guard would bring back this state when it goes.
        with torch.no_grad(), torch.inference_mode(inference):
            work()

    futures: list[Future] = []
    try:
        pool = _pool(torch.get_num_threads())
        for _ in range(threads):
            futures.append(pool.submit(run))
    except RuntimeError:  # no thread to be had: the interpreter is about to end, or a limit on processes is reached
        pass
    try:
        for future in futures:
            future.result()
    finally:  # also after an interrupt: nobody may still write when this returns
        wait(futures)
    return bool(futures)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run torch operations without splitting them further."""
    begun = Barrier(threads)
    pool = ThreadPoolExecutor(threads, "gapo-cpu", initializer=_use_one_thread)
    try:
        wait([pool.submit(begun.wait) for _ in range(threads)])
    except BaseException:
        begun.abort()  # those that have begun wait for one that never will
        raise
    finally:
        # set_num_threads acts on the calling thread, and on what threads born later start with: so that is put back.
        torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread takes over the process-wide number when it first asks: not after the next line
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
