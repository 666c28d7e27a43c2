"""Adapters on a model: PEFT's, with settings that are checked against the model first."""

import re
import warnings

from accelerate.utils import is_peft_model
from transformers import set_seed

from .config import nearest

ALL_LINEAR = "all-linear"  # PEFT's word for target_modules that are all linear layers but the head


def with_adapters(model, peft_config, seed):
    """The model itself without a peft_config, a PeftModel of it with one; the adapters' first weights are of the seed.

    Raises ValueError for a model that has adapters already, and if its targets are none of the model's.
    """
    if peft_config is None:
        return model
    import peft

    if is_peft_model(model):
        raise ValueError(
            "expected a model without adapters beside a peft_config, got a PeftModel: leave one of them out"
        )
    check_targets(model, peft_config, all)  # as PEFT: one list may serve several models
    set_seed(seed)  # Trainer does so too late for the adapters' first weights
    return peft.get_peft_model(model, peft_config)


def warn_of_zeros(model, geometry):
    """Where adapters begin as zeros, as LoRA's B does: "asam" moves a weight by itself times its gradient, which is then
    zero in A and B alike, and stays small for long."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if geometry == "asam" and is_peft_model(model) and any(not param.any() for param in trained if not param.is_meta):
        warnings.warn(
            "geometry='asam' moves weights in proportion to their size, and some of these adapters are zeros: the anchor "
            "hardly differs from the model and the loss from SimPO's. Pass geometry='sam', or init_lora_weights other than "
            "True (PiSSA, say)",
            stacklevel=2,
        )


def check_targets(model, peft_config, quantifier):
    """Raises ValueError if any, or all (the quantifier), of a list of target_modules, target_parameters or modules_to_save
    are none of the model's, or if a text of target_modules, which is a pattern, matches none."""
    modules = [name for name, _ in model.named_modules()]
    targets, others = getattr(peft_config, "target_modules", None), getattr(peft_config, "target_parameters", None)
    if isinstance(targets, str):
        # Beside target_parameters PEFT lets a pattern match nothing.
        passes = others or targets.lower() == ALL_LINEAR or _matches_any(targets, modules)
        targets, missing = [targets], [] if passes else [targets]
    else:
        targets, missing = _missing(targets, modules, ".")
    _refuse_missing("target_modules", "modules", targets, missing, modules, quantifier)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    _refuse_missing("target_parameters", "parameters", *_missing(others, parameters, "."), parameters, quantifier)
    saved = _missing(getattr(peft_config, "modules_to_save", None), modules, "")
    _refuse_missing("modules_to_save", "modules", *saved, modules, quantifier)


def _missing(targets, names, separator):
    """(targets as a list, those of them that no name ends with); as PEFT, of modules_to_save without a separator."""
    targets = [targets] if isinstance(targets, str) else sorted(targets or ())
    ends = [(target, separator + target) for target in targets]
    return targets, [target for target, end in ends if not any(f".{name}".endswith(end) for name in names)]


def _refuse_missing(field, kind, targets, missing, names, quantifier):
    if missing and quantifier(target in missing for target in targets):
        depth = missing[0].count(".") + 1 if kind == "parameters" else 1
        known = {".".join(name.split(".")[-depth:]) for name in names}
        near = nearest(missing[0], known | ({ALL_LINEAR} - {*missing} if field == "target_modules" else set()))
        raise ValueError(f"expected {field} that are {kind} of the model, got {missing[0]!r}{near}")


def _matches_any(pattern, names):
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False
