"""Ctrl-C, held back while the weights are elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Holds a Ctrl-C back until the block is left: anywhere in a `with` statement's own entry and exit it would skip
    the restoration. A second Ctrl-C passes at once."""
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield  # nothing raises KeyboardInterrupt here
        return
    held, left = [], []

    def hold(signum, frame):
        if not left:
            held.append(signum)
        if left or len(held) > 1:
            previous(signum, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        left.append(True)  # blocks that are not left in reverse order may put this handler back in place
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, previous)
        if held:
            previous(signal.SIGINT, None)
