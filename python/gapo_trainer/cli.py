"""`gapo-train RECIPE --key=value ...`: trains a language model on preference pairs with GAPO.

RECIPE is a YAML file of settings, or the name of a shipped recipe. Runs as it is, and under `accelerate launch`:

    gapo-train smollm2-135m-offline --max_steps=2
    accelerate launch -m gapo_trainer.cli my-recipe.yaml --rho=0.025
"""

import argparse
import json
import re
import sys
from pathlib import Path

from .signals import noted_interrupt

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def main(argv=None):
    """Trains; returns the exit code: 0, 2 for settings that cannot be used, 130 after Ctrl-C."""
    arguments, changes = _parse_arguments(argv)
    with noted_interrupt() as note:
        try:
            from . import versions

            versions.check()
            from . import settings
        except ImportError as error:
            if note.seen:  # an interrupted import of transformers comes out as this
                return EXIT_INTERRUPTED
            return _refuse(error if "pip install" in str(error) else f"{error}. Run: pip install 'gapo-kernels[train]'")
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    try:
        if arguments.recipe is None and not arguments.print_config:
            raise settings.SettingsError(f"expected a YAML file or a recipe, one of {', '.join(settings.recipes())}")
        values = settings.change({} if arguments.recipe is None else settings.read(arguments.recipe), changes)
        if arguments.print_config:
            print(settings.render(values), end="")
            return 0
        configs = settings.parse(values)
    except settings.SettingsError as error:
        return _refuse(error)
    try:
        return run(*configs)
    except settings.SettingsError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("interrupted; checkpoints written so far are complete", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="gapo-train",
        description="Train a language model on preference pairs with GAPO.",
        epilog="Every setting of the recipe can be changed by --key=value; --print-config lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("--print-config", action="store_true", help="print every setting as YAML, and train nothing")
    return parser.parse_known_args(argv)


def _refuse(message):
    print(f"gapo-train: error: {message}", file=sys.stderr)
    return EXIT_USAGE


def run(data_args, model_args, config):
    """Trains, saves the model to config.output_dir, evaluates if there are pairs for it. Returns the exit code.

    config.resume_from_checkpoint may be a folder, or "last": the newest checkpoint in output_dir, if there is one.
    """
    from .interrupt import SafeStop
    from .settings import SettingsError

    checkpoint, stop = _checkpoint(config), SafeStop()
    try:
        trainer = make_trainer(data_args, model_args, config, callbacks=[stop])
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            trainer.save_state()
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if stop.has_begun:
            raise
        raise SettingsError(str(error)) from error  # also of what train() makes first: loader, optimizer, scheduler
    if stop.interrupted:
        return EXIT_INTERRUPTED
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    return 0


def make_trainer(data_args, model_args, config, **options):
    """The GAPOTrainer of parsed settings. `options`: more of its arguments.

    Raises SettingsError for a model or dataset that cannot be had.
    """
    from trl import get_peft_config

    from .adapters import check_targets
    from .sources import load_datasets, load_model
    from .trainer import GAPOTrainer

    train, test = load_datasets(data_args, config.seed)
    for name in ("eval_strategy", "eval_on_start"):
        if test is None and (value := getattr(config, name)) not in ("no", False):
            from .settings import SettingsError

            raise SettingsError(f"{name} = {value!s} needs a dataset_test_split, got none")
    model, tokenizer = load_model(model_args)
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        model_args.lora_target_modules = [targets]  # TRL unwraps lists of one, whose text PEFT takes for a pattern
    peft_config = get_peft_config(model_args)
    check_targets(model, peft_config, any)
    return GAPOTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=peft_config,
        **options,
    )


def _checkpoint(config):
    """The folder to resume from, or None. Raises SettingsError for one that is not there."""
    from .config import nearest
    from .settings import SettingsError

    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "last":
        if not Path(wanted).is_dir():
            near = nearest(wanted, ["last"])
            raise SettingsError(f"resume_from_checkpoint must be a checkpoint's folder or 'last', got {wanted!r}{near}")
        return wanted
    numbered = [folder for folder in Path(config.output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    whole = [folder for folder in numbered if _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name[11:]))) if whole else None


def _is_whole(checkpoint):
    # Its state is a checkpoint's last file: the run may have been killed while it wrote that or the others.
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
