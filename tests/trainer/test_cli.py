"""`gapo-train`: settings from a file and the command line, and what it says to wrong ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import made_up_pairs, tiny_model
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from test_distributed_trainer import free_port

from gapo_trainer import cli, settings
from gapo_trainer.config import GAPOConfig
from gapo_trainer.preferences import flip_labels, load_preferences
from gapo_trainer.sources import load_datasets

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


def test_the_learning_rate_is_trls_for_preferences():
    from trl import DPOConfig

    assert settings.parse(TINY)[-1].learning_rate == DPOConfig(output_dir="out", use_cpu=True).learning_rate == 1e-6


def test_changes_reach_into_mappings_and_keep_types():
    changes = ["--rho=0.5", "--scope", "3", "--use_peft=true", "--lora-r=4"]
    changes += ["--lr_scheduler_type=cosine", "--lr_scheduler_kwargs.num_cycles=0.25"]
    changes += ["--lora_target_modules=[q_proj, v_proj]", "--learning_rate=5e-7"]
    data, model, config = settings.parse(settings.change(TINY, changes))
    assert (config.rho, config.scope, config.lr_scheduler_kwargs) == (0.5, 3, {"num_cycles": 0.25})
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (True, 4, ["q_proj", "v_proj"])
    assert config.learning_rate == 5e-7 and data.flip_labels == 0
    seen = settings.parse(TINY | {"include_num_input_tokens_seen": "non_padding"})[-1].include_num_input_tokens_seen
    assert seen == "non_padding"
    assert settings.parse(settings.change(TINY, ["--save_strategy=no"]))[-1].save_strategy == "no"  # YAML: False
    for fsdp in (True, False):
        assert settings.parse(TINY | {"fsdp": fsdp, "fsdp_config": {"version": 2}})[-1].fsdp is fsdp


@pytest.mark.parametrize("text", ["1.10", "1:30", "on", "0123", "1e3", "2026-01-02", "[a"])
def test_text_stays_as_it_was_typed(text):
    _, model, config = settings.parse(settings.change(TINY, [f"--model_revision={text}", "--run-name", text]))
    assert (model.model_revision, config.run_name) == (text, text)
    assert settings.parse(settings.change(TINY | {"run_name": "x"}, ["--run_name=null"]))[-1].run_name is None


@pytest.mark.parametrize("given, expected", [("true", "all"), ("false", "no"), ("no", "no"), ("all", "all")])
def test_tokens_may_be_counted(given, expected):
    config = settings.parse(settings.change(TINY, [f"--include_num_input_tokens_seen={given}"]))[-1]
    assert config.include_num_input_tokens_seen == expected


def test_arguments_of_torchs_optimizers_are_taken():
    config = settings.parse(settings.change(TINY, ["--optim=sgd", "--optim_args=momentum=0.9, nesterov=true"]))[-1]
    assert config.optim_args == "momentum=0.9, nesterov=true"


def test_lists_are_lists():
    """Also where a text would do, of which the parser makes a text."""
    config = settings.parse(TINY | {"report_to": ["tensorboard", "wandb"], "optim_target_modules": ["attn", "mlp"]})[-1]
    assert (config.report_to, config.optim_target_modules) == (["tensorboard", "wandb"], ["attn", "mlp"])
    config = settings.parse(settings.change(TINY, ["--report_to=[]", "--optim_target_modules=attn"]))[-1]
    assert (config.report_to, config.optim_target_modules) == ([], "attn")
    config = settings.parse(TINY | {"fsdp": ["full_shard", "offload"], "fsdp_config": {"version": 2}})[-1]
    assert config.fsdp is True and config.fsdp_config["cpu_offload"] and config.fsdp_config["reshard_after_forward"]
    assert settings.parse(TINY | {"label_names": ["labels"]})[-1].label_names == ["labels"]


def test_print_config_is_a_config(capsys, tmp_path):
    assert cli.main(["smollm2-135m-offline", "--rho=0.125", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    again = settings.read(str(tmp_path / "printed.yaml"))
    assert again["rho"] == 0.125 and again["adam_beta2"] == 0.999
    assert settings.render(again) == printed


def test_print_config_without_a_recipe_prints_the_defaults(capsys):
    assert cli.main(["--print-config", "--rho=0.125"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["rho"], printed["beta"], printed["dataset_name"]) == (0.125, 2.0, "")
    assert cli.main(["--print-config", "--roh=0.125"]) == 2 and "did you mean 'rho'" in capsys.readouterr().err


def test_numbers_in_mappings_are_numbers():
    """YAML 1.1 takes 1e-7 for text."""
    base = TINY | {"lr_scheduler_type": "warmup_stable_decay"}
    options = settings.parse(base | {"lr_scheduler_kwargs": {"min_lr_ratio": "1e-7", "decay_type": "e7"}})[-1]
    assert options.lr_scheduler_kwargs == {"min_lr_ratio": 1e-7, "decay_type": "e7"}
    changed = settings.change(base, ["--lr_scheduler_kwargs.min_lr_ratio=2.5e-7"])
    assert settings.parse(changed)[-1].lr_scheduler_kwargs == {"min_lr_ratio": 2.5e-7}
    changed = settings.change(TINY, ["--liger_kernel_config.rope=false"])
    assert settings.parse(changed)[-1].liger_kernel_config == {"rope": False}


def test_checkpointing_of_the_command_line_is_not_reentrant(recipe):
    changes = ["--gradient_checkpointing=true", "--gradient_checkpointing_kwargs.preserve_rng_state=false"]
    config = settings.parse(settings.change(TINY, changes))[-1]
    assert config.gradient_checkpointing_kwargs == {"preserve_rng_state": False, "use_reentrant": False}
    assert cli.main([recipe(), *changes, "--max_steps=1"]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected a YAML file or a recipe, one of gemma-2-9b-it"),
        (["smollm2-135m-offlin"], "did you mean 'smollm2-135m-offline'"),
        (["smollm2-135m-offline", "--gama_beta_ratio=1"], "unknown setting 'gama_beta_ratio'; did you mean 'gamma_b"),
        (["smollm2-135m-offline", "--probe=margn"], "probe must be one of loss, margin, got 'margn'; did you mean 'ma"),
        (["smollm2-135m-offline", "--scope=backbon"], "got 'backbon'; did you mean 'backbone'"),
        (["smollm2-135m-offline", "--accelerator_config.even_batch=true"], "did you mean 'even_batches'"),
        (["smollm2-135m-offline", "--lr_scheduler_kwargs.num_cycle=1"], "kwargs.num_cycle'; did you mean 'num_cycles'"),
        (["smollm2-135m-offline", "--gradient_checkpointing_kwargs.use_reentrnt=0"], "did you mean 'use_reentrant'"),
        (["smollm2-135m-offline", "--fsdp_config.fsdp_versoin=2"], "did you mean 'fsdp_version'"),
        (["smollm2-135m-offline", "--report_to=wandbb"], "got 'wandbb'; did you mean 'wandb'"),
        (["smollm2-135m-offline", "--attn_implementation=sdpaa"], "got 'sdpaa'; did you mean 'sdpa'"),
        (["smollm2-135m-offline", "--lora_task_type=CAUSAL"], "got 'CAUSAL'; did you mean 'CAUSAL_LM'"),
        (["smollm2-135m-offline", "--fsdp=full_shrad"], "got 'full_shrad'; did you mean 'full_shard'"),
        (["smollm2-135m-offline", "--fsdp=[full_shard, ofload]"], "got 'ofload'; did you mean 'offload'"),
        (["smollm2-135m-offline", "--fsdp=full_shard auto_warp"], "got 'auto_warp'; did you mean 'auto_wrap'"),
        (
            ["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.auto_wrap_policy=SIZE_BASED_WARP"],
            "fsdp_config.auto_wrap_policy must be one of TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP, NO_WRAP, got "
            "'SIZE_BASED_WARP'; did you mean 'SIZE_BASED_WRAP'",
        ),
        (["smollm2-135m-offline", "--torch_compile_backend=inductr"], "got 'inductr'; did you mean 'inductor'"),
        (["smollm2-135m-offline", "--lora_task_type=SEQ_CLS", "--rho=big"], "must be one of CAUSAL_LM, got 'SEQ_CLS'"),
        (
            ["smollm2-135m-offline", "--accelerator_config.split_batches=maybe", "--rho=big"],
            "accelerator_config.split_batches must be True or False, got 'maybe'",
        ),
        (["smollm2-135m-offline", "--accelerator_config.dispatch_batches=flase", "--rho=big"], "did you mean 'false'"),
        (["smollm2-135m-offline", "--torch_dtype=bfloat16"], "unknown setting 'torch_dtype'; did you mean 'dtype'"),
        (["smollm2-135m-offline", "--model_name_or_path=smollm2-135m-ofline"], "did you mean 'smollm2-135m-instruct-off"),
        (["smollm2-135m-offline", "--dataset_name=./gapo_preference"], "did you mean 'gapo-preferences'"),
        (["smollm2-135m-offline", "--eval_strategy=step"], "got 'step'; did you mean 'steps'"),
        (
            ["smollm2-135m-offline", "--padding_free=true", "--share_backward=false", "--pad_to_multiple_of=8"],
            "padding_free leaves nothing to pad",
        ),
        (["smollm2-135m-offline", "--rho=big"], "rho: invalid float value: 'big'"),
        (["smollm2-135m-offline", "--rho"], "expected --rho=value, got no value"),
        (["smollm2-135m-offline", "--print-confg"], "got no value; did you mean '--print-config'"),
        (["smollm2-135m-offline", "--rho.x=1"], "rho is 0.05, which has no keys of its own"),
        (["smollm2-135m-offline", "rho=1"], "expected --key=value, got 'rho=1'"),
        (["smollm2-135m-offline", "--dataset_test_split=valid"], "split must be 'train', 'test' or None"),
        (["smollm2-135m-offline", "--model_name_or_path=/no/such/folder"], "model_name_or_path = '/no/such/folder'"),
        (["smollm2-135m-offline", "--dataset_name=/no/such.jsonl"], "dataset_name = '/no/such.jsonl'"),
        (["smollm2-135m-offline", "--resume_from_checkpoint=lst"], "folder or 'last', got 'lst'; did you mean 'last'"),
        (["smollm2-135m-offline", "--dataset_test_split=null", "--eval_strategy=epoch"], "needs a dataset_test_split"),
        (
            ["smollm2-135m-offline", "--dataset_test_split=null", "--eval_strategy=no", "--eval_on_start=true"],
            "eval_on_start = True needs a dataset_test_split",
        ),
        (["smollm2-135m-offline", "--padding_free=ture"], "padding_free must be True or False, got 'ture'; did you mean 'true'"),
        (["smollm2-135m-offline", "--use_peft=flase"], "use_peft must be True or False, got 'flase'; did you mean 'false'"),
        (
            ["smollm2-135m-offline", "--gradient_checkpointing_kwargs.preserve_rng_state=flase"],
            "gradient_checkpointing_kwargs.preserve_rng_state must be True or False, got 'flase'; did you mean 'false'",
        ),
        (["smollm2-135m-offline", "--gradient_checkpointing_kwargs.use_reentrant=flase"], "must be True or False, got 'flase'"),
        (
            ["smollm2-135m-offline", "--gradient_checkpointing_kwargs.determinism_check=defalt"],
            "determinism_check must be one of default, none, got 'defalt'; did you mean 'default'",
        ),
        (
            ["smollm2-135m-offline", "--accelerator_config.gradient_accumulation_kwargs.num_step=2"],
            "unknown setting 'accelerator_config.gradient_accumulation_kwargs.num_step'; did you mean 'num_steps'",
        ),
        (
            ["smollm2-135m-offline", "--accelerator_config.gradient_accumulation_kwargs.sync_each_batch=flase"],
            "sync_each_batch must be True or False, got 'flase'; did you mean 'false'",
        ),
        (
            ["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.reshard_after_forward=flase"],
            "fsdp_config.reshard_after_forward must be True or False, got 'flase'; did you mean 'false'",
        ),
        (["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.fsdp_cpu_offload=ture"], "got 'ture'; did you mean 'true'"),
        (
            ["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.state_dict_type=FULL_STATE_DIC"],
            "got 'FULL_STATE_DIC'; did you mean 'FULL_STATE_DICT'",
        ),
        (["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.fsdp_version=3"], "fsdp_version must be one of 1, 2, got 3"),
        (
            ["smollm2-135m-offline", "--lr_scheduler_type=cosine", "--lr_scheduler_kwargs.num_cycles=abc"],
            "lr_scheduler_kwargs.num_cycles must be a number, got 'abc'",
        ),
        (
            ["smollm2-135m-offline", "--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs.min_lr=abc"],
            "lr_scheduler_kwargs.min_lr must be a number, got 'abc'",
        ),
        (
            ["smollm2-135m-offline", "--lr_scheduler_type=polynomial", "--lr_scheduler_kwargs.power=true"],
            "lr_scheduler_kwargs.power must be a number, got True",
        ),
        (
            ["smollm2-135m-offline", "--fsdp=true", "--fsdp_config.min_num_params=abc"],
            "fsdp_config.min_num_params must be a number, got 'abc'",
        ),
        (["smollm2-135m-offline", "--dataloader_num_workers=false"], "dataloader_num_workers"),
        (["smollm2-135m-offline", "--eval_accumulation_steps=0"], "eval_accumulation_steps must be finite and >= 1, got 0"),
        (["smollm2-135m-offline", "--torch_compile_mode=defualt"], "got 'defualt'; did you mean 'default'"),
        (["smollm2-135m-offline", "--dataset_train_split=tran"], "got 'tran'; did you mean 'train'"),
        (["smollm2-135m-offline", "--dataset_config=en"], "dataset_config expects a dataset with configurations, got"),
        (["smollm2-135m-offline", "--debug=underflow"], "got 'underflow'; did you mean 'underflow_overflow'"),
        (["smollm2-135m-offline", "--fsdp_config=/no/such.json", "--fsdp=true"], "No such file or directory: '/no/"),
        (["smollm2-135m-offline", "--gradient_checkpointing_kwargs=x"], "_kwargs must be a mapping, got 'x'"),
        (["smollm2-135m-offline", "--lr_scheduler_kwargs={x"], "lr_scheduler_kwargs must be a mapping, got '{x'"),
        (["smollm2-135m-offline", "--lora_r=8"], "lora_r expects use_peft: true, got 8 without it"),
        (["smollm2-135m-offline", "--lora_target_modules=[q_proj]"], "lora_target_modules expects use_peft: true, got "),
        (["smollm2-135m-offline", "--fsdp_config.version=2"], "fsdp_config expects fsdp: true, got {'version': 2} without"),
        (["smollm2-135m-offline", "--optim=sgd", "--optim_args=momentm=0.9"], "of sgd; did you mean 'momentum'"),
        (["smollm2-135m-offline", "--optim_args=eps=1e-3"], "unknown setting 'optim_args.eps' of adamw_torch"),
        (["smollm2-135m-offline", "--include_num_input_tokens_seen=al"], "got 'al'; did you mean 'all'"),
        (["smollm2-135m-offline", "--use_dora=true", "--use_peft=false"], "use_dora expects use_peft: true, got True"),
        (["smollm2-135m-offline", "--max_grad_norm=null"], "max_grad_norm must be a number, got None"),
    ],
)
def test_wrong_settings_are_named(arguments, message, capsys):
    assert cli.main([*arguments, *(["--use_cpu=true"] if arguments else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("gapo-train: error:") == 1 and message in error


def test_wrong_keys_in_a_file_that_a_setting_names_are_named(tmp_path, capsys):
    (tmp_path / "fsdp.json").write_text('{"fsdp_versoin": 2}')
    assert cli.main(["smollm2-135m-offline", f"--fsdp_config={tmp_path / 'fsdp.json'}", "--use_cpu=true"]) == 2
    assert "unknown setting 'fsdp_config.fsdp_versoin'; did you mean 'fsdp_version'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, near",
    [
        ("fsdp_config", '{"fsdp_versoin": 2}', "fsdp_version"),
        ("accelerator_config", '{"even_batch": true}', "even_batches"),
        ("lr_scheduler_kwargs", '{"num_cycle": 2}', "num_cycles"),
    ],
)
def test_wrong_keys_in_json_are_named(name, text, near):
    with pytest.raises(settings.SettingsError, match=f"unknown setting '{name}.*'; did you mean '{near}'"):
        settings.parse(TINY | {"lr_scheduler_type": "cosine", name: text})


def test_a_key_that_is_there_twice_is_named(tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("rho: 0.1\nbeta: 2\nrho: 0.2\n")
    assert cli.main([str(tmp_path / "twice.yaml")]) == 2
    assert "expected each key once, got 'rho' again in line 3" in capsys.readouterr().err
    (tmp_path / "merged.yaml").write_text("x: &x\n  rho: 0.1\ny:\n  <<: *x\n  rho: 0.2\n")
    assert settings.read(str(tmp_path / "merged.yaml"))["y"] == {"rho": 0.2}


def test_yaml_that_is_no_mapping(tmp_path, capsys):
    for text in ("- a\n- b\n", "a: [1\n"):
        (tmp_path / "bad.yaml").write_text(text)
        assert cli.main([str(tmp_path / "bad.yaml")]) == 2
        assert "bad.yaml" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("!!python/object/apply:os.system ['true']\n")
    assert cli.main([str(tmp_path / "bad.yaml")]) == 2


@pytest.fixture
def recipe(tokenizer, tmp_path):
    """recipe(**changes) -> the path of a YAML file of a tiny run of two updates, with evaluation."""
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made_up_pairs(8)))
    values = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "dataset_test_split": str(tmp_path / "test.jsonl"),
        "flip_labels": 0.25,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "learning_rate": 5e-5,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }

    def write(**changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
        return str(tmp_path / "recipe.yaml")

    return write


def test_a_run_trains_evaluates_and_saves(recipe, tmp_path):
    path = recipe(use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    assert cli.main([path, "--per_device_train_batch_size=8"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert {"gapo/gap_flipped", "gapo/weight_clean"} <= state["log_history"][0].keys()
    assert "eval_rewards/accuracies" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_the_keys_of_mappings_are_those_that_are_read():
    """Each is taken; the test above has one of each that is not."""
    keys = settings._nested_keys({"lr_scheduler_type": "cosine_with_min_lr"})
    assert {"version", "fsdp_version", "reshard_after_forward", "cpu_offload"} <= set(keys["fsdp_config"])
    assert {"use_reentrant", "preserve_rng_state", "determinism_check"} <= set(keys["gradient_checkpointing_kwargs"])
    assert keys["gradient_checkpointing_kwargs"] == keys["activation_checkpointing_kwargs"]
    assert {"min_lr", "num_cycles"} <= set(keys["lr_scheduler_kwargs"]) and "optimizer" not in keys["lr_scheduler_kwargs"]
    assert "lr_scheduler_kwargs" not in settings._nested_keys({"lr_scheduler_type": "reduce_lr_on_plateau"})
    for name in (
        "attn_implementation=kernels-community/attention",
        "report_to=[tensorboard, wandb]",
        "report_to=all",
        "torch_compile_backend=INDUCTOR",
        "fsdp=full_shard auto_wrap",
        "fsdp_config.fsdp_auto_wrap_policy=NO_WRAP",
        "accelerator_config={even_batches: 'false', dispatch_batches: null, non_blocking: true}",
        "accelerator_config.gradient_accumulation_kwargs.sync_each_batch=true",
        "accelerator_config.gradient_accumulation_kwargs={num_steps: '4', sync_each_batch: 'false'}",
        "fsdp_config={cpu_offload: false, reshard_after_forward: 'off', state_dict_type: SHARDED_STATE_DICT, version: 2}",
        "fsdp_config={cpu_offload: 'true', state_dict_type: sharded_state_dict}",
        "gradient_checkpointing_kwargs={preserve_rng_state: false, determinism_check: none}",
        "gradient_checkpointing_kwargs={preserve_rng_state: 'false'}",
        "lr_scheduler_kwargs.num_cycles=1e-1",
        "lr_scheduler_kwargs={num_cycles: '0.5'}",
    ):
        settings.parse(settings.change(TINY | {"fsdp": False, "lr_scheduler_type": "cosine"}, [f"--{name}"]))


def test_the_keys_of_liger_are_some_models():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    settings.parse(TINY | {"liger_kernel_config": {"rope": False, "swiglu": False, "layer_norm": False}})
    with pytest.raises(settings.SettingsError, match="'liger_kernel_config.rms_nrm'; did you mean 'rms_norm'"):
        settings.parse(TINY | {"liger_kernel_config": {"rms_nrm": False}})


def test_the_seed_is_that_of_the_flips():
    data = settings.DataConfig(dataset_name="gapo-preferences", flip_labels=0.2)
    pairs = load_preferences("train")
    assert list(load_datasets(data, 3)[0]) == flip_labels(pairs, 0.2, 3) != flip_labels(pairs, 0.2, 0)


def test_gradients_may_go_unclipped(recipe, tmp_path):
    assert cli.main([recipe(), "--max_grad_norm=inf", "--max_steps=1"]) == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][0]["grad_norm"] > 0


def test_one_target_of_lora_is_a_name(recipe, tmp_path, capsys):
    """TRL makes text of a list of one, and PEFT takes text for a pattern."""
    path = recipe(use_peft=True, max_steps=1)
    assert cli.main([path, "--lora_target_modules=[q_proj]"]) == 0
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved and all(".q_proj." in name for name in saved)
    assert cli.main([path, "--lora_target_modules=[q_proj, v_prj]"]) == 2
    assert "got 'v_prj'; did you mean 'v_proj'" in capsys.readouterr().err
    for field, near in (("modules_to_save", "k_proj"), ("target_parameters", "weight")):
        assert cli.main([path, "--lora_target_modules=[q_proj]", f"--lora_{field}=[{near}, {near[:-1]}]"]) == 2
        assert f"of the model, got '{near[:-1]}'; did you mean '{near}'" in capsys.readouterr().err
    for target in ("all-linea", "alllinear"):
        assert cli.main([path, f"--lora_target_modules={target}"]) == 2
        assert capsys.readouterr().err.endswith(f"modules of the model, got '{target}'; did you mean 'all-linear'?\n")


@pytest.mark.parametrize(
    "change, message",
    [
        ("--optim=galore_adamw", "need to install `galore_torch`"),
        ("--output_dir=/dev/null/out", "Not a directory: '/dev/null/out'"),
        ("--lr_scheduler_type=inverse_sqrt --lr_scheduler_kwargs.timescale=[1]", "timescale must be a number, got [1]"),
        ("--lr_scheduler_type=warmup_stable_decay", "missing 1 required positional argument: 'num_decay_steps'"),
        ("--dataset_train_split=trian", "a file has no splits, expected 'train', got 'trian'"),
        ("--dataset_test_split=test", "for a file, dataset_test_split is another file, .json, .jsonl, .parquet, .csv"),
    ],
)
def test_what_training_cannot_begin_with_is_named(recipe, capsys, change, message):
    assert cli.main([recipe(), *change.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("gapo-train: error:") == 1 and message in error


def test_flips_of_a_file_without_pairs_are_refused(recipe, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"prompt": "w1", "good": "w2", "bad": "w3"}\n')
    assert cli.main([recipe()]) == 2
    assert "with the columns chosen and rejected" in capsys.readouterr().err


def test_the_last_checkpoint_has_a_number(recipe, tmp_path):
    assert cli.main([recipe(save_strategy="steps", save_steps=1, max_steps=1)]) == 0
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "out" / "checkpoint-best")
    assert cli.main([recipe(save_strategy="no"), "--resume_from_checkpoint=last"]) == 0
    assert len(json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]) > 2


def test_a_split_that_a_saved_dataset_lacks_is_named(recipe, tmp_path, capsys):
    splits = {name: Dataset.from_list(made_up_pairs(3)) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    path = recipe(dataset_name=str(tmp_path / "saved"), dataset_test_split="test", max_steps=1)
    assert cli.main([path, "--dataset_train_split=trian"]) == 2
    error = capsys.readouterr().err
    assert "expected one of the splits train, test, got 'trian'; did you mean 'train'?" in error
    data, _, config = settings.parse(settings.read(path))
    assert list(map(len, load_datasets(data, config.seed))) == [3, 3]


@pytest.mark.parametrize("wrong, near", [("test_split=tset", "test"), ("train_split=tran[:2]", "train"), ("config=defalt", "default")])
def test_a_split_or_configuration_that_a_folder_lacks_is_named(recipe, tmp_path, capsys, wrong, near):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made_up_pairs(3)))
    path = recipe(dataset_name=str(folder), dataset_test_split="test", max_steps=1)
    assert cli.main([path, f"--dataset_{wrong}"]) == 2
    error = capsys.readouterr().err
    assert f"did you mean {near!r}?" in error
    data, _, config = settings.parse(settings.read(path))
    assert list(map(len, load_datasets(data, config.seed))) == [3, 3]


def test_what_a_library_cannot_do_here_is_one_line(recipe, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr("gapo_trainer.trainer.GAPOTrainer._prepare_for_training", fail)
    assert cli.main([recipe()]) == 2
    assert capsys.readouterr().err.endswith("gapo-train: error: 0 active drivers\n")


def test_errors_of_training_itself_are_not_of_the_settings(recipe, monkeypatch):
    def fail(*_, **__):
        raise ValueError("in the middle")

    monkeypatch.setattr("gapo_trainer.trainer.GAPOTrainer.training_step", fail)
    with pytest.raises(ValueError, match="in the middle"):
        cli.main([recipe()])


def test_two_processes_of_accelerate_launch_train_as_one(recipe, tmp_path):
    path = recipe(train_sampling_strategy="sequential", learning_rate=1e-2, optim="sgd")
    assert cli.main([path, f"--output_dir={tmp_path / 'one'}", "--per_device_train_batch_size=4"]) == 0
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--num_processes=2"]
    # Its --cpu would start one process; with use_cpu in the recipe, --multi_gpu starts two on the CPU.
    command += ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    command += ["-m", "gapo_trainer.cli", path, f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=2"]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if "terminate called without an active exception" not in done.stderr:  # gloo's threads, as the process ends
            break
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert all(torch.allclose(two[name], one[name], rtol=1e-4, atol=1e-5) for name in one)
    one, two = (json.loads((tmp_path / run / "eval_results.json").read_text()) for run in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)


def test_a_recipe_in_bfloat16_is_printed_anywhere(capsys):
    assert cli.main(["llama-3-8b-instruct", "--print-config"]) == 0
    assert "bf16: true" in capsys.readouterr().out
