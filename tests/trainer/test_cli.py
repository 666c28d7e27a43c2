"""`gapo-train`: settings from a file and the command line, and what it says to wrong ones."""

import json

import pytest
import torch
import yaml
from conftest import made_up_pairs, tiny_model

from gapo_trainer import cli, settings
from gapo_trainer.config import GAPOConfig

TINY = {"dataset_name": "gapo-preferences", "model_name_or_path": "none", "output_dir": "out", "use_cpu": True}


@pytest.mark.parametrize("name", sorted(settings.recipes()))
def test_recipes_are_whole(name):
    data, model, config = settings.parse(settings.change(settings.read(name), ["--bf16=false"]))
    assert data.dataset_name and model.model_name_or_path and config.rho > 0


@pytest.mark.parametrize(
    "name, beta, ratio, rho, lr",
    [
        ("mistral-7b-instruct", 2.5, 0.1, 0.025, 5e-7),
        ("llama-3-8b-base", 2.0, 0.5, 0.05, 6e-7),
        ("llama-3-8b-instruct", 2.5, 0.55, 0.05, 1e-6),
        ("gemma-2-9b-it", 10, 0.5, 0.05, 8e-7),
    ],
)
def test_recipes_have_the_authors_values(name, beta, ratio, rho, lr):
    _, _, config = settings.parse(settings.change(settings.read(name), ["--bf16=false"]))
    assert (config.beta, config.gamma_beta_ratio, config.rho, config.learning_rate) == (beta, ratio, rho, lr)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 8 == 128
    assert config.lr_scheduler_type == "cosine" and config.num_train_epochs == 1 and config.get_warmup_steps(50) == 5
    assert (config.max_length, config.max_prompt_length) == (2048, 1800)


def test_presets():
    config = GAPOConfig.preset("llama-3-8b-instruct", output_dir="out", bf16=False, rho=0.1)
    assert (config.beta, config.gamma, config.rho, config.output_dir) == (2.5, 2.5 * 0.55, 0.1, "out")
    with pytest.raises(ValueError, match="did you mean 'llama-3-8b-instruct'"):
        GAPOConfig.preset("llama-3-8b-instuct")


def test_changes_reach_into_mappings_and_keep_types():
    changes = ["--rho=0.5", "--scope", "3", "--lr_scheduler_kwargs.num_cycles=0.25", "--use_peft=true", "--lora-r=4"]
    changes += ["--lora_target_modules=[q_proj, v_proj]", "--learning_rate=5e-7"]
    data, model, config = settings.parse(settings.change(TINY, changes))
    assert (config.rho, config.scope, config.lr_scheduler_kwargs) == (0.5, 3, {"num_cycles": 0.25})
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (True, 4, ["q_proj", "v_proj"])
    assert config.learning_rate == 5e-7 and data.flip_labels == 0
    seen = settings.parse(TINY | {"include_num_input_tokens_seen": "non_padding"})[-1].include_num_input_tokens_seen
    assert seen == "non_padding"
    assert settings.parse(settings.change(TINY, ["--save_strategy=no"]))[-1].save_strategy == "no"  # YAML: False


def test_print_config_is_a_config(capsys, tmp_path):
    assert cli.main(["smollm2-135m-offline", "--rho=0.125", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    again = settings.read(str(tmp_path / "printed.yaml"))
    assert again["rho"] == 0.125 and again["adam_beta2"] == 0.999
    assert settings.render(again) == printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected a YAML file or a recipe, one of gemma-2-9b-it"),
        (["smollm2-135m-offlin"], "did you mean 'smollm2-135m-offline'"),
        (["smollm2-135m-offline", "--gama_beta_ratio=1"], "unknown setting 'gama_beta_ratio'; did you mean 'gamma_b"),
        (["smollm2-135m-offline", "--probe=margn"], "probe must be one of loss, margin, got 'margn'; did you mean 'ma"),
        (["smollm2-135m-offline", "--eval_strategy=step"], "got 'step'; did you mean 'steps'"),
        (
            ["smollm2-135m-offline", "--padding_free=true", "--pad_to_multiple_of=8"],
            "padding_free leaves nothing to pad",
        ),
        (["smollm2-135m-offline", "--rho=big"], "rho: invalid float value: 'big'"),
        (["smollm2-135m-offline", "--rho"], "expected --rho=value, got no value"),
        (["smollm2-135m-offline", "--rho.x=1"], "rho is 0.05, which has no keys of its own"),
        (["smollm2-135m-offline", "rho=1"], "expected --key=value, got 'rho=1'"),
        (["smollm2-135m-offline", "--dataset_test_split=valid"], "split must be 'train', 'test' or None"),
        (["smollm2-135m-offline", "--model_name_or_path=/no/such/folder"], "model_name_or_path = '/no/such/folder'"),
        (["smollm2-135m-offline", "--dataset_name=/no/such.jsonl"], "dataset_name = '/no/such.jsonl'"),
        (["smollm2-135m-offline", "--dataset_test_split=null", "--eval_strategy=epoch"], "needs a dataset_test_split"),
    ],
)
def test_wrong_settings_are_named(arguments, message, capsys):
    assert cli.main([*arguments, *(["--use_cpu=true"] if arguments else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("gapo-train: error:") == 1 and message in error


def test_yaml_that_is_no_mapping(tmp_path, capsys):
    for text in ("- a\n- b\n", "a: [1\n"):
        (tmp_path / "bad.yaml").write_text(text)
        assert cli.main([str(tmp_path / "bad.yaml")]) == 2
        assert "bad.yaml" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    assert cli.main([str(tmp_path / "bad.yaml")]) == 2


def test_a_run_trains_evaluates_and_saves(tokenizer, tmp_path):
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made_up_pairs(8)))
    recipe = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "dataset_test_split": str(tmp_path / "test.jsonl"),
        "flip_labels": 0.25,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "report_to": "none",
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main([str(tmp_path / "recipe.yaml"), "--per_device_train_batch_size=8"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert {"gapo/gap_flipped", "gapo/weight_clean"} <= state["log_history"][0].keys()
    assert "eval_rewards/accuracies" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
