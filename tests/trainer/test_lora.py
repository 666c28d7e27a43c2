"""Adapters: they alone are moved and trained, and not on the head."""

import re
import warnings

import pytest
import torch
from conftest import made_up_pairs, tiny_model
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from test_trainer import assert_a_radius_of_zero_leaves_no_gap, make_trainer, other_model

from gapo_trainer.adapters import check_targets
from gapo_trainer.config import GAPOConfig
from gapo_trainer.trainer import GAPOTrainer

LORA = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def lora_trainer(tokenizer, tmp_path, model, peft_config, **settings):
    defaults = dict(max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=5e-5)
    config = GAPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, **(defaults | settings))
    options = dict(train_dataset=made_up_pairs(6), processing_class=tokenizer, peft_config=peft_config)
    return GAPOTrainer(model, config, **options)


@pytest.mark.parametrize("geometry, init, warned", [("asam", True, True), ("sam", True, False), ("asam", False, False)])
def test_adapters_of_zeros_leave_asam_nothing_to_move(tokenizer, tmp_path, geometry, init, warned):
    config = LoraConfig(**LORA | {"init_lora_weights": init})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = lora_trainer(tokenizer, tmp_path, tiny_model(torch.float32), config, geometry=geometry, rho=0.5, logging_steps=1)
    assert any("geometry='sam'" in str(warning.message) for warning in said) == warned
    trainer.train()
    gap = [entry["gapo/gap"] for entry in trainer.state.log_history if "gapo/gap" in entry][0]
    assert (abs(gap) < 1e-6) == warned


def test_adapters_that_a_shared_backward_cannot_take_are_refused_before_the_first_step(tokenizer, tmp_path):
    """DoRA divides by the norm of the sum of weights, which is made of several parameters."""
    lora_trainer(tokenizer, tmp_path, tiny_model(torch.float32), LoraConfig(**LORA), share_backward=True)
    dora = LoraConfig(**LORA, use_dora=True)
    lora_trainer(tokenizer, tmp_path, tiny_model(torch.float32), dora)
    with pytest.raises(NotImplementedError, match="share_backward=True cannot take .*, which a parameter of shape"):
        lora_trainer(tokenizer, tmp_path, tiny_model(torch.float32), dora, share_backward=True)


UNCAST = {
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
}


@pytest.mark.parametrize("kind", UNCAST)
def test_what_autocast_leaves_alone_of_adapters_leaves_no_gap(tokenizer, tmp_path, kind):
    """DoRA's magnitudes, say, compute in float32 around matrix products that do not."""
    model = tiny_model(torch.float32, tie_word_embeddings=False)
    trainer = lora_trainer(tokenizer, tmp_path, model, UNCAST[kind], bf16=True, max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="autocast computes with")
        trainer.train()
    assert_a_radius_of_zero_leaves_no_gap(trainer)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_adapters_alone_are_moved_and_trained(tokenizer, tmp_path, wrapped):
    torch.manual_seed(0)
    model, config = tiny_model(torch.float32), LoraConfig(**LORA)
    if wrapped:
        model, config = get_peft_model(model, config), None
    trainer = lora_trainer(tokenizer, tmp_path, model, config, learning_rate=1e-2, rho=0.5, logging_steps=1)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.anchor.names and all("lora_" in name for name in trainer.anchor.names)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    changed = {n for n, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed and changed == {name for name in before if "lora_" in name}
    assert all(entry["gapo/gap"] > 1e-4 for entry in trainer.state.log_history if "loss" in entry)


def test_the_gap_is_that_of_the_merged_model(tokenizer, tmp_path):
    """The log-probs go through the adapters."""
    torch.manual_seed(0)
    trainer = lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(**LORA))
    batch = trainer.data_collator(trainer.train_dataset[:3])
    with torch.no_grad():
        with_adapters = trainer._logps(trainer.model, batch)[0]
        with trainer.model.disable_adapter():
            without = trainer._logps(trainer.model, batch)[0]
        merged = trainer.model.merge_and_unload()
        assert torch.allclose(merged(input_ids=batch["input_ids"], sequence_labels=batch["labels"])[0], with_adapters)
    assert not torch.allclose(without, with_adapters)


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_head_is_refused(tokenizer, tmp_path, where):
    config = LoraConfig(**(LORA | {where: ["q_proj", "lm_head"] if where == "target_modules" else ["lm_head"]}))
    with pytest.raises(TypeError, match="LM head has an adapter on it .*Take lm_head out of target_modules"):
        lora_trainer(tokenizer, tmp_path, tiny_model(tie_word_embeddings=False), config)


def test_the_seed_is_that_of_the_adapters_too(tokenizer, tmp_path):
    drawn = []
    for seed in (1, 2, 1):
        config = LoraConfig(r=2, target_modules=["q_proj"])
        trainer = lora_trainer(tokenizer, tmp_path, tiny_model(), config, seed=seed)
        drawn.append([p.clone() for name, p in trainer.model.named_parameters() if "lora_A" in name])
        torch.rand(seed)  # what was drawn before does not matter
    assert all(map(torch.equal, drawn[0], drawn[2])) and not any(map(torch.equal, drawn[0], drawn[1]))


@pytest.mark.parametrize("target", ["q_prj", "attn.q_proj"])
def test_targets_that_are_no_modules_are_refused(tokenizer, tmp_path, target):
    with pytest.raises(ValueError, match=f"modules of the model, got '{target}'; did you mean 'q_proj'"):
        lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(target_modules=[target]))
    lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(target_modules=["self_attn.q_proj", "k_proj"]))
    # PEFT's rule: a list that serves several models. Of gapo-train's, each is one of this model's.
    lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(target_modules=[target, "k_proj"]))


@pytest.mark.parametrize(
    "field, name, near",
    [
        ("modules_to_save", "embed_tokns", "embed_tokens"),
        ("target_parameters", "q_prj.weight", "q_proj.weight"),
        ("target_parameters", "wieght", "weight"),
    ],
)
def test_other_names_that_are_none_of_the_models_are_refused(field, name, near):
    kind = "modules" if field == "modules_to_save" else "parameters"
    with pytest.raises(ValueError, match=f"expected {field} that are {kind} of the model, got '{name}'; did you mean '{near}'"):
        check_targets(tiny_model(), LoraConfig(target_modules=["q_proj"], **{field: [name]}), all)
    check_targets(tiny_model(), LoraConfig(target_modules=["q_proj"], **{field: [name, near]}), all)
    with pytest.raises(ValueError, match=f"got '{name}'"):
        check_targets(tiny_model(), LoraConfig(target_modules=["q_proj"], **{field: [name, near]}), any)


def test_virtual_tokens_are_refused(tokenizer, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="adapters on the model's weights, LoRA say, got PromptTuningConfig"):
        lora_trainer(tokenizer, tmp_path, tiny_model(), config, scope="all")


def test_patterns_that_match_no_modules_are_refused(tokenizer, tmp_path):
    for pattern in ("all-linea", "*.q_proj"):
        with pytest.raises(ValueError, match=f"modules of the model, got '{re.escape(pattern)}'; did you mean '"):
            lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(target_modules=pattern))
    for pattern in ("all-linear", "ALL-LINEAR", r".*\.[qv]_proj"):
        lora_trainer(tokenizer, tmp_path, tiny_model(), LoraConfig(target_modules=pattern))
    check_targets(tiny_model(), LoraConfig(target_modules="none", target_parameters=["q_proj.weight"]), all)


def test_noise_is_the_adapters_or_the_models(tokenizer, tmp_path):
    """LoHa draws random numbers in training whatever its dropout."""
    config = LoHaConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="dropout or noise in LoHaConfig: train other adapters, LoRA say; two"):
        lora_trainer(tokenizer, tmp_path, tiny_model(), config)
    noisy, config = other_model("Falcon", hidden_dropout=0.5), LoraConfig(target_modules=["query_key_value"])
    with pytest.raises(ValueError, match="dropout or noise in FalconForCausalLM: set it to 0 in model.config"):
        lora_trainer(tokenizer, tmp_path, noisy, config)


class Quantized(torch.nn.Linear):
    """A frozen layer that holds eight bits a weight and a scale, and computes with what they stand for."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        values = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(values, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quantised_base_trains_its_adapters(tokenizer, tmp_path, checkpointing):
    """As QLoRA: the base is integers, the head is not, and neither is touched; float32 adapters under bf16."""
    torch.manual_seed(0)
    model = tiny_model(torch.float32)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantized(getattr(layer.self_attn, name)))
    settings = dict(learning_rate=1e-2, rho=0.5, logging_steps=1, bf16=True, gradient_checkpointing=checkpointing)
    trainer = lora_trainer(tokenizer, tmp_path, model, LoraConfig(**LORA), **settings)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert sum(tensor.dtype == torch.int8 for tensor in before.values()) == 8
    trainer.train()
    changed = {n for n, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {name for name in before if "lora_" in name}
    assert all(entry["gapo/gap"] > 1e-4 for entry in trainer.state.log_history if "loss" in entry)


def test_a_config_beside_adapters_is_refused(tokenizer, tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="leave one of them out"):
        lora_trainer(tokenizer, tmp_path, model, LoraConfig(**LORA))


def test_a_quantised_head_is_refused(tokenizer, tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(53, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="floating-point weight.*leave the head out of the quantisation"):
        make_trainer(tokenizer, tmp_path, model)
