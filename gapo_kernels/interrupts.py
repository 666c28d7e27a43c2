"""Ctrl-C, held back while the weights are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from types import FrameType

# On the stack while a `with` statement's entry or exit runs, from before its generator is resumed.
_ENTRY_AND_EXIT = {_GeneratorContextManager.__enter__.__code__, _GeneratorContextManager.__exit__.__code__}


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once, unless it comes in such an entry or exit: there it waits, too."""
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield  # nothing raises KeyboardInterrupt here
        return
    held, left = [], []

    def hold(signum, frame):
        if left or (held and not _entering_or_leaving(frame)):
            previous(signum, frame)
        else:
            held.append(signum)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, previous)
        left.append(True)  # blocks that are not left in reverse order may put this handler back in place
        for signum in held:
            previous(signum, None)


def _entering_or_leaving(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in _ENTRY_AND_EXIT:
        frame = frame.f_back
    return frame is not None
