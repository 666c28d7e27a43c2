"""The demonstration: `python -m gapo_trainer.demo` trains SmolLM2-135M-Instruct on the shipped preference pairs, with the
recipe smollm2-135m-offline, and reports.

A fifth of the training pairs has its labels flipped, with a seed and marked; the held-out pairs are clean. The output
folder receives the trained model, metrics.json and two plots, also when the run is interrupted.
"""

import argparse
import math
import resource
import sys
import time
from importlib import metadata, resources
from pathlib import Path

import yaml

from .signals import noted_interrupt, uninterrupted

# torch and transformers take seconds to import. They are imported below, where Ctrl-C is already answered properly.

RECIPE = "smollm2-135m-offline"  # whose settings hold unless an option changes them
EXIT_INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
MISSING = (ImportError, FileNotFoundError)  # of libraries or the model: answered with a line that says what to install


def parse_arguments(argv=None):
    """argparse.Namespace with the demonstration's settings; exits with a message on settings out of range."""
    recipe = _recipe()
    epochs, pairs = recipe["num_train_epochs"], recipe["per_device_train_batch_size"]
    ratio, flip = recipe["gamma_beta_ratio"], recipe["flip_labels"]
    parser = argparse.ArgumentParser(
        prog="python -m gapo_trainer.demo",
        description="Train SmolLM2-135M-Instruct with GAPO on the shipped preference pairs, some with flipped labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--epochs", type=_positive(float), default=epochs, help="passes over the training pairs")
    parser.add_argument("--max-steps", type=int, default=-1, help="number of updates, in place of --epochs")
    parser.add_argument("--batch-size", type=_positive(int), default=pairs, help="pairs per update")
    parser.add_argument("--lr", type=_positive(float), default=recipe["learning_rate"], help="peak learning rate")
    parser.add_argument("--beta", type=_positive(float), default=recipe["beta"], help="scale of the gap in the loss")
    parser.add_argument("--gamma-beta-ratio", type=_finite, default=ratio, help="target of the gap, over beta")
    parser.add_argument("--rho", type=_radius, default=recipe["rho"], help="radius of the anchor")
    parser.add_argument("--flip", type=_share, default=flip, help="share of the training pairs with flipped labels")
    parser.add_argument("--seed", type=int, default=0, help="of the flips, the order of the pairs and the training")
    parser.add_argument("--evaluations", type=_positive(int), default=4, help="held-out evaluations after the first")
    parser.add_argument(
        "--time-limit", type=_positive(float), default=8.5, help="minutes after which no further step is begun"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser.parse_args(argv)


def _recipe():
    """The recipe's settings (dict); read without `settings`, which would import transformers."""
    return yaml.safe_load(resources.files(__package__).joinpath("recipes", f"{RECIPE}.yaml").read_text(encoding="utf-8"))


def _positive(kind):
    def convert(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its messages
    return convert


def _finite(text):
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def _radius(text):
    if (value := _finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value


def _share(text):
    if not 0 <= (value := _finite(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text}")
    return value


class Demo:
    """One run: `execute` does the work and `save` writes what has been reached, at whatever stage that is."""

    def __init__(self, args, load_model=None):
        self.args = args
        self.started = time.monotonic()
        self.stage = "importing the libraries"
        self.interrupted = False
        self._load_model = load_model
        self._trainer = self._stop = self._clock = self._progress = None
        self._data = {}

    def execute(self):
        """Prepare model and data, train, evaluate. Raises KeyboardInterrupt, or sets self.interrupted."""
        from . import versions

        versions.check()
        from .interrupt import SafeStop
        from .preferences import flip_labels, load_preferences
        from .smollm2 import load_smollm2

        args = self.args
        self.stage = "preparing the model"
        model, tokenizer = (self._load_model or load_smollm2)()
        self.stage = "preparing the data"
        train, heldout = load_preferences("train"), load_preferences("test")
        train = flip_labels(train, args.flip, args.seed)
        self._data = {
            "train_pairs": len(train),
            "flipped_pairs": sum(pair["is_flipped"] for pair in train),
            "heldout_pairs": len(heldout),
        }
        config = self._configure(len(train))
        self._stop = SafeStop(deadline=self.started + 60 * args.time_limit)
        self._trainer = self._make_trainer(model, tokenizer, config, train, heldout)
        print(
            f"{self._data['train_pairs']} training pairs, {self._data['flipped_pairs']} of them flipped; "
            f"{self._data['heldout_pairs']} clean pairs held out; device {config.device}",
            flush=True,
        )
        self.stage = "training"
        try:
            with self._stop:
                self._trainer.train()
        finally:
            self._progress.close()
        self.interrupted = self.asked_to_stop

    @property
    def asked_to_stop(self):
        """bool: whether Ctrl-C was pressed during training."""
        return self._stop is not None and self._stop.interrupted

    def _configure(self, pairs):
        import torch

        from . import settings

        args = self.args
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.epochs * math.ceil(pairs / args.batch_size))
        changes = {
            "output_dir": str(args.output_dir),
            "flip_labels": args.flip,
            "num_train_epochs": args.epochs,
            "max_steps": args.max_steps,
            "per_device_train_batch_size": args.batch_size,
            "per_device_eval_batch_size": args.batch_size,
            "learning_rate": args.lr,
            "beta": args.beta,
            "gamma_beta_ratio": args.gamma_beta_ratio,
            "rho": args.rho,
            "record_pairs": True,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": max(1, math.ceil(steps / args.evaluations)),
            "include_num_input_tokens_seen": "non_padding",
            "save_strategy": "no",
            "disable_tqdm": False,
            "dataloader_pin_memory": torch.cuda.is_available() and not args.cpu,
            "use_cpu": args.cpu,
            "seed": args.seed,
        }
        return settings.parse(settings.read(RECIPE) | changes)[-1]

    def _make_trainer(self, model, tokenizer, config, train, heldout):
        from transformers.trainer_callback import ProgressCallback

        from .progress import StepClock, StepProgress
        from .trainer import GAPOTrainer

        self._clock, self._progress = StepClock(), StepProgress()
        trainer = GAPOTrainer(
            model,
            config,
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=tokenizer,
            callbacks=[self._clock, self._stop],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self._progress)
        return trainer

    def save(self):
        """Write the model, metrics.json and the plots; print the table. Returns the metrics (dict)."""
        from .report import render_table, write_plots
        from .storage import save_model, write_json

        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        metrics = self._metrics()
        if self._trainer is not None:
            save_model(self._trainer.model, self._trainer.processing_class, folder / "model")
            if not self.interrupted:
                self.stage = "checking the saved model"
                metrics["reloaded_model_difference"] = self._compare_with_reloaded(folder / "model")
        plots = write_plots(metrics, folder)
        # What this run wrote: the folder may hold an older run's files as well.
        metrics["files"] = [path.name for path in plots] + (["model"] if self._trainer is not None else [])
        metrics["seconds"] = {"total": time.monotonic() - self.started, **metrics.get("seconds", {})}
        write_json(metrics, folder / "metrics.json")
        print(render_table(metrics))
        if self._trainer is not None:
            print(f"model: {folder / 'model'}")
        if "reloaded_model_difference" in metrics:
            difference = metrics["reloaded_model_difference"]
            print(f"loaded again by transformers: largest difference of a logit {difference:g}")
        for path in [folder / "metrics.json", *plots]:
            print(f"wrote: {path}")
        return metrics

    def _metrics(self):
        """The run's facts, as far as it got."""
        from .report import findings, summarise_pairs

        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()}
        stage = self.stage if self.interrupted else "finished"
        metrics = {"interrupted": self.interrupted, "stage": stage, "settings": settings, "data": self._data}
        metrics["versions"] = _versions()
        if self._trainer is not None:
            state = self._trainer.state
            history = state.log_history
            records = self._trainer.pair_records
            seconds = {"training": self._clock.seconds}
            seconds["evaluation"] = sum(entry.get("eval_runtime", 0.0) for entry in history)
            metrics |= {
                "out_of_time": self._stop.out_of_time,
                "steps": state.global_step,
                "planned_steps": state.max_steps,
                "training": [_training_entry(entry) for entry in history if "loss" in entry],
                "heldout": [_heldout_entry(entry) for entry in history if "eval_loss" in entry],
                "pairs": summarise_pairs(records),
                "pair_records": records,
                "tokens": state.num_input_tokens_seen,
                "tokens_per_second": state.num_input_tokens_seen / self._clock.seconds if self._clock.seconds else None,
                "device": _device_name(self._trainer.args.device),
                "seconds": seconds,
            }
            metrics["peak_memory_bytes"], metrics["peak_memory_of"] = _peak_memory(self._trainer.args.device)
        metrics["findings"] = findings(metrics)
        return metrics

    def _compare_with_reloaded(self, path):
        """Largest difference of a logit between the trained model and the saved one, on one held-out pair."""
        import torch
        from transformers import AutoModelForCausalLM

        trainer = self._trainer
        batch = trainer.data_collator([trainer.eval_dataset[0]])
        inputs = {name: batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask")}
        reloaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(trainer.args.device)
        with torch.no_grad():
            logits = [model.eval()(**inputs).logits for model in (trainer.model, reloaded)]
        return (logits[0] - logits[1]).abs().max().item()


def _training_entry(entry):
    names = {
        "step": "step",
        "loss": "loss",
        "margin": "gapo/margin",
        "accuracy": "rewards/accuracies",
        "gap": "gapo/gap",
        "weight": "gapo/weight",
        "gradient_norm": "grad_norm",
        "learning_rate": "learning_rate",
    }
    return {name: entry.get(key) for name, key in names.items()}


def _heldout_entry(entry):
    names = {
        "step": "step",
        "loss": "eval_loss",
        "margin": "eval_gapo/margin",
        "accuracy": "eval_rewards/accuracies",
        "chosen_logps": "eval_logps/chosen",
        "rejected_logps": "eval_logps/rejected",
    }
    return {name: entry.get(key) for name, key in names.items()}


def _versions():
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("gapo-kernels", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"  # run from a source tree
    return versions


def _device_name(device):
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _peak_memory(device):
    """(bytes, what they are the memory of)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "whole process, preparation included"


def main(argv=None, *, load_model=None):
    """Run the demonstration; returns the exit code. load_model: () -> (model, tokenizer), default SmolLM2."""
    demo = Demo(parse_arguments(argv), load_model)
    with noted_interrupt() as note:
        try:
            demo.execute()
            if not demo.interrupted:
                demo.stage = "saving the results"
                demo.save()
        except KeyboardInterrupt:
            demo.interrupted = True
        except Exception as error:
            demo.interrupted = note.seen or demo.asked_to_stop
            if demo.interrupted:
                print(f"The interrupt came out as {type(error).__name__}: {error}", file=sys.stderr)
            elif demo.stage in ("importing the libraries", "preparing the model") and isinstance(error, MISSING):
                print(f"error: {error}", file=sys.stderr)
                return 1
            else:
                raise
    if not demo.interrupted:
        return 0
    with uninterrupted():
        print(f"\nInterrupted while {demo.stage}: saving what was reached to {demo.args.output_dir}", flush=True)
        demo.save()
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
