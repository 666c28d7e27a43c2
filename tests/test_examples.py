"""Every example runs on its tiny model: the loss falls, the gap is there, and none is longer than 60 lines."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gapo_kernels import GeometricAnchor

pytest.importorskip("gapo_trainer.preferences")
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = ["plain_loop", "transformers_trainer", "trl_trainer", "trl_dpo_subclass", "lightning_module", "fsdp2"]


@pytest.fixture
def example(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    if request.param == "lightning_module":
        pytest.importorskip("lightning")
    return importlib.import_module(request.param)


def test_all_examples_are_here():
    assert {file.stem for file in FOLDER.glob("*.py")} == {*EXAMPLES, "common", "decoder"}
    for file in FOLDER.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file


@pytest.mark.parametrize("example", EXAMPLES, indirect=True)
def test_an_example_trains(example):
    _, history, *_ = example.main(["--steps=30"])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    gaps = [entry[name] for entry in history for name in ("gap", "gapo/gap") if name in entry]
    assert len(losses) == len(gaps) == 30
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.02
    assert all(abs(gap) > 1e-6 for gap in gaps)


@pytest.mark.parametrize("example", ["transformers_trainer"], indirect=True)
def test_the_example_on_trainer_accumulates_means(example, monkeypatch):
    """Two micro-batches of half the size; without a radius, since each has an anchor of its own."""
    options, logged = example.TrainingArguments, []
    monkeypatch.setattr(example, "GeometricAnchor", MotionlessAnchor)
    for accumulation in (1, 2):
        sizes = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
        monkeypatch.setattr(example, "TrainingArguments", lambda sizes=sizes, **given: options(**given | sizes))
        _, history = example.main(["--steps=1"])
        logged += [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3) and len(logged) == 2


@pytest.mark.parametrize("example", ["transformers_trainer", "trl_dpo_subclass"], indirect=True)
def test_the_examples_on_trainers_compute_in_bfloat16_and_so_do_their_anchors(example, monkeypatch):
    """Without a radius there is no gap. Both heads are untied."""
    name = "DPOConfig" if hasattr(example, "DPOConfig") else "TrainingArguments"
    options = getattr(example, name)
    monkeypatch.setattr(example, "GeometricAnchor", MotionlessAnchor)
    monkeypatch.setattr(example, name, lambda *args, **given: options(*args, **given | dict(bf16=True, use_cpu=True)))
    dtypes, gaps, step = set(), [], example.gapo_step

    def watched(logps, *args, **given):
        def watching():
            dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return logps()

        out = step(watching, *args, **given)
        gaps.append(out.gap)
        return out

    monkeypatch.setattr(example, "gapo_step", watched)
    example.main(["--steps=2"])
    assert dtypes == {torch.bfloat16} and len(gaps) == 2 and not torch.cat(gaps).any()


class MotionlessAnchor:
    def from_model(self, **options):
        return GeometricAnchor.from_model(self, **options | {"rho": 0.0})


def test_sharded_over_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(FOLDER / "fsdp2.py"), "--steps=3"]
    root = FOLDER.parent
    paths = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if "terminate called without an active exception" not in done.stderr:  # gloo's threads, as the process ends
            break
    assert done.returncode == 0, done.stderr
    found = [done.stdout.split(f"rank {rank}: ")[1].split("]")[0] for rank in (0, 1)]
    assert found[0] == found[1] and found[0].count("loss") == 3
