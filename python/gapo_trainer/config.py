"""`GAPOConfig`: transformers' TrainingArguments and the settings of the method."""

import dataclasses
import difflib
import json
import math
import numbers
import typing
from dataclasses import dataclass, field

import numpy as np
from transformers import TrainingArguments

from . import versions

versions.check()  # here, for `from gapo_trainer.trainer import ...`, say

_CHOICES = {
    "probe": ("loss", "margin"),
    "geometry": ("asam", "sam"),
    "direction": ("pessimistic", "gaussian"),
    "rounding": ("stochastic", "nearest"),
    "loss_type": ("sigmoid", "hinge"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
}


CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # transformers' old name and new
_POSITIVE = ("> 0", lambda value: value > 0)
_NOT_NEGATIVE = (">= 0", lambda value: value >= 0)
_COUNT = (">= 1", lambda value: value >= 1)
_DECAY = ("in [0, 1)", lambda value: 0 <= value < 1)
# What holds of a number beside that it is finite, in words and as a function.
_RANGES = {
    "beta": _POSITIVE,
    "gamma_beta_ratio": ("a number", lambda value: True),
    "rho": _NOT_NEGATIVE,
    "label_smoothing": ("in [0, 0.5)", lambda value: 0 <= value < 0.5),
    "sft_weight": _NOT_NEGATIVE,
    "max_length": (">= 2", lambda value: value >= 2),
    "max_logits_bytes": _POSITIVE,
    "pad_to_multiple_of": _COUNT,
    "dataset_num_proc": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "save_total_limit": _COUNT,
}
_WHOLE = (
    "max_length",
    "max_prompt_length",
    "max_logits_bytes",
    "pad_to_multiple_of",
    "dataset_num_proc",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "save_total_limit",
    "max_steps",
    "seed",
    "data_seed",
)
_MAY_BE_NONE = (
    "max_length",
    "max_prompt_length",
    "pad_to_multiple_of",
    "dataset_num_proc",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "save_total_limit",
    "data_seed",
    "eval_steps",
)
_MAY_BE_INFINITE = ("max_grad_norm",)  # which measures the norm and clips nothing


def nearest(value, among):
    """The end of a message about a wrong value: the valid one that it is closest to, or nothing."""
    found = difflib.get_close_matches(str(value), list(among), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _is_mapping(value):
    """Whether it is a dict, one as JSON, which transformers reads, or None."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return False
        return value.startswith("{")
    return value is None or isinstance(value, dict)


@dataclass
class GAPOConfig(TrainingArguments):
    """Every field of `transformers.TrainingArguments`, and those of GAPO below. Batch sizes count preference pairs.

    Raises ValueError, naming the field, what was expected and what was got.
    """

    beta: float = field(default=2.0, metadata={"help": "Scale of the anchor gap in the loss; > 0."})
    gamma_beta_ratio: float = field(default=0.25, metadata={"help": "Target of the gap: gamma = beta * this ratio."})
    rho: float = field(default=0.05, metadata={"help": "Radius of the anchor's perturbation; >= 0."})
    probe: str = field(
        default="loss",
        metadata={"help": "What the anchor makes worse: the 'loss' of the margins, or the mean 'margin' itself."},
    )
    geometry: str = field(
        default="asam",
        metadata={"help": "'asam' scales the perturbation by each weight's square, 'sam' is the plain gradient."},
    )
    direction: str = field(
        default="pessimistic", metadata={"help": "'pessimistic' follows the probe's gradient, 'gaussian' noise."}
    )
    scope: str = field(
        default="backbone",
        metadata={"help": "What the anchor moves: 'backbone', 'all', or a number k: layers >= k, final norm, head."},
    )
    rounding: str = field(
        default="stochastic", metadata={"help": "How the anchor is rounded to 16-bit weights: 'stochastic', 'nearest'."}
    )
    loss_type: str = field(default="sigmoid", metadata={"help": "'sigmoid' or 'hinge'."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of wrong labels in the loss; in [0, 0.5)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the chosen completions' negative log-likelihood; >= 0."}
    )
    max_length: int | None = field(
        default=2048,
        metadata={"help": "Most tokens of prompt and completion together, >= 2; none: no limit. See tokenize_pair."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Of pairs longer than max_length: most tokens of the prompt, and with it max_length minus this of a "
            "completion, as the authors cut; in [1, max_length). None: completions stay whole if they leave a prompt token."
        },
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad sequences to a multiple of this."})
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Pack the sequences of a batch one after another, without padding; for attention that keeps packed "
            "sequences apart by position_ids (flash_attention_2, sdpa)."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise a Dataset."})
    max_logits_bytes: int = field(
        default=2**30, metadata={"help": "At most this much of logits is held at a time, in bytes."}
    )
    share_backward: bool = field(
        default=False,
        metadata={
            "help": "Take the gradients of activations from the probe's backward, so that the final one is half as long; "
            "the same to rounding. See gapo_step."
        },
    )
    record_pairs: bool = field(
        default=False, metadata={"help": "Keep step, index, gap and weight of every pair trained on."}
    )

    # Defaults of transformers that this method changes.
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate; the default is TRL's for preferences, DPOConfig's."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the pairs' own columns."}
    )
    logging_nan_inf_filter: bool = field(
        # The filter writes an average over a NaN loss, and reads every micro-batch's loss back from the GPU to do it.
        default=False,
        metadata={"help": "Replace NaN and inf losses in the log by the average so far."},
    )

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = getattr(self, item.name, None)
            if isinstance(value, np.bool_):
                setattr(self, item.name, bool(value))
            elif isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
                # numpy's, which the checkpoint's JSON does not take
                setattr(self, item.name, int(value) if isinstance(value, numbers.Integral) else float(value))
        kinds = [kind for kind in ("logging", "save", "eval") if getattr(self, f"{kind}_strategy") == "steps"]
        steps = [f"{kind}_steps" for kind in kinds]
        for name in dict.fromkeys((*_RANGES, *_WHOLE, *steps)):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if name in _WHOLE:
                if not math.isfinite(value) or value != int(value):
                    raise ValueError(f"{name} must be a whole number, got {value!r}")
                setattr(self, name, int(value))
            if name in steps:
                self._require(name, value > 0, "> 0")
        for name, hint in typing.get_type_hints(GAPOConfig).items():
            value, kinds = getattr(self, name, None), {hint, *typing.get_args(hint)}
            is_switch = bool in kinds and str not in kinds
            if is_switch and not (isinstance(value, bool) or value is None and type(None) in kinds):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        for name in (*CHECKPOINTING, "lr_scheduler_kwargs"):
            if not _is_mapping(value := getattr(self, name, None)):
                raise ValueError(f"{name} must be a mapping, got {value!r}")
        super().__post_init__()
        for name in CHECKPOINTING:  # read from JSON by now
            if isinstance(options := getattr(self, name, None), dict):
                setattr(self, name, {"use_reentrant": False} | options)  # torch's own default is True
        if isinstance(self.scope, str) and self.scope.isdigit():
            self.scope = int(self.scope)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}"
                )
        for name, (expected, holds) in _RANGES.items():
            if getattr(self, name) is not None:
                self._require(name, holds(getattr(self, name)), expected)
        if self.max_prompt_length is not None:
            within = self.max_length is not None and 1 <= self.max_prompt_length < self.max_length
            self._require("max_prompt_length", within, f"in [1, max_length), with max_length = {self.max_length}")
        if self.max_steps <= 0:
            self._require("num_train_epochs", self.num_train_epochs > 0, "> 0, with no max_steps")
        if self.loss_type == "hinge" and self.label_smoothing:
            raise ValueError(f"loss_type 'hinge' has no label_smoothing, expected 0, got {self.label_smoothing}")
        if any(part.count("=") != 1 for part in (self.optim_args or "=").split(",")):
            raise ValueError(f"optim_args must be key=value,key=value,..., got {self.optim_args!r}")
        for name in CHECKPOINTING:
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise ValueError(f"{name} must have use_reentrant=False: the step walks one graph twice, got True")
        layer = isinstance(self.scope, int) and not isinstance(self.scope, bool) and self.scope >= 0
        if not layer and self.scope not in ("backbone", "all"):
            near = nearest(self.scope, ("backbone", "all"))
            raise ValueError(f"scope must be 'backbone', 'all' or the number of a layer, got {self.scope!r}{near}")
        for name, is_set in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("save_strategy = 'best'", self.save_strategy == "best"),
        ):
            if is_set and self.eval_strategy == "no":
                raise ValueError(f"{name} expects an eval_strategy that finds the best, got 'no'")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the collator reads the pairs' own columns, got True")
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths token labels and has no meaning here, expected 0, got "
                f"{self.label_smoothing_factor}; the preference loss has label_smoothing"
            )
        if self.fp16:
            raise ValueError(
                "fp16 is not supported (the probe's gradient has no loss scaling): use bf16, got fp16=True"
            )
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} would leave the model's weights and buffers in 16 bits for the training after it: use bf16, "
                    f"or a model loaded in bfloat16, got {name}=True"
                )

    def _require(self, name, holds, expected):
        value = getattr(self, name)
        if not (holds and (math.isfinite(value) or name in _MAY_BE_INFINITE)):
            raise ValueError(f"{name} must be finite and {expected}, got {value!r}")

    @classmethod
    def preset(cls, name, **changes):
        """The settings of a shipped recipe, "llama-3-8b-instruct" say, with changes by name; output_dir is the recipe's,
        and evaluation is off.

        Raises ValueError for another name, naming the recipes.
        """
        from . import settings

        fields = {item.name for item in dataclasses.fields(cls)} - {"eval_strategy", "eval_steps"}
        return cls(**{key: value for key, value in settings.read(name).items() if key in fields} | changes)

    @property
    def gamma(self):
        """float: the margin that the logistic asks of beta * gap."""
        return self.beta * self.gamma_beta_ratio
