"""Ctrl-C and other signals, held back while the weights are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from types import FrameType

# On the stack while a `with` statement's entry or exit runs, from before its generator is resumed.
_ENTRY_AND_EXIT = {_GeneratorContextManager.__enter__.__code__, _GeneratorContextManager.__exit__.__code__}

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
            previous[signum](signum, frame)

    try:
        for signum in previous:
            signal.signal(signum, hold)
        yield
    finally:
        for signum, handler in previous.items():
            if signal.getsignal(signum) is hold:
                signal.signal(signum, handler)
        left.append(True)  # blocks that are not left in reverse order may put this handler back in place
        for signum in held:
            previous[signum](signum, None)


def _entering_or_leaving(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _ENTRY_AND_EXIT:
        frame = frame.f_back
    return frame is not None
