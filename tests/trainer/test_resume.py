"""A run that was cut off goes on from its last checkpoint to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import made_up_pairs, tiny_model
from safetensors.torch import load_file

from gapo_trainer import cli, settings
from gapo_trainer.trainer import GAPOTrainer

# Sends itself SIGTERM between two layers of the forward under the anchor, in the second micro-batch of the fourth of
# six steps; "moved" says that the weights were the anchor's.
KILLED = """
import os, signal, sys, torch
from gapo_trainer import cli
from gapo_trainer.trainer import GAPOTrainer
compute_loss, calls = GAPOTrainer.compute_loss, []
def watched(self, model, inputs, **options):
    if self.state.global_step == 3:
        calls.append(None)
    before = [p.detach().clone() for p in self.anchor.params]
    def kill(*_):
        if len(calls) == 2 and not torch.is_grad_enabled():
            print("moved", any(not torch.equal(p, q) for p, q in zip(self.anchor.params, before)), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
    handle = self.model.model.layers[0].register_forward_hook(kill)
    try:
        return compute_loss(self, model, inputs, **options)
    finally:
        handle.remove()
GAPOTrainer.compute_loss = watched
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """A YAML file for a tiny model on disk."""
    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made_up_pairs(12)))
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "rho": 0.5,
        "resume_from_checkpoint": "last",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def final(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = {entry["step"]: (entry["loss"], entry["gapo/gap"]) for entry in state["log_history"] if "loss" in entry}
    return load_file(folder / "model.safetensors"), losses


@pytest.mark.parametrize(
    "changes",
    [["--direction=gaussian"], ["--dtype=bfloat16", "--direction=pessimistic"], ["--share_backward=true"]],
    ids=["noise", "stochastic rounding", "shared backward"],
)
def test_killed_under_the_anchor_it_resumes_to_the_same_bits(recipe, tmp_path, changes):
    """The first two draw random numbers by the anchor's counter."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([str(recipe), f"--output_dir={whole}", *changes]) == 0
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "python")])
    environment = os.environ | {"PYTHONPATH": paths + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", KILLED, str(recipe), f"--output_dir={cut}", *changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout.endswith("moved True\n"), done.stdout
    assert {file.name for file in cut.glob("checkpoint-*")} == {"checkpoint-2"}

    assert cli.main([str(recipe), f"--output_dir={cut}", *changes]) == 0
    (weights, losses), (expected, expected_losses) = final(cut), final(whole)
    assert losses == expected_losses and len(losses) == 6
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "changes",
    [["--direction=gaussian"], ["--dtype=bfloat16", "--direction=pessimistic"]],
    ids=["noise", "stochastic rounding"],
)
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM, saved by transformers"])
def test_saved_with_an_update_half_done_it_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch, how, changes):
    """The first of two micro-batches is then done twice, with the random numbers of the first time."""
    interrupted = how == "Ctrl-C"
    ways = (["--enable_jit_checkpoint=true", "--save_steps=100"], ["--save_strategy=epoch"])
    changes = [*changes, *ways[interrupted], "--max_steps=-1", "--num_train_epochs=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main([str(recipe), f"--output_dir={whole}", *changes]) == 0
    logps, sent = GAPOTrainer._logps, []

    def watched(self, model, inputs):
        if self.state.global_step == 4 and not torch.is_grad_enabled() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT if interrupted else signal.SIGTERM))
            time.sleep(0 if interrupted else 3.5)  # transformers waits for 3 s before it asks for a checkpoint
        return logps(self, model, inputs)

    previous = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(GAPOTrainer, "_logps", watched)
        assert cli.main([str(recipe), f"--output_dir={cut}", *changes]) == (130 if interrupted else 0)
    assert sent and max(folder.name for folder in cut.glob("checkpoint-*")) == "checkpoint-4"
    assert cli.main([str(recipe), f"--output_dir={cut}", *changes]) == 0
    signal.signal(signal.SIGTERM, previous)
    (weights, _), (expected, _) = final(cut), final(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_without_the_anchors_counter_is_refused(recipe, tmp_path, capsys):
    assert cli.main([str(recipe), f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]) == 0
    (tmp_path / "run" / "checkpoint-2" / "anchor.json").unlink()
    assert cli.main([str(recipe), f"--output_dir={tmp_path / 'run'}", "--max_steps=4"]) == 2
    assert "gapo-train: error: expected anchor.json in" in capsys.readouterr().err


def test_a_checkpoint_that_was_being_written_is_passed_over(recipe, tmp_path):
    cut = tmp_path / "cut"
    assert cli.main([str(recipe), f"--output_dir={cut}", "--max_steps=4", "--lr_scheduler_type=constant"]) == 0
    state = cut / "checkpoint-4" / "trainer_state.json"
    config = settings.parse(settings.change(settings.read(str(recipe)), [f"--output_dir={cut}"]))[-1]
    assert cli._checkpoint(config) == str(cut / "checkpoint-4")
    state.write_text(state.read_text()[:100])
    assert cli._checkpoint(config) == str(cut / "checkpoint-2")
    state.unlink()
    assert cli._checkpoint(config) == str(cut / "checkpoint-2")
