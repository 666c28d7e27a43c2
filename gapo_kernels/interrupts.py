"""Ctrl-C and other signals, held back while the weights are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import _GeneratorContextManager, contextmanager
from types import FrameType

import torch

# On the stack while a `with` statement's entry or exit runs, from before its generator is resumed. torch's own, cut off in
# one of theirs, leave gradients off, or autocast on, for good.
_ENTRY_AND_EXIT = {
    method.__code__
    for manager in (_GeneratorContextManager, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)
    for method in (manager.__enter__, manager.__exit__)
}

# Any handler that is Python's may raise: a timeout's, a launcher's, a DataLoader's for a worker that was killed.
_SIGNALS = sorted(signal.valid_signals())


class _Holding:
    """In the place of every handler that is Python's, from the beginning of a block to its end."""

    def __init__(self, in_body: bool) -> None:
        handlers = {signum: _in_use(signal.getsignal(signum), signum) for signum in _SIGNALS}
        self.previous = {signum: handler for signum, handler in handlers.items() if callable(handler)}
        self.held: list[tuple[int, FrameType | None]] = []
        self.is_left, self._in_body = False, in_body

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        first = self._in_body and signum == signal.SIGINT and all(signum != held for held, _ in self.held)
        if not self.is_left and (first or _entering_or_leaving(frame)):
            self.held.append((signum, frame))
        else:
            self.previous[signum](signum, frame)


def _in_use(handler: Callable | int | None, signum: int) -> Callable | int | None:
    """The handler, or what those of blocks that are left, in another order or by another thread, pass the signal on to."""
    while isinstance(handler, _Holding) and handler.is_left:
        handler = handler.previous[signum]
    return handler


@contextmanager
def interrupt_held(in_body: bool = True) -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once, unless it comes in such an entry or exit: there it waits, too, and
    so do other signals, there alone. in_body=False: there alone the first Ctrl-C waits, too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs here
        return
    holding = _Holding(in_body)
    try:
        for signum in holding.previous:
            signal.signal(signum, holding)
        yield
    finally:
        _put_back(holding)


def _put_back(holding: _Holding) -> None:
    """The handlers, each in its place, and then calls those of the signals that were held; and only then lets through what
    one of them raised meanwhile."""
    previous, held = holding.previous, holding.held
    if threading.current_thread() is not threading.main_thread():  # of a generator that ends there: none can be put back
        holding.is_left = True
        while held:
            signal.raise_signal(held.pop(0)[0])  # for the main thread
        return
    failure = None
    for _ in range(len(previous) + len(held) + 1):  # each of them may raise once
        try:
            for signum, handler in previous.items():
                if signal.getsignal(signum) is holding:
                    signal.signal(signum, _in_use(handler, signum))
            holding.is_left = True  # blocks that are not left in reverse order may put this handler back in place
            while held:
                signum, frame = held.pop(0)
                previous[signum](signum, frame)
            break
        except BaseException as error:
            if failure is None or isinstance(failure, Exception):  # of several a KeyboardInterrupt rather than a timeout
                failure = error
    try:
        if failure is not None:
            raise failure
    finally:
        frame = None
        del failure  # its traceback holds the frames of a whole step


def _entering_or_leaving(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _ENTRY_AND_EXIT:
        frame = frame.f_back
    return frame is not None
