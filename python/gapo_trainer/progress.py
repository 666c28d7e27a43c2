"""What a run shows and measures of itself while it trains."""

import time

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class StepProgress(ProgressCallback):
    """transformers' progress bar, with the latest numbers beside the bar in place of a line for every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"margin {logs['eval_gapo/margin']:+.4f}, accuracy {logs['eval_rewards/accuracies']:.1%}"
            )
        elif "loss" in logs:
            shown = {"loss": "loss", "margin": "gapo/margin", "gap": "gapo/gap", "weight": "gapo/weight"}
            self.training_bar.set_postfix({name: f"{logs[key]:.4f}" for name, key in shown.items() if key in logs})

    def close(self):
        """Close the bars of a run that ended in an exception, before anything else is printed."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None


class StepClock(TrainerCallback):
    """seconds: time spent in training steps so far, evaluations left out."""

    def __init__(self):
        self.seconds = 0.0
        self._since = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.monotonic() - self._since
