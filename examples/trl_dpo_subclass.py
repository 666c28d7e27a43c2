"""GAPO inside TRL's DPOTrainer: its data preparation, collator and arguments, with `gapo_step` for the loss.

    python examples/trl_dpo_subclass.py [--model NAME_OR_PATH]

For code that is built on DPOTrainer already; otherwise see trl_trainer.py. Written for TRL 1.16.
"""

import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from common import arguments, preference_pairs
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps
from decoder import load


class GAPODPOTrainer(DPOTrainer):
    loss_is_scaled_for_ga = False  # ours is the mean over a micro-batch: Trainer divides it by their number

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert self.args.world_size == 1  # model.model below bypasses DDP's forward; GAPOTrainer runs on several
        compute_dtype = torch.bfloat16 if self.args.bf16 else None  # what autocast computes with
        self.anchor = GeometricAnchor.from_model(self.model, rho=0.05, compute_dtype=compute_dtype)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset  # GAPO has no reference model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model = self.accelerator.unwrap_model(model)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)

        def logps():
            hidden = model.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
            return linear_sequence_logps(hidden, model.lm_head.weight, labels, return_counts=True)

        with self.accelerator.autocast():  # which accelerate enters in the outermost model's forward alone
            out = gapo_step(logps, self.anchor if torch.is_grad_enabled() else None, beta=self.args.beta, gamma=0.5)
        self._metrics["train" if model.training else "eval"]["gap"].append(out.gap.mean().item())
        return (out.loss, out) if return_outputs else out.loss


def main(argv=None):
    args = arguments(argv)
    model, tokenizer = load(args.model)
    steps = dict(max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=8)
    logs = dict(logging_steps=1, save_strategy="no", report_to="none", bf16=torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:  # your output_dir
        # precompute_ref_log_probs: no reference model is loaded, and above none is asked.
        config = DPOConfig(folder, beta=2.0, precompute_ref_log_probs=True, **steps, **logs)
        data = Dataset.from_list(preference_pairs())
        trainer = GAPODPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    return trainer.model, trainer.state.log_history


if __name__ == "__main__":
    main()
