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
    for manager in (_GeneratorContextManager, torch.no_grad, torch.enable_grad, torch.autocast)
    for method in (manager.__enter__, manager.__exit__)
}

# Any handler that is Python's may raise: a timeout's, a launcher's, a DataLoader's for a worker that was killed.
_SIGNALS = sorted(signal.valid_signals())


@contextmanager
def interrupt_held(in_body: bool = True) -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once, unless it comes in such an entry or exit: there it waits, too, and
    so do other signals, there alone. in_body=False: there alone the first Ctrl-C waits, too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs here
        return
    previous = {signum: handler for signum in _SIGNALS if callable(handler := signal.getsignal(signum))}
    held, left = [], []

    def hold(signum, frame):
        first = in_body and signum == signal.SIGINT and signum not in held
        if not left and (first or _entering_or_leaving(frame)):
            held.append(signum)
        else:
            previous[signum](signum, frame)

    try:
        for signum in previous:
            signal.signal(signum, hold)
        yield
    finally:
        _put_back(hold, previous, held, left)


def _put_back(hold: Callable, previous: dict[int, Callable], held: list[int], left: list[bool]) -> None:
    """The handlers, each in its place, and then calls those of the signals that were held; and only then lets through what
    one of them raised meanwhile."""
    failure = None
    for _ in range(len(previous) + len(held) + 1):  # each of them may raise once
        try:
            for signum, handler in previous.items():
                if signal.getsignal(signum) is hold:
                    signal.signal(signum, handler)
            left.append(True)  # blocks that are not left in reverse order may put this handler back in place
            while held:
                signum = held.pop(0)
                previous[signum](signum, None)
            break
        except BaseException as error:
            if failure is None or isinstance(failure, Exception):  # of several a KeyboardInterrupt rather than a timeout
                failure = error
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # its traceback holds the frames of a whole step


def _entering_or_leaving(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _ENTRY_AND_EXIT:
        frame = frame.f_back
    return frame is not None
