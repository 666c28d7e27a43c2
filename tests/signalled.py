"""A signal at a chosen line of the code under test."""

import signal
import sys


class SignalAt:
    """Raises `signum` just before line number `at`, from 1, of those that run between start and stop; 0 or None: never.

    counted: of a frame, whether its lines are. `lines` is how many there were.
    """

    def __init__(self, at, signum, counted):
        self._at, self._signum, self._counted, self.lines = at, signum, counted, 0

    def start(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def stop(self):
        sys.settrace(self._before)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def _trace(self, frame, event, argument):
        if not self._counted(frame):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                signal.raise_signal(self._signum)
        return self._trace
