"""Settings of a run: a YAML file, `--key=value` changes to it, and the dataclasses that they become.

One flat mapping holds the keys of `DataConfig`, of TRL's `ModelConfig` and of `GAPOConfig`. A key with dots reaches into
a value that is itself a mapping: `--lr_scheduler_kwargs.min_lr=1e-7`.
"""

import copy
import dataclasses
import inspect
import json
import math
import re
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, parse_flag_from_env
from accelerate.utils.constants import FSDP2_STATE_DICT_TYPE, FSDP_AUTO_WRAP_POLICY
from peft import TaskType
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, PreTrainedModel, Trainer
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from .config import CHECKPOINTING, GAPOConfig, nearest

SHIPPED_MODEL = "smollm2-135m-instruct-offline"
SHIPPED_DATASET = "gapo-preferences"
TORCHS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")  # optimizers
BOOLEANS = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
# What is read as a boolean in these settings of FSDP, and in accelerator_config; in others what transformers converts.
FSDP_SWITCHES = ("reshard_after_forward", "cpu_ram_efficient_loading", "activation_checkpointing")
_NESTED_BOOLEANS = {
    **dict.fromkeys((f"fsdp_config.{prefix}{key}" for prefix in ("", "fsdp_") for key in FSDP_SWITCHES), (*BOOLEANS, "on", "off")),
    "accelerator_config": ("true", "false", "0", "1"),
}
_NESTED_CHOICES = {
    "fsdp_config.auto_wrap_policy": FSDP_AUTO_WRAP_POLICY,
    "fsdp_config.state_dict_type": (*FSDP2_STATE_DICT_TYPE, *map(str.lower, FSDP2_STATE_DICT_TYPE)),
    "fsdp_config.version": ("1", "2"),
    **{f"{name}.determinism_check": ("default", "none") for name in CHECKPOINTING},
}
FLAGS = ("--print-config", "--help")
# What settings were called in older versions and other trainers, where the letters alone lead elsewhere.
_FORMER = {
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "lr": "learning_rate",
    "gamma": "gamma_beta_ratio",
}


class SettingsError(ValueError):
    """A setting that cannot be used; the message says which, what was expected and what was got."""


@dataclass
class DataConfig:
    """Where the preference pairs come from: rows with chosen and rejected, and prompt unless those contain it, as text
    or as lists of messages. A column is_flipped marks pairs known to be wrong, for the log."""

    dataset_name: str = field(
        default="",
        metadata={
            "help": "A .json, .jsonl, .parquet or .csv file, a folder or hub name for datasets.load_dataset, or "
            f"'{SHIPPED_DATASET}': the pairs that come with this package."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration, for load_dataset."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "The split to train on; leave it at train for a file."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "The split, or for a file another file, to evaluate on; none: no evaluation."}
    )
    flip_labels: float = field(
        default=0.0,
        metadata={"help": "Share of the training pairs whose labels are swapped, and marked, as an experiment."},
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise ValueError("dataset_name must name the preference pairs to train on, got nothing")
        if not (math.isfinite(self.flip_labels) and 0 <= self.flip_labels <= 1):
            raise ValueError(f"flip_labels must be in [0, 1], got {self.flip_labels!r}")


def dataclass_types():
    """The dataclasses of a run, in the order in which `parse` returns them."""
    from trl import ModelConfig

    return DataConfig, ModelConfig, GAPOConfig


def recipes():
    """dict of the shipped recipes: name to pathlib.Path."""
    folder = Path(str(resources.files("gapo_trainer").joinpath("recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


class _Loader(yaml.SafeLoader):
    """Where YAML's own keeps the last of several values of a key."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)  # of one that is no scalar, its parts
            if name in seen:
                raise SettingsError(f"expected each key once, got {name!r} again in line {key.start_mark.line + 1}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read(source):
    """The mapping in a YAML file, given by path or as the name of a shipped recipe.

    Raises SettingsError when there is no such file, or it holds no mapping.
    """
    path = recipes().get(source, Path(source))
    if not path.is_file():
        raise SettingsError(
            f"expected a YAML file or the name of a recipe, got {source!r}{nearest(source, recipes())}; "
            f"the recipes are {', '.join(recipes())}"
        )
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is no YAML file: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f"expected a mapping of settings in {path}, got {type(settings).__name__}")
    return settings


def change(settings, changes):
    """`settings` with `--key=value` or `--key value` strings applied. Values are YAML, but for settings that are text they
    are kept as they stand (null is none where that may be); keys may be dotted.

    Raises SettingsError for a string that is neither.
    """
    settings = copy.deepcopy(settings)
    queue, kinds = list(changes), _kinds()
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise SettingsError(f"expected --key=value, got {argument!r}")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise SettingsError(f"expected --{key}=value, got no value{nearest(argument, FLAGS)}")
            value = queue.pop(0)
        _put(settings, key, _read_value(value, kinds.get(key.replace("-", "_"))))
    return settings


def _kinds():
    """dict of the settings and their types; not those of the parser, which rewrites them."""
    kinds = {name: hint for kind in dataclass_types() for name, hint in typing.get_type_hints(kind).items()}
    return kinds | {"fsdp": bool | str}  # a switch, whatever transformers says


def _read_value(text, kind):
    """kind: the setting's type; None of a key in a mapping."""
    may_be_none = set(typing.get_args(kind)) == {str, type(None)}
    if (kind is str or may_be_none) and not (may_be_none and text in ("null", "~", "")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # that happens to be no YAML, a template with braces say


def _put(settings, key, value):
    *parents, last = key.replace("-", "_").split(".")
    place = settings
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise SettingsError(f"--{key}: {'.'.join(parents[: depth + 1])} is {place!r}, which has no keys of its own")
    place[last] = value


def parse(settings):
    """(DataConfig, ModelConfig, GAPOConfig) of a mapping.

    Raises SettingsError for unknown keys and values that do not fit, naming the nearest valid one.
    """
    parser = _Parser(dataclass_types(), allow_abbrev=False, add_help=False)
    actions = {action.dest: action for action in parser._actions}
    unknown = [key for key in settings if key not in actions]
    if unknown:
        names = (f"unknown setting {key!r}{nearest(_FORMER.get(key, key), actions)}" for key in unknown)
        raise SettingsError("\n".join(names))
    for name, known in _nested_keys(settings).items():
        _check_nested(name, known, _nested_at(settings, name))
    arguments = []
    defaults = {name: value for kind in dataclass_types() for name, value in _defaults(kind).items()}
    kinds = _kinds()
    for key, value in settings.items():
        choices = _choices(actions[key])
        if value is False and "no" in choices:
            value = "no"  # which YAML reads as False
        if key in defaults and value == defaults[key] and isinstance(value, bool) == isinstance(defaults[key], bool):
            continue
        _check_choice(key, choices, value)
        _check_boolean(key, kinds[key], value)
        if isinstance(value, str) and str in typing.get_args(kinds[key]):
            actions[key].type = str  # of "bool or str" the parser makes bool
        is_switch = actions[key].const is True  # fsdp is one, and text as well: "True" would not do
        # Of "text or a list" the parser makes text alone, and of fsdp, which transformers reads as a list as well.
        takes_list = list in map(typing.get_origin, typing.get_args(kinds[key])) or key == "fsdp"
        is_list = isinstance(value, list) and takes_list and actions[key].nargs in (None, "?")
        if value is None or is_list or (is_switch and value is False):
            actions[key].default, actions[key].required = value, False
        elif is_switch and value is True:
            arguments.append(f"--{key}")
        elif isinstance(value, dict):
            if typing.get_origin(actions[key].type) is dict:
                actions[key].type = json.loads  # the parser would call dict on the text
            arguments.append(f"--{key}={json.dumps(_with_numbers(value))}")
        elif isinstance(value, (list, tuple)) and actions[key].nargs in ("+", "*"):
            arguments += [f"--{key}", *map(_text, value)]
        else:
            arguments.append(f"--{key}={_text(value)}")
    try:
        configs = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        _check_adapters(configs[1], defaults)
        _check_sharding(settings)
        _check_optimizer(configs[2])
        return configs
    except SettingsError:
        raise
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def _check_nested(name, known, nested):
    """known: the keys of the setting, a mapping, and their types, None for any. Raises SettingsError."""
    if not isinstance(nested, dict):
        return
    unknown = [key for key in nested if key not in known]
    if unknown:
        raise SettingsError("\n".join(f"unknown setting '{name}.{key}'{nearest(key, known)}" for key in unknown))
    for key, value in nested.items():
        path = f"{name}.{key}"
        _check_choice(path, _NESTED_CHOICES.get(path.replace(".fsdp_", "."), ()), value)
        texts = _NESTED_BOOLEANS.get(path, _NESTED_BOOLEANS.get(name, ("true", "false")))
        _check_boolean(path, known[key], value, BOOLEANS if isinstance(value, int) else texts)
        kinds = set(typing.get_args(known[key]) or [known[key]]) - {type(None)}
        as_text = isinstance(value, str) and value.replace(".", "", 1).isdigit()  # converted, too
        is_number = as_text or isinstance(_with_numbers(value), (int, float)) and not isinstance(value, bool)
        if kinds and kinds <= {int, float} and not (value is None or is_number):
            raise SettingsError(f"{path} must be a number, got {value!r}")


def _check_adapters(model_args, defaults):
    """Raises SettingsError for settings of LoRA without use_peft, which would be passed over."""
    for name, value in vars(model_args).items() if not model_args.use_peft else ():
        if (name.startswith("lora_") or name in ("use_rslora", "use_dora")) and value != defaults.get(name):
            raise SettingsError(f"{name} expects use_peft: true, got {value!r} without it")


def _check_sharding(settings):
    """Raises SettingsError for settings of FSDP without a word on fsdp, which would be passed over."""
    value, fsdp = settings.get("fsdp_config"), settings.get("fsdp")
    if value and fsdp is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise SettingsError(f"fsdp_config expects fsdp: true, got {value!r} without it")


def _check_optimizer(config):
    """Raises SettingsError for keys of optim_args that an optimizer of torch does not get from transformers."""
    if not config.optim_args or OptimizerNames(config.optim).value not in TORCHS:
        return
    plain = copy.copy(config)
    plain.optim_args = None
    (kind, given), (_, always) = map(Trainer.get_optimizer_cls_and_kwargs, (config, plain))
    for key in (part.split("=")[0].strip() for part in config.optim_args.split(",")):
        if key not in given.keys() - always.keys():
            near = nearest(key, _parameters(kind, "POSITIONAL_OR_KEYWORD") - {key, *always})
            raise SettingsError(f"unknown setting 'optim_args.{key}' of {OptimizerNames(config.optim).value}{near}")


def _check_boolean(name, kind, value, texts=BOOLEANS):
    """kind: the setting's type; texts: what transformers reads as a boolean. Raises SettingsError for anything else."""
    kinds = {kind, *typing.get_args(kind)}
    if bool in kinds and str not in kinds and value is not None and str(value).lower() not in texts:
        raise SettingsError(f"{name} must be True or False, got {value!r}{nearest(str(value).lower(), ('true', 'false'))}")


class _Parser(HfArgumentParser):
    def error(self, message):
        raise SettingsError(message)


def _choices(action):
    """The values that a setting may have; none for any."""
    known = {
        "report_to": ["all", "none", *INTEGRATION_TO_CALLBACK],
        "attn_implementation": ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()],
        "lora_task_type": [TaskType.CAUSAL_LM],
        "debug": DebugOption,
        "fsdp": ["full_shard", "shard_grad_op", "offload", "auto_wrap"],  # of FSDP2
    }
    if action.dest == "torch_compile_mode":
        from torch._inductor import list_mode_options

        return ["default", *(mode for mode in list_mode_options() if mode != "default")]
    if action.dest == "torch_compile_backend":
        import torch._dynamo

        accelerates = {backend.value.lower() for backend in DynamoBackend}
        return [backend for backend in torch._dynamo.list_backends(None) if backend in accelerates]
    return [str(getattr(choice, "value", choice)) for choice in action.choices or known.get(action.dest, ())]


def _check_choice(name, choices, value):
    if name == "fsdp":  # a switch, a list, or a text of several
        value = [] if isinstance(value, bool) else value.split() if isinstance(value, str) else value
    if name == "torch_compile_backend" and isinstance(value, str):
        value = value.lower()
    for one in value if isinstance(value, list) else [value]:
        is_kernel = name == "attn_implementation" and "/" in str(one)  # a hub name
        if choices and value is not None and str(one) not in choices and not is_kernel:
            raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {one!r}{nearest(one, choices)}")


def _nested(value):
    """What a setting that is a mapping holds: of JSON in its place, or a file of it, which transformers would read, what is
    in that."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return value  # which transformers refuses


def _nested_at(settings, path):
    for name in path.split("."):
        settings = _nested(settings.get(name)) if isinstance(settings, dict) else None
    return settings


def _nested_keys(settings):
    """dict of the settings that are mappings with known keys: name to these keys and their types, None for any."""
    keys = {
        "accelerator_config": typing.get_type_hints(AcceleratorConfig),
        "accelerator_config.gradient_accumulation_kwargs": typing.get_type_hints(GradientAccumulationPlugin),
    }
    # transformers takes its own of them and gives the others to torch, which has one in its **kwargs.
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    transformers_own = _parameters(enable, "POSITIONAL_OR_KEYWORD") - {"self", *CHECKPOINTING}
    own = dict.fromkeys(transformers_own) | _typed(checkpoint, "KEYWORD_ONLY") | {"preserve_rng_state": bool}
    keys |= dict.fromkeys(CHECKPOINTING, own)
    if isinstance(settings.get("liger_kernel_config"), dict) and is_liger_kernel_available():
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        # One recipe may serve several models; Liger passes over what is not the model's.
        known = (_parameters(patch, "POSITIONAL_OR_KEYWORD") for patch in MODEL_TYPE_TO_APPLY_LIGER_FN.values())
        keys["liger_kernel_config"] = dict.fromkeys(set().union(*known) - {"model"})
    # Known nowhere but in the code that reads them.
    code = inspect.getsource(GAPOConfig._process_fsdp_args)
    fsdp = re.findall(r'self\.fsdp_config(?:\.get\(|\.setdefault\(|\[)"(\w+)"', code)
    typed = dict.fromkeys((*FSDP_SWITCHES, "cpu_offload"), bool) | {"min_num_params": int}
    keys["fsdp_config"] = {f"{prefix}{key}": typed.get(key) for prefix in ("", "fsdp_") for key in fsdp}
    schedule = TYPE_TO_SCHEDULER_FUNCTION.get(settings.get("lr_scheduler_type", GAPOConfig.lr_scheduler_type))
    if schedule is not None and not _parameters(schedule, "VAR_KEYWORD"):
        given = {"optimizer", "num_warmup_steps", "num_training_steps"}  # by transformers
        typed = _typed(schedule, "POSITIONAL_OR_KEYWORD")
        keys["lr_scheduler_kwargs"] = {key: hint for key, hint in typed.items() if key not in given}
    return keys


def _parameters(function, kind):
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind.name == kind}


def _typed(function, kind):
    """dict of the parameters and their types; of those without, the type of a number that is the default, else None."""
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    defaults = {name: type(parameters[name].default) for name in _parameters(function, kind)}
    return {name: hints.get(name, default if default in (int, float) else None) for name, default in defaults.items()}


def _text(value):
    return json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


def _with_numbers(value):
    """A nested value with 1e-7 and its like as numbers: YAML 1.1 takes them for text, and where a flat setting's text is
    converted to its field's type, nobody knows the type of one in a mapping."""
    if isinstance(value, dict):
        return {key: _with_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


def render(settings):
    """Every key with its value or default as YAML, which `read` takes back. Raises what `parse` raises, but for a missing
    dataset_name."""
    here = {"bf16": False} if settings.get("bf16") is True else {}  # a recipe is printed on a machine without it, too
    parse({"dataset_name": SHIPPED_DATASET} | settings | here)
    parts = []
    for kind in dataclass_types():
        values = {name: settings.get(name, default) for name, default in _defaults(kind).items()}
        parts.append(f"# {kind.__name__}\n" + yaml.safe_dump(values))
    return "\n".join(parts)


def _defaults(kind):
    """dict of a dataclass's settings and their defaults, as YAML has them."""
    missing, found = dataclasses.MISSING, {}
    for item in dataclasses.fields(kind):
        if item.init:
            made = item.default_factory() if item.default_factory is not missing else item.default
            found[item.name] = _plain(made)
    return found


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if hasattr(value, "value"):  # an Enum
        return value.value
    return value if isinstance(value, (bool, int, float, str, list, dict)) else None
