"""GAPO in transformers.Trainer: a collator and compute_loss of your own, nothing else changes.

python examples/transformers_trainer.py [--model NAME_OR_PATH]
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from common import arguments, collate, preference_pairs, tokenized
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps
from decoder import load


class PreferenceTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # ours is a micro-batch's mean: Trainer divides it by their number
        assert self.args.world_size == 1  # model.model below bypasses DDP's forward; gapo_trainer runs on several
        compute_dtype = torch.bfloat16 if self.args.bf16 else None  # what autocast computes with
        self.anchor = GeometricAnchor.from_model(self.model, rho=0.05, compute_dtype=compute_dtype)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model = self.accelerator.unwrap_model(model)

        def logps():
            hidden = model.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
            return linear_sequence_logps(hidden, model.lm_head.weight, inputs["labels"], return_counts=True)

        with self.accelerator.autocast():  # which accelerate enters in the outermost model's forward alone
            # Evaluation has no anchor: its loss is that of the margin itself.
            out = gapo_step(logps, self.anchor if torch.is_grad_enabled() else None, beta=2.0, gamma=0.5)
        self.log({"gap": out.gap.mean().item(), "margin": out.margin.mean().item()})
        return (out.loss, {"margin": out.margin}) if return_outputs else out.loss


def main(argv=None):
    args = arguments(argv)
    model, tokenizer = load(args.model)
    with tempfile.TemporaryDirectory() as folder:  # your output_dir
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=8,
            remove_unused_columns=False,  # the collator reads the pairs' own columns
            gradient_checkpointing_kwargs={"use_reentrant": False},  # the kept graph is walked twice
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        pairs, pad = tokenized(preference_pairs(), tokenizer), tokenizer.pad_token_id
        trainer = PreferenceTrainer(model, options, train_dataset=pairs, data_collator=lambda rows: collate(rows, pad))
        trainer.train()
    return trainer.model, trainer.state.log_history


if __name__ == "__main__":
    main()
