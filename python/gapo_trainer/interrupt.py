"""Stopping a run at a place where it can be saved: Ctrl-C and a time limit."""

import signal
import time

from transformers import TrainerCallback


class SafeStop(TrainerCallback):
    """Ends training after the step in progress, on Ctrl-C or when time is up. Use it as a callback, and as a context
    manager around everything that the first Ctrl-C must not tear apart.

    deadline: time.monotonic() value after which no further step is begun; None for no limit.

    The first Ctrl-C ends training after the step in progress, or raises KeyboardInterrupt between two batches of an
    evaluation. A second one raises at once, except while the optimizer is moving the weights.

    has_begun: whether everything that training needs has been made.
    """

    def __init__(self, deadline=None):
        self.deadline = deadline
        self.has_begun = False
        self.interrupted = False
        self.out_of_time = False
        self._updating = False
        self._pending = False
        self._previous = None

    def __enter__(self):
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, signum, frame):
        if not self.interrupted:
            self.interrupted = True
            print("\nInterrupted: finishing the step in progress, then saving. Ctrl-C again to drop it.", flush=True)
        elif self._updating:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def on_train_begin(self, args, state, control, **kwargs):
        self.has_begun = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._updating = True

    def on_step_end(self, args, state, control, **kwargs):
        self._updating = False
        if self._pending:
            raise KeyboardInterrupt
        if self.deadline is not None and time.monotonic() > self.deadline and not control.should_training_stop:
            self.out_of_time = control.should_training_stop = control.should_evaluate = True
        self.on_substep_end(args, state, control)

    def on_substep_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_training_stop, control.should_evaluate = True, False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt
