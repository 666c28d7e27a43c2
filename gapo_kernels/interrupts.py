"""Ctrl-C and other signals, held back while the weights are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager, contextmanager
from types import FrameType
from weakref import WeakKeyDictionary

import torch

# On the stack while a `with` statement's entry or exit runs, from before its generator is resumed. torch.no_grad, cut off in
# one of its own, leaves gradients off for good.
_ENTRY_AND_EXIT = {
    method.__code__
    for manager in (_GeneratorContextManager, torch.no_grad)
    for method in (manager.__enter__, manager.__exit__)
}

# What holds signals in a block: the handlers that were in place before it.
_holds: WeakKeyDictionary[Callable, dict[int, Callable]] = WeakKeyDictionary()

# Any handler that is Python's may raise: a timeout's, a launcher's, a DataLoader's for a worker that was killed.
_SIGNALS = sorted(signal.valid_signals())


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once, unless it comes in such an entry or exit: there it waits, too, and
    so do other signals, there alone."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs here
        return
    previous = {signum: handler for signum in _SIGNALS if callable(handler := signal.getsignal(signum))}
    held, left = [], []

    def hold(signum, frame):
        first = signum == signal.SIGINT and signum not in held
        if not left and (first or _entering_or_leaving(frame)):
            held.append(signum)
        else:
            handler = previous[signum]
            while handler in _holds:  # of a block around this one, which would let it wait after all
                handler = _holds[handler][signum]
            handler(signum, frame)

    _holds[hold] = previous
    try:
        for signum in previous:
            signal.signal(signum, hold)
        yield
    finally:
        failure = None
        while len(left) == 0 or held:
            try:
                for signum, handler in previous.items():
                    if signal.getsignal(signum) is hold:
                        signal.signal(signum, handler)
                left.append(True)  # blocks that are not left in reverse order may put this handler back in place
                while held:
                    signum = held.pop(0)
                    previous[signum](signum, None)
            except BaseException as error:  # of one handler: the others are put back, and called, all the same
                failure = failure or error
        if failure is not None:
            raise failure


def _entering_or_leaving(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _ENTRY_AND_EXIT:
        frame = frame.f_back
    return frame is not None
