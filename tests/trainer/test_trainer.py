"""`GAPOTrainer` against the method written out on `model(...).logits`, and what it logs, accumulates and restores."""

import copy
import dataclasses
import importlib
import json
import os
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from conftest import made_up_pairs, tiny_model
from packaging.version import Version
from transformers import HfArgumentParser, IntervalStrategy, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from gapo_kernels import GeometricAnchor, gapo_objective, reference
from gapo_trainer import versions
from gapo_trainer.config import GAPOConfig
from gapo_trainer.forward import install
from gapo_trainer.preferences import IGNORE_INDEX, PreferenceCollator, flip_labels, tokenize_pairs
from gapo_trainer.trainer import GAPOTrainer, _refuse_parallelism, _refuse_what_has_no_place

ABOVE_ZERO = 1e-6
DRAWS_FOR_EVERY_LAYER = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="OPT draws a random number for every layer, and is refused"
)


def make_trainer(tokenizer, tmp_path, model=None, pairs=6, **settings):
    rows = tokenize_pairs(flip_labels(made_up_pairs(pairs), 0.34, seed=0), tokenizer, 100)
    defaults = dict(per_device_train_batch_size=3, learning_rate=1e-3, max_grad_norm=0.0, logging_steps=1)
    defaults |= dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, record_pairs=True)
    return GAPOTrainer(
        model if model is not None else tiny_model(),
        GAPOConfig(output_dir=str(tmp_path), **(defaults | settings)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def plain_margins(model, batch):
    """Margins (B,) from the whole logits: no packing, no kernels, with the attention mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    mask = labels != IGNORE_INDEX
    chosen, rejected = ((logps * mask).sum(1) / mask.sum(1)).chunk(2)
    nll = -(logps * mask)[: len(chosen)].sum() / mask[: len(chosen)].sum()
    return chosen - rejected, nll


def plain_step(model, batch, args, sft_weight=None):
    """Loss and gradients by name of one micro-batch; the anchor is a second model. sft_weight: other than that of args."""

    def logistic(argument):
        return -torch.nn.functional.logsigmoid(argument)

    margin, nll = plain_margins(model, batch)
    probe = logistic(args.beta * margin - args.gamma).mean() if args.probe == "loss" else -margin.mean()
    moved = copy.deepcopy(model)
    scope = dict(model.model.named_parameters() if args.scope == "backbone" else model.named_parameters())
    targets = dict(moved.model.named_parameters() if args.scope == "backbone" else moved.named_parameters())
    gradients = torch.autograd.grad(probe, list(scope.values()), retain_graph=True)
    with torch.no_grad():
        scaled = [g if args.geometry == "sam" else p * g for p, g in zip(scope.values(), gradients)]
        norm = torch.sqrt(sum(s.square().sum() for s in scaled))
        for (name, parameter), direction in zip(scope.items(), scaled):
            delta = direction if args.geometry == "sam" else parameter * direction
            targets[name].add_(args.rho * delta / (norm + 1e-12))
        anchor_margin = plain_margins(moved, batch)[0]
    gap = margin - anchor_margin
    argument = args.beta * gap - args.gamma
    if args.loss_type == "hinge":
        losses = (1 - argument).relu()
    else:
        losses = (1 - args.label_smoothing) * logistic(argument) + args.label_smoothing * logistic(-argument)
    loss = losses.mean() + (args.sft_weight if sft_weight is None else sft_weight) * nll
    names, parameters = zip(*model.named_parameters())
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters))), gap.detach()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(got, expected, tolerance):
    scale = max(g.abs().max() for g in expected.values())
    assert scale > ABOVE_ZERO
    for name in expected:
        assert (got[name] - expected[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"probe": "margin", "geometry": "sam", "rho": 0.3},
        {"label_smoothing": 0.1, "sft_weight": 0.5, "beta": 3.0, "gamma_beta_ratio": 0.4},
        {"loss_type": "hinge", "scope": "all", "rho": 0.2},
        {"share_backward": True, "sft_weight": 0.5},
    ],
    ids=["default", "sam", "smoothing and sft", "hinge", "shared backward"],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_step_equals_the_method_written_out(tokenizer, tmp_path, settings, dtype, tolerance, tied):
    trainer = make_trainer(tokenizer, tmp_path, tiny_model(dtype, tied), **settings)
    if trainer.args.share_backward:  # another order of additions, in the norms that transformers computes in float32
        tolerance = max(tolerance, 1e-6)
    weights = copy.deepcopy(trainer.model.state_dict())
    batch = trainer.data_collator(trainer.train_dataset[:3])
    loss, expected, gap = plain_step(trainer.model, batch, trainer.args)
    got, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    got.backward()
    assert abs(got.item() - loss.item()) <= tolerance * max(1, abs(loss.item()))
    # rho is small, and so is the gap: it is compared with its own size.
    assert (out.gap - gap).abs().max() <= max(tolerance, 1e-4 * (dtype == torch.float32)) * gap.abs().max()
    assert gap.abs().max() > 1e-3
    assert_same_gradients(gradients(trainer.model), expected, tolerance)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), f"{name} was not restored"


@pytest.mark.parametrize("pairs", [4, 3], ids=["even", "last micro-batch smaller"])
def test_accumulated_gradient_is_the_mean_over_all_pairs_of_the_update(tokenizer, tmp_path, pairs, monkeypatch):
    settings = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=1)
    trainer = make_trainer(tokenizer, tmp_path, pairs=pairs, train_sampling_strategy="sequential", **settings)
    model = copy.deepcopy(trainer.model)
    batches = [trainer.data_collator(trainer.train_dataset[i : i + 2]) for i in (0, 2)]
    results = [plain_step(model, batch, trainer.args) for batch in batches]
    shares = [len(batch["index"]) / pairs for batch in batches]
    expected = {
        name: sum(share * grads[name] for share, (_, grads, _) in zip(shares, results)) for name in results[0][1]
    }
    seen = {}
    trainer.create_optimizer()
    monkeypatch.setattr(
        type(trainer.optimizer),
        "step",
        lambda self, closure=None: seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()}),
    )
    trainer.train()
    # Llama's norms compute in float32 whatever the model's dtype, so that shares before and after the backward differ
    # by its rounding. A mean over micro-batches would be off by a tenth.
    assert_same_gradients(seen, expected, 1e-6)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(sum(s * loss.item() for s, (loss, _, _) in zip(shares, results)))
    assert [record["index"] for record in trainer.pair_records] == list(range(pairs))


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_an_inert_pair_counts_nowhere_however_the_update_is_cut(tokenizer, tmp_path, sft_weight):
    logged = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, rho=0.0)
        settings |= dict(train_sampling_strategy="sequential", sft_weight=sft_weight)
        trainer = make_trainer(tokenizer, tmp_path, tiny_model(), pairs=4, **settings)
        trainer.train_dataset[1]["chosen_ids"] = []
        trainer.train()
        entry = trainer.state.log_history[0]
        logged.append((entry["loss"], entry["grad_norm"]))
    assert logged[1] == pytest.approx(logged[0], rel=1e-6) and logged[2] == pytest.approx(logged[0], rel=1e-6)


class WithoutLossArguments(type(tiny_model())):
    accepts_loss_kwargs = False


def test_micro_batches_count_by_their_pairs_whatever_the_models_loss_takes(tokenizer, tmp_path):
    """transformers 5.17 divides the loss of models that do not take the number of items."""
    logged = []
    for size, steps in ((4, 1), (2, 2)):
        model = tiny_model()
        model.__class__ = WithoutLossArguments
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, rho=0.0)
        trainer = make_trainer(tokenizer, tmp_path, model, pairs=4, train_sampling_strategy="sequential", **settings)
        trainer.train()
        entry = trainer.state.log_history[0]
        logged.append((entry["loss"], entry["grad_norm"]))
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)


def authors_batch(pairs, tokenizer, max_length, max_prompt_length):
    """input_ids, attention_mask, labels (2B, T) of conversational pairs, from their texts: the end-of-text token ends a
    completion; a pair that is too long keeps the end of its prompt, and if that is still too long the completions' start."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = {"chosen": [], "rejected": []}
    for pair in pairs:
        prompt = ids(f"<s> user {pair['prompt'][0]['content']} </s> \n <s> assistant")
        completions = {side: ids(pair[side][0]["content"]) + [tokenizer.eos_token_id] for side in rows}
        longest = max(len(completion) for completion in completions.values())
        if len(prompt) + longest > max_length:
            prompt = prompt[-max_prompt_length:]
        for side, completion in completions.items():
            if len(prompt) + longest > max_length:
                completion = completion[: max_length - max_prompt_length]
            rows[side].append((prompt, completion))
    sequences = rows["chosen"] + rows["rejected"]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in sequences:
        real = len(prompt) + len(completion)
        batch["input_ids"].append(prompt + completion + [tokenizer.pad_token_id] * (width - real))
        batch["attention_mask"].append([1] * real + [0] * (width - real))
        batch["labels"].append([IGNORE_INDEX] * len(prompt) + completion + [IGNORE_INDEX] * (width - real))
    return {name: torch.tensor(values) for name, values in batch.items()}


def authors_five_updates(model, pairs, tokenizer, args):
    """Losses of five updates of AdamW by the authors' recipe, which move `model`: each micro-batch of pairs has a probe,
    a forward at the anchor and a backward, all on whole logits with an attention mask. From the pairs' texts on. The NLL is
    that of the whole update."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999), eps=args.adam_epsilon)
    size = args.per_device_train_batch_size
    losses = []
    for _ in range(5):
        update, pairs = pairs[: args.gradient_accumulation_steps * size], pairs[args.gradient_accumulation_steps * size :]
        whole = authors_batch(update, tokenizer, args.max_length, args.max_prompt_length)
        nll = args.sft_weight * plain_margins(model, whole)[1]
        nll.backward()
        total = nll.item()
        for start in range(0, len(update), size):
            part = update[start : start + size]
            share = len(part) / len(update)
            batch = authors_batch(part, tokenizer, args.max_length, args.max_prompt_length)
            loss, gradients, _ = plain_step(model, batch, args, sft_weight=0.0)
            total += share * loss.item()
            for name, parameter in model.named_parameters():
                parameter.grad += share * gradients[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("shared", [False, True])
def test_five_updates_equal_the_authors_recipe(tokenizer, tmp_path, shared):
    """With truncation, gradient accumulation, an uneven micro-batch, clipping, weight decay; in float32, to 1e-6."""
    pairs = flip_labels(made_up_pairs(19), 0.3, seed=0)  # 4 and 4, 4 and 4, ..., and at the end 3
    settings = dict(max_length=14, max_prompt_length=8, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    settings |= dict(learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1.0, rho=0.3)
    # A larger epsilon: the default makes whole steps of gradients that are rounding noise.
    settings |= dict(train_sampling_strategy="sequential", adam_epsilon=1e-4, sft_weight=0.1, label_smoothing=0.1)
    settings |= dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, max_steps=5)
    model = tiny_model(torch.float32)
    config = GAPOConfig(output_dir=str(tmp_path), share_backward=shared, **settings)
    trainer = GAPOTrainer(model, config, train_dataset=pairs, processing_class=tokenizer)
    rows, whole = trainer.train_dataset, tokenize_pairs(pairs, tokenizer, 100)
    for cut in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert 0 < sum(row[cut] != full[cut] for row, full in zip(rows, whole)) < len(rows), f"{cut}: some are cut"
    plain, before = copy.deepcopy(model), copy.deepcopy(model)
    expected = authors_five_updates(plain, pairs, tokenizer, config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=1e-5)
    parameters = zip(model.named_parameters(), plain.parameters(), before.parameters())
    for (name, got), want, start in parameters:
        assert (got - want).abs().max() <= 1e-6, name
        assert (want - start).abs().max() > 1e-3, name


def test_updates_that_bfloat16_rounds_away_are_warned_of(tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="are rounded away in bfloat16 weights: load the model with dtype=torch.float32"):
        make_trainer(tokenizer, tmp_path, tiny_model(torch.bfloat16), learning_rate=5e-7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="updates of learning_rate")
        make_trainer(tokenizer, tmp_path, tiny_model(torch.bfloat16), learning_rate=1e-4)
        make_trainer(tokenizer, tmp_path, tiny_model(torch.float32), learning_rate=5e-7)


def test_an_attempt_that_ran_out_of_memory_leaves_no_trace(tokenizer, tmp_path, monkeypatch):
    """With auto_find_batch_size a smaller batch begins anew: so do the records and the anchor's counter."""
    trainer = make_trainer(tokenizer, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=3)
    compute_loss, counters = trainer.compute_loss, []

    def short_of_memory(model, inputs, **options):
        counters.append(trainer.anchor.state_dict())
        if len(counters) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(model, inputs, **options)

    monkeypatch.setattr(trainer, "compute_loss", short_of_memory)
    trainer.train()
    assert len(counters) == 2 + 3 and counters[0] == counters[2] != counters[3]
    assert [record["step"] for record in trainer.pair_records] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_training_moves_the_margins_and_logs_them(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, num_train_epochs=10, learning_rate=3e-3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == trainer.state.global_step == 20
    names = {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    names |= {
        "rewards/chosen",
        "rewards/rejected",
        "gapo/applied_norm_ratio",
        "gapo/gap",
        "gapo/weight",
        "gapo/anchor_margin",
        "grad_norm",
        "learning_rate",
    }
    assert all(names <= entry.keys() for entry in entries)
    assert entries[-1]["gapo/margin"] > entries[0]["gapo/margin"] + 0.1
    assert all(entry["rewards/margins"] == pytest.approx(2 * entry["gapo/margin"]) for entry in entries)

    records = trainer.pair_records
    assert len(records) == 60 and {record["step"] for record in records} == set(range(1, 21))
    flipped = {i for i, row in enumerate(trainer.train_dataset) if row["is_flipped"]}
    assert {record["index"] for record in records if record["is_flipped"]} == flipped and len(flipped) == 2
    beta, gamma = trainer.args.beta, trainer.args.gamma
    for record in records:
        assert record["gap"] == pytest.approx(record["margin"] - record["anchor_margin"])
        weight = beta * torch.sigmoid(torch.tensor(gamma - beta * record["gap"])).item()
        assert record["weight"] == pytest.approx(weight, rel=1e-5)
    for step, entry in enumerate(entries, start=1):
        group = [record for record in records if record["step"] == step]
        assert entry["gapo/gap"] == pytest.approx(sum(r["gap"] for r in group) / 3)
        for name, value in (("flipped", True), ("clean", False)):
            weights = [r["weight"] for r in group if r["is_flipped"] == value]
            if weights:
                assert entry[f"gapo/weight_{name}"] == pytest.approx(sum(weights) / len(weights))
            else:
                assert f"gapo/weight_{name}" not in entry


def test_a_column_of_marks_without_a_flip_is_logged(tokenizer, tmp_path):
    clean = [pair | {"is_flipped": False} for pair in made_up_pairs(3)]
    logged = []
    for pairs in (clean, made_up_pairs(3)):
        settings = dict(max_steps=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True)
        config = GAPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, disable_tqdm=True, **settings)
        trainer = GAPOTrainer(tiny_model(), config, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[0]["gapo/gap_clean"] == logged[0]["gapo/gap"] == logged[1]["gapo/gap"]
    assert not {"gapo/gap_flipped"} & logged[0].keys() and not {"gapo/gap_clean"} & logged[1].keys()


def test_the_log_is_over_the_pairs_of_all_processes(tokenizer, tmp_path, monkeypatch):
    """Which may have unequal numbers of them: here two and three, whose tables stand for those of two processes."""
    trainer = make_trainer(tokenizer, tmp_path)
    mine, other = torch.rand(2, 9), torch.rand(3, 9)
    monkeypatch.setattr(GAPOConfig, "world_size", 2)

    def pad(rows, dim, pad_index):
        return torch.nn.functional.pad(rows, (0, 0, 0, 1), value=pad_index)

    monkeypatch.setattr(trainer.accelerator, "pad_across_processes", pad)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda rows: torch.cat([rows, other]))
    assert torch.equal(trainer._of_all(mine), torch.cat([mine, other]))


def test_the_anchor_of_sharded_weights_goes_on_counting(tokenizer, tmp_path):
    """It takes the place of the one that a checkpoint's counter was loaded into."""
    trainer = make_trainer(tokenizer, tmp_path)
    before = trainer.anchor
    before.load_state_dict({"step": 5, "seed": 3})
    trainer._follow_sharding()
    assert trainer.anchor is not before and trainer.anchor.state_dict() == {"step": 5, "seed": 3}


def test_the_anchors_settings_reach_it(tokenizer, tmp_path, monkeypatch):
    made, from_model = [], GeometricAnchor.from_model
    monkeypatch.setattr(GeometricAnchor, "from_model", lambda model, **o: made.append(o) or from_model(model, **o))
    settings = dict(scope=1, rho=0.3, geometry="sam", direction="gaussian", rounding="nearest", seed=7)
    make_trainer(tokenizer, tmp_path, **settings)
    assert made == [settings | {"compute_dtype": None}]


def test_log_over_several_steps_is_the_mean_over_their_pairs(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, logging_steps=2, num_train_epochs=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["gapo/weight"] == pytest.approx(sum(r["weight"] for r in trainer.pair_records) / 6)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2, "sft_weight": 0.5}, {"loss_type": "hinge"}], ids=str)
def test_evaluation_has_no_anchor_and_means_over_pairs(tokenizer, tmp_path, monkeypatch, settings):
    # Four of six pairs, then two: a mean over batches would weigh the last two double.
    trainer = make_trainer(tokenizer, tmp_path, per_device_eval_batch_size=4, rho=0.5, **settings)
    monkeypatch.setattr(trainer.anchor, "perturbed", lambda *a, **k: pytest.fail("evaluation used the anchor"))
    metrics = trainer.evaluate()
    with torch.no_grad():
        margins, nll = plain_margins(trainer.model, trainer.data_collator(trainer.eval_dataset))
    options = {name: getattr(trainer.args, name) for name in ("beta", "gamma", "label_smoothing", "loss_type")}
    loss = gapo_objective(margins, **options)[0] + trainer.args.sft_weight * nll
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert metrics["eval_gapo/margin"] == pytest.approx(margins.mean().item(), rel=1e-9)
    assert metrics["eval_rewards/margins"] == pytest.approx(trainer.args.beta * margins.mean().item(), rel=1e-9)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((margins > 0).double().mean().item())
    assert trainer.state.log_history[-1]["eval_rewards/margins"] == metrics["eval_rewards/margins"]
    assert trainer.pair_records == []


def test_predict_returns_margins(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, per_device_eval_batch_size=4)
    result = trainer.predict(trainer.eval_dataset)
    with torch.no_grad():
        margins, _ = plain_margins(trainer.model, trainer.data_collator(trainer.eval_dataset))
    assert torch.allclose(torch.as_tensor(result.predictions), margins, rtol=1e-9)


def test_dropout_is_off(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, tiny_model(dropout=0.5))
    batch = trainer.data_collator(trainer.train_dataset[:3])
    trainer.model.train()
    losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(3)}
    assert len(losses) == 1


def test_two_forwards_and_no_logits(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    calls, shapes = [], []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output[0].shape))
    trainer.model.model.register_forward_hook(lambda *_: calls.append(None))
    trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset[:3]))
    assert len(calls) == 2, "one forward at the weights and one at the anchor"
    assert shapes == [(6,), (6,)], "log-probs, no logits"


@pytest.mark.parametrize("moment", [3, 4, "before the update"], ids=["forward", "forward at the anchor", "update"])
def test_interrupt_inside_a_step_leaves_the_weights_of_the_last_finished_step(tokenizer, tmp_path, moment):
    finished = make_trainer(tokenizer, tmp_path, max_steps=1, lr_scheduler_type="constant")
    finished.train()

    trainer = make_trainer(tokenizer, tmp_path, max_steps=5, lr_scheduler_type="constant")
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == moment:
            raise KeyboardInterrupt

    class BeforeTheUpdate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1 and moment == "before the update":
                raise KeyboardInterrupt

    trainer.model.model.register_forward_hook(interrupt)
    trainer.add_callback(BeforeTheUpdate)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    for name, tensor in finished.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert {record["step"] for record in trainer.pair_records} == {1}


@pytest.mark.parametrize(
    "architecture, settings",
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8, "sliding_window": 4}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Phi", {}),
        ("Qwen2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_of_other_models(architecture, settings):
    """A softcap, a scale, a divisor, a bias: as the model's own logits have them."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(transformers, f"{architecture}Config")(
        **sizes,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).double().eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.randint(3, 53, (2, 7))
    labels = ids.clone()
    labels[:, :3] = IGNORE_INDEX
    expected = reference.sequence_logps(model(input_ids=ids, use_cache=False).logits, labels)
    install(model, 2**20)
    logps, counts = model(input_ids=ids, sequence_labels=labels)
    assert torch.allclose(logps, expected.to(logps.dtype), rtol=1e-9) and counts.tolist() == [4, 4]
    assert model(input_ids=ids).logits.shape == (2, 7, 53)


def test_settings_may_be_of_a_subclass_and_of_numpy(tmp_path):
    @dataclasses.dataclass
    class Settings(GAPOConfig):
        extra: "ImportedForTypesAlone | None" = None  # noqa: F821

    config = Settings(output_dir=str(tmp_path), use_cpu=np.bool_(True), padding_free=np.bool_(False))
    assert config.use_cpu is True and config.padding_free is False


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"beta": float("inf")}, "beta must be finite"),
        ({"gamma_beta_ratio": float("nan")}, "gamma_beta_ratio must be finite"),
        ({"rho": -0.1}, "rho must be finite and >= 0, got -0.1"),
        ({"label_smoothing": 0.5}, "label_smoothing must be finite and in"),
        ({"sft_weight": -1.0}, "sft_weight must be"),
        ({"rho": None}, "rho must be a number, got None"),
        ({"beta": "2"}, "beta must be a number, got '2'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be finite and >= 1"),
        ({"max_length": 1}, "max_length must be"),
        ({"max_length": 20, "max_prompt_length": 20}, "max_prompt_length must be finite and in .* max_length = 20, got 20"),
        ({"max_length": None, "max_prompt_length": 20}, "max_prompt_length must be"),
        ({"max_prompt_length": 0}, "max_prompt_length must be"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be finite and >= 1, got 0"),
        ({"adam_beta1": 1.5}, r"adam_beta1 must be finite and in \[0, 1\), got 1.5"),
        ({"adam_epsilon": -1.0}, "adam_epsilon must be finite and >= 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be"),
        ({"num_train_epochs": 0}, "num_train_epochs must be finite and > 0, with no max_steps, got 0"),
        ({"optim_args": "momentum"}, "optim_args must be key=value,key=value,..., got 'momentum'"),
        ({"lr_scheduler_kwargs": "text"}, "lr_scheduler_kwargs must be a mapping, got 'text'"),
        ({"gradient_checkpointing_kwargs": [1]}, r"gradient_checkpointing_kwargs must be a mapping, got \[1\]"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing, expected 0, got 0.1"),
        ({"probe": "margins"}, "probe must be one of loss, margin, got 'margins'"),
        ({"scope": "head"}, "scope must be"),
        ({"scope": -1}, "scope must be"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"max_steps": None}, "max_steps must be a number, got None"),
        ({"max_length": float("inf")}, "max_length must be a whole number, got inf"),
        ({"max_prompt_length": 2.5}, "max_prompt_length must be a whole number, got 2.5"),
        ({"max_prompt_length": "5"}, "max_prompt_length must be a number, got '5'"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size must be a whole number, got 2.5"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number"),
        ({"dataloader_num_workers": 0.5}, "dataloader_num_workers must be a whole number"),
        ({"pad_to_multiple_of": np.float32(1.5)}, "pad_to_multiple_of must be a whole number, got 1.5"),
        ({"share_backward": "false"}, "share_backward must be True or False, got 'false'"),
        ({"padding_free": 1}, "padding_free must be True or False, got 1"),
        ({"dataloader_drop_last": "false"}, "dataloader_drop_last must be True or False, got 'false'"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "prefetch_factor must be finite and >= 1, got 0"),
        ({"record_pairs": None}, "record_pairs must be True or False, got None"),
        ({"save_steps": 0}, "save_steps must be finite and > 0, got 0"),
        ({"save_steps": -1}, "save_steps must be finite and > 0, got -1"),
        ({"logging_steps": -5}, "logging_steps must be finite and > 0, got -5"),
        ({"logging_steps": "often"}, "logging_steps must be a number, got 'often'"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps must be finite and > 0, got 0"),
        ({"eval_strategy": IntervalStrategy.STEPS, "eval_steps": -1}, "eval_steps must be finite and > 0, got -1"),
        ({"save_total_limit": 0}, "save_total_limit must be finite and >= 1, got 0"),
        ({"save_total_limit": 1.5}, "save_total_limit must be a whole number, got 1.5"),
        ({"fp16_full_eval": True, "use_cpu": True}, "fp16_full_eval would leave the model's weights and buffers in 16 bits"),
        ({"bf16_full_eval": True, "use_cpu": True}, "bf16_full_eval would leave .* got bf16_full_eval=True"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        GAPOConfig(output_dir=str(tmp_path), **settings)


def test_numbers_of_numpy_are_numbers(tmp_path):
    settings = dict(learning_rate=np.float32(0.5), per_device_train_batch_size=np.int64(3), rho=np.float64(0.25))
    whole = dict(max_steps=np.int64(2), logging_steps=np.int32(2), save_steps=np.int64(3), eval_steps=np.int64(4))
    settings |= whole | dict(seed=np.int64(5), max_logits_bytes=1e9, max_length=np.float32(64))
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    read = json.loads(config.to_json_string())
    assert {name: read[name] for name in settings} == settings
    assert all(type(read[name]) is int for name in (*whole, "seed", "max_logits_bytes", "max_length"))
    with pytest.raises(ValueError, match="beta must be a number, got .*True"):
        GAPOConfig(output_dir=str(tmp_path), beta=np.True_)


def test_intervals_that_are_not_used_may_be_anything(tmp_path):
    never = dict(logging_strategy="no", save_strategy="no", eval_strategy="no", eval_steps=0, save_steps=0, logging_steps=0)
    GAPOConfig(output_dir=str(tmp_path), use_cpu=True, **never)
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", save_steps=0.5, logging_steps=3)
    assert (config.eval_steps, config.save_steps) == (3, 0.5)


def test_settings_from_a_command_line(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--beta", "2.5", "--gamma_beta_ratio", "0.1", "--scope", "1"]
    (config,) = HfArgumentParser(GAPOConfig).parse_args_into_dataclasses(arguments)
    assert config.gamma == pytest.approx(0.25) and config.scope == 1


def other_model(architecture, **settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(transformers, f"{architecture}Config")(**sizes, pad_token_id=0, **settings)
    return getattr(transformers, f"{architecture}ForCausalLM")(config)


def test_a_head_that_is_not_known_is_refused(tokenizer, tmp_path):
    """A model whose logits are not those of its hidden states and its head's weight."""
    model = tiny_model()
    forward = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = 1.01 * output.logits
            return output

    model.__class__ = Scaled
    with pytest.raises(NotImplementedError, match="Scaled does something to its logits that is not known here"):
        make_trainer(tokenizer, tmp_path, model)


def changed_behind_the_head(model, change):
    """The model, with logits that its hidden states and its head's weight do not account for."""
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    return model


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["16-bit weights", "autocast"])
@pytest.mark.parametrize(
    "change", [lambda x: 1.02 * x, lambda x: 30 * torch.tanh(x / 30)], ids=["scale", "softcap"]
)
def test_small_changes_of_logits_are_refused_whatever_the_rounding(tokenizer, tmp_path, settings, change):
    dtype = torch.float32 if settings else torch.bfloat16
    model = changed_behind_the_head(tiny_model(dtype), change)
    with pytest.raises(NotImplementedError, match="Changed does something to its logits that is not known here"):
        make_trainer(tokenizer, tmp_path, model, **settings)
    make_trainer(tokenizer, tmp_path, changed_behind_the_head(tiny_model(dtype), lambda x: x), **settings)


@pytest.mark.parametrize("dtype, settings", [(torch.bfloat16, {}), (torch.float32, {"bf16": True})], ids=["16 bits", "autocast"])
@pytest.mark.parametrize(
    "architecture, known",
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8, "num_key_value_heads": 1}),
        ("Cohere", {"logit_scale": 0.0625, "eos_token_id": 2}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Phi", {}),
        pytest.param("OPT", {"ffn_dim": 24}, marks=DRAWS_FOR_EVERY_LAYER),
    ],
)
def test_heads_of_other_models_in_16_bits_are_taken(tokenizer, tmp_path, architecture, known, dtype, settings):
    model = other_model(architecture, **known).to(dtype)
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    make_trainer(tokenizer, tmp_path, model, **settings)


def test_a_model_that_an_earlier_trainer_put_under_autocast_is_taken(tokenizer, tmp_path):
    model = tiny_model(torch.float32)
    for _ in range(2):
        make_trainer(tokenizer, tmp_path, model, bf16=True, max_steps=1).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3", "XLNet"])
def test_models_that_look_ahead_are_refused(tokenizer, tmp_path, architecture, dtype):
    if architecture == "Llama":
        model = tiny_model(dtype)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    elif architecture == "Gemma3":
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
        look_ahead = dict(num_key_value_heads=1, use_bidirectional_attention=True, initializer_range=0.3)
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(vocab_size=53, **sizes, **look_ahead))
    else:
        sizes = dict(vocab_size=53, d_model=16, n_layer=2, n_head=2, d_inner=24, initializer_range=0.3)
        model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
    with pytest.raises(NotImplementedError, match="expected a causal model, .* got changes up to .* from"):
        make_trainer(tokenizer, tmp_path, model.to(dtype))


def test_packed_rows_that_the_model_does_not_keep_apart_are_refused(tokenizer, tmp_path):
    model = other_model("Bloom", n_head=2, initializer_range=0.3)
    make_trainer(tokenizer, tmp_path, model)
    with pytest.raises(
        NotImplementedError, match="keeps packed sequences apart by position_ids.* pass padding_free=False"
    ):
        make_trainer(tokenizer, tmp_path, other_model("Bloom", n_head=2, initializer_range=0.3), padding_free=True)


def assert_a_radius_of_zero_leaves_no_gap(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    for rho, moved in ((0.0, False), (1.0, True)):
        trainer.anchor.rho = rho
        _, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert bool(out.gap.any()) is moved


def test_under_autocast_a_radius_of_zero_leaves_no_gap(tokenizer, tmp_path):
    """The anchor is that of the values which the forward computes with: norms and embeddings are not cast."""
    model = tiny_model(torch.float32, tie_word_embeddings=False)
    trainer = make_trainer(tokenizer, tmp_path, model, bf16=True, max_steps=1)
    trainer.train()
    assert_a_radius_of_zero_leaves_no_gap(trainer)


def test_mixed_precision_set_by_accelerate_reaches_the_anchor(tokenizer, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(True)
    trainer = make_trainer(tokenizer, tmp_path, tiny_model(torch.float32))
    assert not trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16"
    params = trainer.anchor.params
    before = [p.detach().clone() for p in params]
    with trainer.anchor.perturbed(grads=[torch.randn_like(p) for p in params]):  # whole steps, of few weights
        assert all(torch.equal(p != b, p.bfloat16() != b.bfloat16()) for p, b in zip(params, before))
        assert any((p != b).any() for p, b in zip(params, before))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="expected no mixed precision or bf16, got fp16"):
        make_trainer(tokenizer, tmp_path, tiny_model(torch.float32))
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not supported: .* expect a GPU, got the device cpu"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy is not supported"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches is not supported"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config.even_batches = False is not supported"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler = False is not supported: a resumed"),
        ({"ignore_data_skip": True}, "ignore_data_skip is not supported: a resumed run would begin its epoch anew"),
        ({"label_names": ["labels"]}, "label_names is not supported: evaluation has its own"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics is not supported"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end expects an eval_strategy that finds the best, got 'no'"),
        ({"save_strategy": "best"}, "save_strategy = 'best' expects an eval_strategy that finds the best, got 'no'"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
            "dataloader_drop_last expects a batch of pairs to train on, 7, got 6: nothing",
        ),
        ({"share_backward": True, "padding_free": True}, "share_backward needs .* got padding_free = True"),
        ({"share_backward": True, "gradient_checkpointing": True}, "got gradient_checkpointing = True"),
        ({"share_backward": True, "scope": 1}, "got scope = 1"),
        ({"share_backward": True, "use_liger_kernel": True}, "share_backward needs .* got use_liger_kernel = True"),
    ],
)
def test_settings_without_a_place_are_refused(tokenizer, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tokenizer, tmp_path, **settings)


def test_what_a_shared_backward_cannot_have_is_refused_before_the_first_step(tokenizer, tmp_path, monkeypatch):
    """Also where it is asked for past the arguments."""
    from accelerate.state import AcceleratorState

    refusal = "share_backward needs the probe's backward of a whole, padded batch, got "
    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match=refusal + "a model whose gradient_checkpointing is on"):
        make_trainer(tokenizer, tmp_path, model, share_backward=True)
    if hasattr(GAPOConfig, "ddp_static_graph"):
        with pytest.raises(ValueError, match=refusal + "ddp_static_graph = True"):
            make_trainer(tokenizer, tmp_path, share_backward=True, ddp_static_graph=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=refusal + "ACCELERATE_USE_FSDP = true"):
        make_trainer(tokenizer, tmp_path, share_backward=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    AcceleratorState._reset_state(True)
    try:
        make_trainer(tokenizer, tmp_path)
        with pytest.raises(ValueError, match=refusal + "dynamo_backend = 'AOT_EAGER'"):
            make_trainer(tokenizer, tmp_path, share_backward=True)
    finally:
        AcceleratorState._reset_state(True)


def test_the_metric_of_the_best_model_is_one_of_evaluations(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, metric_for_best_model="rewards/accuracies")
    measured = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert set(trainer.evaluation_names()) <= measured and "loss" in trainer.evaluation_names()
    make_trainer(tokenizer, tmp_path, metric_for_best_model="eval_loss")
    with pytest.raises(ValueError, match="got 'rewards/accuracis'; did you mean 'rewards/accuracies'"):
        make_trainer(tokenizer, tmp_path, metric_for_best_model="rewards/accuracis")
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    measured = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert set(trainer.evaluation_names()) <= measured and "two_loss" in trainer.evaluation_names()


def test_a_routers_auxiliary_loss_is_refused(tokenizer, tmp_path):
    sizes = dict(num_key_value_heads=1, num_local_experts=2, output_router_logits=True)
    make_trainer(tokenizer, tmp_path, other_model("Mixtral", router_aux_loss_coef=0.0, **sizes))
    with pytest.raises(ValueError, match="router_aux_loss_coef = 0.5: .* set model.config.output_router_logits = False"):
        make_trainer(tokenizer, tmp_path, other_model("Mixtral", router_aux_loss_coef=0.5, **sizes))


def test_pairs_given_to_evaluate_are_prepared(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    raw = flip_labels(made_up_pairs(6), 0.34, seed=0)
    assert trainer.evaluate(raw)["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert len(trainer.predict(raw).predictions) == 6


def test_a_tokenizer_without_padding_trains_the_same(tokenizer, tmp_path):
    """Those of Llama-3 and Mistral have none."""
    losses = []
    for padding in ("<pad>", None):
        tokenizer.pad_token = padding
        trainer = make_trainer(tokenizer, tmp_path, max_steps=2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_libraries_that_are_too_old_are_named(monkeypatch):
    found = {"transformers": "4.57.1", "accelerate": "1.15.0", "trl": "1.16.0", "peft": "0.21.2"}

    def version(package):
        if package not in found:
            raise versions.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(versions.metadata, "version", version)
    with pytest.raises(
        ImportError, match="transformers >= 5.17, got 4.57.1; datasets >= 4.7, got none. Run: pip install"
    ):
        versions.check()


def test_the_module_that_all_others_import_checks_the_libraries(monkeypatch):
    monkeypatch.setitem(versions.LEAST, "trl", "999.0")
    with pytest.raises(ImportError, match="gapo_trainer expects trl >= 999.0, got"):
        importlib.reload(sys.modules["gapo_trainer.config"])


def test_the_oldest_libraries_are_those_that_are_tested():
    """The bounds of setup.py, of the check at import, and of `make test-oldest`."""
    root = Path(__file__).parents[2]
    asked = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', re.search("^TRAIN = .*", (root / "setup.py").read_text(), re.M)[0]))
    tested = dict(re.findall("^([a-z]+)==([0-9.]+)$", (root / "constraints-oldest.txt").read_text(), re.M))
    assert asked == versions.LEAST
    assert {name: tested[name].removesuffix(".0") for name in asked} == asked


def test_what_is_not_there_says_so(tokenizer, tmp_path):
    odd = tiny_model()
    odd.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match="padding_free expects attention that keeps packed sequences apart"):
        make_trainer(tokenizer, tmp_path, odd, padding_free=True)
    with pytest.raises(TypeError, match="output head, got LlamaModel"):
        make_trainer(tokenizer, tmp_path, tiny_model().model)
    with pytest.raises(TypeError, match="output head, got str"):
        make_trainer(tokenizer, tmp_path, "gpt2")
    with pytest.raises(TypeError, match="expected one dataset to train on, got dict of train, test"):
        config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True)
        pairs = {"train": made_up_pairs(3), "test": made_up_pairs(3)}
        GAPOTrainer(tiny_model(), config, train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(TypeError, match="expected a GAPOConfig as args, got TrainingArguments"):
        GAPOTrainer(tiny_model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="data_collator or a tokenizer"):
        GAPOTrainer(tiny_model(), GAPOConfig(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    "architecture, settings",
    [
        ("Starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}),
        ("Bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5, "n_head": 2}),
        ("GPTNeoX", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_dropout_of_other_models_is_off(tokenizer, tmp_path, architecture, settings):
    trainer = make_trainer(tokenizer, tmp_path, other_model(architecture, **settings), max_steps=1)
    trainer.train()
    assert len(trainer.pair_records) == 3


def test_noise_that_cannot_be_switched_off_is_refused(tokenizer, tmp_path):
    model = other_model("Falcon", hidden_dropout=0.5)  # read from the configuration
    with pytest.raises(ValueError, match="draws no random numbers, got dropout or noise in FalconForCausalLM: set it to 0"):
        make_trainer(tokenizer, tmp_path, model)
    model.config.hidden_dropout = 0.0
    make_trainer(tokenizer, tmp_path, model)


def test_reentrant_checkpointing_of_the_model_is_refused(tokenizer, tmp_path):
    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="must have use_reentrant=False"):
        make_trainer(tokenizer, tmp_path, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = make_trainer(tokenizer, tmp_path, model, max_steps=1)
    trainer.train()
    plain = make_trainer(tokenizer, tmp_path, max_steps=1)
    plain.train()
    assert trainer.pair_records == plain.pair_records


def test_ligers_head_does_not_replace_ours(tokenizer, tmp_path, monkeypatch):
    """Liger's kernels take their places when training begins; stood in for here, for they need a GPU."""

    def apply(model, config):
        assert config["rope"] is False
        if config.get("fused_linear_cross_entropy", True):
            model.forward = lambda *args, **kwargs: pytest.fail("the head is Liger's")

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    monkeypatch.setattr("gapo_trainer.trainer.WITHOUT_TRITON", ())
    settings = dict(use_liger_kernel=True, max_steps=1, gradient_checkpointing=True)
    make_trainer(tokenizer, tmp_path, liger_kernel_config={"rope": False}, **settings).train()
    with pytest.raises(ValueError, match="fused_linear_cross_entropy is not supported: the loss has a fused head"):
        make_trainer(tokenizer, tmp_path, liger_kernel_config={"fused_linear_cross_entropy": True}, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}], ids=str
)
def test_ligers_kernels_are_refused_without_checkpointing(tokenizer, tmp_path, monkeypatch, settings):
    """Their backward writes over its own saved tensors: the second one over the same graph would be wrong."""
    monkeypatch.setattr("gapo_trainer.trainer.WITHOUT_TRITON", ())
    with pytest.raises(ValueError, match="they saved for the backward, and the step walks one graph twice; set gradient_ch"):
        make_trainer(tokenizer, tmp_path, use_liger_kernel=True, **settings)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_parallelism_other_than_of_data_is_refused(kind):
    _refuse_parallelism(None)
    _refuse_parallelism(ParallelismConfig(dp_shard_size=2))
    with pytest.raises(NotImplementedError, match=f"parallelism_config.{kind}_size = 2"):
        _refuse_parallelism(ParallelismConfig(**{f"{kind}_size": 2}))


def test_a_collator_that_leaves_out_what_is_read_is_refused(tokenizer, tmp_path):
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True)
    options = dict(train_dataset=made_up_pairs(3), processing_class=tokenizer)
    with pytest.raises(ValueError, match="data_collator that returns input_ids, labels, index, is_flipped, .* got .*mask"):
        GAPOTrainer(tiny_model(), config, data_collator=DataCollatorForPreference(0), **options)
    GAPOTrainer(tiny_model(), config, data_collator=PreferenceCollator(0), **options)


@pytest.mark.parametrize("packs", [False, True])
def test_a_collator_that_pads_otherwise_than_the_settings_is_refused(tokenizer, tmp_path, packs):
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, padding_free=not packs)
    collator = PreferenceCollator(0, padding_free=packs)
    options = dict(train_dataset=made_up_pairs(2), processing_class=tokenizer, data_collator=collator)
    with pytest.raises(ValueError, match=f"padding_free = {not packs} expects .* of the data_collator, got input_ids"):
        GAPOTrainer(tiny_model(), config, **options)


@pytest.mark.parametrize("given", [{"preserve_rng_state": False}, '{"preserve_rng_state": false}'], ids=["dict", "JSON"])
@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_checkpointing_without_a_word_on_reentrance_is_not_reentrant(tokenizer, tmp_path, name, given):
    if not hasattr(GAPOConfig, name):
        pytest.skip(f"this transformers has no {name}")
    before = copy.deepcopy(given)
    trainer = make_trainer(tokenizer, tmp_path, gradient_checkpointing=True, max_steps=1, **{name: given})
    assert getattr(trainer.args, name) == {"preserve_rng_state": False, "use_reentrant": False} and given == before
    trainer.train()
    again = GAPOConfig(**(trainer.args.to_dict() | {"use_cpu": True}))
    assert getattr(again, name) == getattr(trainer.args, name)
    with pytest.raises(ValueError, match="_kwargs must have use_reentrant=False"):
        GAPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: '{"use_reentrant": true}'})


def test_float16_weights_are_refused(tokenizer, tmp_path):
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="float32 or bfloat16, got float16"):
        GAPOTrainer(tiny_model(torch.float16), config, train_dataset=made_up_pairs(2), processing_class=tokenizer)


def test_sharding_asked_of_the_launcher_that_does_not_happen_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="^ACCELERATE_USE_FSDP = true expects .* nothing would be sharded"):
        GAPOTrainer(tiny_model(), config, train_dataset=made_up_pairs(2), processing_class=tokenizer)


def test_an_fsdp_that_was_refused_leaves_no_trace_in_the_process(tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with pytest.raises(ValueError, match="^fsdp = .* expects accelerators and several processes, got .* nothing would be"):
        make_trainer(tokenizer, tmp_path, fsdp=True)
    assert "ACCELERATE_USE_FSDP" not in os.environ
    make_trainer(tokenizer, tmp_path)


def test_a_static_graph_with_accumulation_is_refused(tokenizer, tmp_path):
    if not hasattr(GAPOConfig, "ddp_static_graph"):
        pytest.skip("transformers has no ddp_static_graph yet")
    settings = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", ddp_static_graph=True)
    for steps in (1, 2):
        config = GAPOConfig(gradient_accumulation_steps=steps, **settings)
        refused = pytest.raises(ValueError, match="ddp_static_graph with gradient_accumulation_steps > 1 is not supported")
        with refused if steps > 1 else nullcontext():
            _refuse_what_has_no_place(_OfTwo(config), tiny_model(), {})


class _OfTwo:
    """The arguments of one of two processes."""

    world_size = 2

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)


def test_metrics_of_ones_own_are_refused(tokenizer, tmp_path):
    config = GAPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"^{name} is not supported: evaluation has its own metrics; use a callback"):
            GAPOTrainer(tiny_model(), config, train_dataset=made_up_pairs(2), processing_class=tokenizer, **{name: max})


def test_evaluation_counts_every_pair_whatever_training_drops(tokenizer, tmp_path):
    found = []
    for settings in ({}, {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}):
        trainer = make_trainer(tokenizer, tmp_path, tiny_model(), **settings)
        found.append([trainer.evaluate()["eval_loss"], trainer.evaluate(trainer.train_dataset[:1])["eval_loss"]])
    assert found[1] == pytest.approx(found[0]) and trainer.args.dataloader_drop_last
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"pair 0: chosen_ids must be token ids of the model, in \[0, .* got 9999"):
            use([trainer.train_dataset[0] | {"chosen_ids": [9999]}])
