"""The demonstration from end to end, on a tiny model, finished and interrupted at each stage."""

import json
import os
import re
import signal

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from gapo_trainer import demo, progress, settings, versions


@pytest.fixture
def run(tmp_path, tokenizer):
    """run(*arguments) -> (exit code, metrics.json, output folder)"""

    def run(*arguments, load_model=None):
        torch.manual_seed(0)
        folder = tmp_path / "out"
        settings = ["--cpu", "--output-dir", str(folder), "--batch-size", "8", "--max-steps", "6", "--lr", "1e-3"]
        load_model = load_model or (lambda: (tiny_model(torch.float32), tokenizer))
        code = demo.main([*settings, *arguments], load_model=load_model)
        return code, json.loads((folder / "metrics.json").read_text()), folder

    return run


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def press_ctrl_c_on(event, monkeypatch, step=None, times=1):
    """Send SIGINT from the callback `event`, at that step."""
    inner = getattr(progress.StepClock, event, None) or getattr(TrainerCallback, event)
    presses = []

    def pressed(self, args, state, control, **kwargs):
        if len(presses) < times and (step is None or state.global_step == step):
            while len(presses) < times:
                presses.append(None)
                os.kill(os.getpid(), signal.SIGINT)
        return inner(self, args, state, control, **kwargs)

    monkeypatch.setattr(progress.StepClock, event, pressed)


def test_finished_run(run, capsys):
    code, metrics, folder = run("--evaluations", "2")
    assert code == 0
    assert not metrics["interrupted"] and metrics["stage"] == "finished"
    assert metrics["steps"] == metrics["planned_steps"] == 6
    assert metrics["data"] == {"train_pairs": 120, "flipped_pairs": 24, "heldout_pairs": 24}
    assert [e["step"] for e in metrics["heldout"]] == [0, 3, 6]
    assert [e["step"] for e in metrics["training"]] == [1, 2, 3, 4, 5, 6]
    records = metrics["pair_records"]
    assert len(records) == 48
    last = metrics["pairs"]["last_visit"]
    assert last["clean"]["pairs"] + last["flipped"]["pairs"] == 48
    assert last["flipped"]["pairs"] == sum(r["is_flipped"] for r in records) > 0
    assert metrics["tokens"] > 0 and metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 2**20
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["reloaded_model_difference"] == 0.0
    assert {f.name for f in folder.iterdir()} == {
        "model",
        "metrics.json",
        "loss_and_accuracy.png",
        "weight_against_gap.png",
    }
    assert {f.name for f in folder.iterdir()} == {*metrics["files"], "metrics.json"}
    printed = capsys.readouterr().out
    for sentence in metrics["findings"]:
        assert sentence in printed
    assert "120 training pairs, 24 of them flipped; 24 clean pairs held out" in printed


def test_same_seed_same_run(run):
    one, two, other = (run("--max-steps", "2", "--seed", seed)[1] for seed in ("5", "5", "6"))
    assert one["pair_records"] == two["pair_records"]
    for key in ("index", "is_flipped"):
        assert [r[key] for r in one["pair_records"]] != [r[key] for r in other["pair_records"]], (
            f"{key}: order and flips"
        )


def test_interrupt_lets_the_step_finish_and_saves_it(run, monkeypatch, capsys):
    _, _, folder = run("--max-steps", "6", "--evaluations", "6")
    history = {}
    with monkeypatch.context() as patch:
        # The weights after each step, of an uninterrupted run with the same seed.
        patch.setattr(
            progress.StepClock,
            "on_step_end",
            lambda self, args, state, control, model, **kw: history.update(
                {state.global_step: {n: p.clone() for n, p in model.state_dict().items()}}
            ),
        )
        run()
    press_ctrl_c_on("on_step_begin", monkeypatch, step=2)
    code, metrics, folder = run()
    assert code == 130
    assert metrics["interrupted"] and metrics["stage"] == "training"
    assert metrics["steps"] == 3 == len(metrics["training"]), "the step in progress is finished and logged"
    assert len(metrics["pair_records"]) == 24
    assert {f.name for f in folder.iterdir()} >= {"model", "loss_and_accuracy.png", "weight_against_gap.png"}
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, history[3][name]), name
    printed = capsys.readouterr().out
    assert "Interrupted while training: saving what was reached" in printed
    assert "The run was interrupted while training" in printed


def test_second_interrupt_drops_the_step(run, monkeypatch):
    press_ctrl_c_on("on_step_begin", monkeypatch, step=2, times=2)
    code, metrics, folder = run()
    assert code == 130 and metrics["steps"] == 2
    assert {record["step"] for record in metrics["pair_records"]} == {1, 2}


@pytest.mark.parametrize("pressed", [True, False])
def test_exception_in_training_is_an_interrupt_only_after_ctrl_c(run, monkeypatch, capsys, pressed):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == 2:
            if pressed:
                os.kill(os.getpid(), signal.SIGINT)
            raise ModuleNotFoundError("could not import")

    monkeypatch.setattr(progress.StepClock, "on_step_begin", fail)
    monkeypatch.setattr(progress.StepClock, "on_step_end", lambda *arguments, **keywords: None)
    if not pressed:
        with pytest.raises(ModuleNotFoundError):
            run()
        return
    code, metrics, _ = run()
    assert code == 130 and metrics["interrupted"] and metrics["steps"] == 2
    assert "came out as ModuleNotFoundError: could not import" in capsys.readouterr().err


def test_second_interrupt_does_not_tear_an_update(run, monkeypatch):
    inner = torch.optim.AdamW.step
    calls = []

    def interrupted(self, *arguments, **keywords):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    code, metrics, folder = run()
    assert code == 130 and metrics["steps"] == 3, "the update in progress is finished and counted"


def test_interrupt_inside_an_evaluation(run, monkeypatch):
    press_ctrl_c_on("on_prediction_step", monkeypatch, step=3)
    code, metrics, folder = run("--evaluations", "2")
    assert code == 130 and metrics["interrupted"]
    assert metrics["steps"] == 3 and [e["step"] for e in metrics["heldout"]] == [0]
    assert weights(folder)


def test_interrupt_before_the_first_step_saves_the_untrained_model(run, monkeypatch):
    press_ctrl_c_on("on_prediction_step", monkeypatch, step=0)
    code, metrics, folder = run()
    assert code == 130 and metrics["steps"] == 0 and metrics["heldout"] == []
    expected = tiny_model(torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert not (folder / "loss_and_accuracy.png").exists()


@pytest.mark.parametrize("turned_into", [None, ModuleNotFoundError])
def test_interrupt_while_the_model_is_prepared(run, turned_into):
    def interrupted():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            # A lazily importing library may turn an interrupted import into this.
            if turned_into is None:
                raise
            raise turned_into("could not import") from None

    code, metrics, folder = run(load_model=interrupted)
    assert code == 130
    assert metrics["interrupted"] and metrics["stage"] == "preparing the model"
    assert [f.name for f in folder.iterdir()] == ["metrics.json"]


def test_interrupt_while_saving_saves_again_and_a_second_one_waits(run, monkeypatch):
    from gapo_trainer import report

    inner, calls = report.write_plots, []

    def interrupted(*arguments):
        calls.append(None)
        os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments)

    monkeypatch.setattr(report, "write_plots", interrupted)
    code, metrics, folder = run()
    assert code == 130 and len(calls) == 2
    assert metrics["interrupted"] and metrics["steps"] == 6 and weights(folder)


def test_time_limit_ends_training_with_an_evaluation(run):
    code, metrics, folder = run("--time-limit", "0.0001")
    assert code == 0
    assert metrics["out_of_time"] and not metrics["interrupted"]
    assert metrics["steps"] == 1 and [e["step"] for e in metrics["heldout"]] == [0, 1]
    assert "Time was up: training ended after 1 of 6 steps" in metrics["findings"][0]


def test_no_flipped_pairs(run):
    code, metrics, _ = run("--flip", "0", "--max-steps", "2")
    assert code == 0
    assert metrics["pairs"]["last_visit"]["flipped"] == {"pairs": 0, "gap": None, "weight": None}
    assert any("cannot be compared" in sentence for sentence in metrics["findings"])


def test_missing_model_is_one_clear_line(run, capsys, tmp_path):
    def missing():
        raise ModuleNotFoundError("install the package")

    assert demo.main(["--output-dir", str(tmp_path)], load_model=missing) == 1
    assert capsys.readouterr().err == "error: install the package\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "--lr 0",
        "--batch-size -1",
        "--epochs nan",
        "--lr x",
        "--lr inf",
        "--flip 1.5",
        "--rho=-1",
        "--rho nan",
        "--gamma-beta-ratio nan",
    ],
)
def test_arguments_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        demo.parse_arguments(arguments.split())
    assert exit_.value.code == 2
    assert re.match("--[a-z-]+", arguments)[0] in capsys.readouterr().err


def test_settings_are_the_recipes_unless_an_option_changes_them(monkeypatch, tmp_path):
    recipe = settings.read(demo.RECIPE) | {"beta": 3.0, "rho": 0.2, "learning_rate": 3.0e-5, "flip_labels": 0.5}
    recipe |= {"num_train_epochs": 2.5, "per_device_train_batch_size": 3, "gamma_beta_ratio": 0.75, "max_length": 77}
    monkeypatch.setattr(demo, "_recipe", lambda: recipe)
    monkeypatch.setattr(settings, "read", lambda name: recipe)
    config = demo.Demo(demo.parse_arguments(["--rho=0.1", "--cpu", f"--output-dir={tmp_path}"]))._configure(pairs=120)
    data = {"model_name_or_path", "dataset_name", "dataset_test_split", "flip_labels"}
    own = {"output_dir", "save_strategy", "per_device_eval_batch_size", "report_to", "rho"}
    for name in recipe.keys() - data - own:
        assert getattr(config, name) == recipe[name], name
    assert config.rho == 0.1 and demo.parse_arguments([]).flip == 0.5


def test_importing_the_package_is_light():
    import subprocess
    import sys

    code = "import sys, gapo_trainer, gapo_trainer.demo; print({'torch', 'transformers'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", "Ctrl-C during the imports must find the demonstration's own answer"


def test_libraries_that_are_too_old_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(versions.LEAST, "transformers", "999.0")
    assert demo.main(["--output-dir", str(tmp_path)]) == 1
    assert "error: gapo_trainer expects transformers >= 999.0, got" in capsys.readouterr().err
