"""What each of two processes runs: five updates of `GAPOTrainer` under DDP or FSDP2, on the CPU over gloo."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "python"), str(Path(__file__).parent)]


def run(rank, world, folder, port, kind, settings):
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **addresses)
    torch.set_num_threads(1)
    evaluate_first, resumed = (settings.pop(name, False) for name in ("evaluate_first", "resumed"))
    checkpoint = None
    if resumed:
        checkpoint = cut_off(make_trainer(folder, world, kind, settings | dict(save_strategy="steps", save_steps=2)))
    trainer = make_trainer(folder, world, kind, settings)
    if evaluate_first and kind == "fsdp2":
        try:
            trainer.evaluate()
        except RuntimeError as error:
            assert "expected train() before evaluate()" in str(error)
        else:
            raise AssertionError("evaluated a model that is not sharded yet")
    elif evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    if kind == "fsdp2":
        assert "DTensor" in type(trainer.anchor.params[0]).__name__, "nothing was sharded"
    assert kind != "ddp" or len(trainer.anchor.replicas) == 1, "the anchor does not know of DDP, which broadcasts buffers"
    weights = {
        name.replace(".default", ""): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        if p.requires_grad
    }
    metrics = trainer.evaluate()
    trainer.save_model(os.path.join(folder, "model"))
    if rank == 0:
        names = ("loss", "gapo/gap", "grad_norm", "rewards/chosen", "gapo/gap_flipped", "gapo/applied_norm_ratio")
        logged = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
        evaluated = {name: metrics[name] for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")}
        (file,) = Path(folder, "model").glob("*.safetensors")
        saved = load_file(file)
        torch.save((logged, weights, evaluated, saved), os.path.join(folder, "found.pt"))
    if world > 1:
        torch.distributed.barrier()
        os._exit(0)  # without the teardown, in which gloo's threads abort one process in some dozens


def cut_off(trainer):
    """Trains for three updates of five; returns the checkpoint of the second."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 3
    return os.path.join(trainer.args.output_dir, "checkpoint-2")


def make_trainer(folder, world, kind, settings):
    from accelerate.utils import DistributedType
    from conftest import made_up_pairs, tiny_model, tiny_tokenizer
    from peft import LoraConfig

    from gapo_trainer.config import GAPOConfig
    from gapo_trainer.preferences import flip_labels, tokenize_pairs
    from gapo_trainer.trainer import GAPOTrainer

    settings = dict(settings)
    if kind == "fsdp2":
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        wrap["state_dict_type"] = settings.pop("state_dict_type", "FULL_STATE_DICT")
        settings = settings | {"fsdp": True, "fsdp_config": {"fsdp_version": 2, **wrap}}
    tied, inert, lora = settings.pop("tied", True), settings.pop("inert", False), None
    if settings.pop("lora", False):
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    config = GAPOConfig(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=1e-2,
        rho=0.3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **{"save_strategy": "no", "optim": "sgd"} | settings,
    )
    if kind == "fsdp2":  # accelerate shards on accelerators only: this takes the CPU for one
        config.distributed_state.distributed_type = DistributedType.MULTI_GPU
    tokenizer, pairs = tiny_tokenizer(), flip_labels(made_up_pairs(40), 0.3, seed=0)
    if inert:
        pairs = [dict(row) for row in tokenize_pairs(pairs, tokenizer, 100)]
        for number in (0, 5, 6, 12):
            pairs[number]["rejected_ids"] = []
    options = dict(train_dataset=pairs, eval_dataset=pairs[:7], processing_class=tokenizer, peft_config=lora)
    return GAPOTrainer(tiny_model(torch.float64, tie_word_embeddings=tied), config, **options)
