"""Ctrl-C around code that answers it badly, and around code that it must not reach. Standard library only: this is
needed before, and without, the libraries whose import may be what was interrupted."""

import contextlib
import signal


class NotedInterrupt:
    """seen: whether Ctrl-C was pressed."""

    seen = False


@contextlib.contextmanager
def noted_interrupt():
    """Inside, Ctrl-C raises KeyboardInterrupt as ever, and is noted in the `NotedInterrupt` that the block gets.

    A library that imports its modules on first use, as transformers does, can turn a KeyboardInterrupt that comes
    in the middle of an import into an ImportError: the note tells what it was.
    """
    note = NotedInterrupt()

    def handler(signum, frame):
        note.seen = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield note
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C has no effect inside the block: for the few seconds in which an interrupted run is saved."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
