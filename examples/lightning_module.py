"""GAPO in Lightning: `training_step` returns the loss, Lightning does the rest.

python examples/lightning_module.py [--model NAME_OR_PATH]
"""

import lightning
import torch

from common import arguments, collate, preference_pairs, tokenized
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps
from decoder import load


class GAPOModule(lightning.LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr
        self.anchor, self.restored, self.history = None, {}, []

    def on_fit_start(self):  # the strategy has moved or sharded the parameters by now
        self.anchor = GeometricAnchor.from_model(self.model, rho=0.05)
        if self.restored:
            self.anchor.load_state_dict(self.restored)

    def training_step(self, batch, batch_index):
        def logps():
            hidden = self.model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
            return linear_sequence_logps(hidden, self.model.lm_head.weight, batch["labels"], return_counts=True)

        out = gapo_step(logps, self.anchor, beta=2.0, gamma=0.5)
        self.history.append({"loss": out.loss.item(), "gap": out.gap.mean().item()})
        self.log_dict(self.history[-1], prog_bar=True, batch_size=len(out.gap))
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint):  # the anchor's random numbers go on where they were
        checkpoint["anchor"] = self.anchor.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.restored = checkpoint["anchor"]


def main(argv=None):
    args = arguments(argv)
    model, tokenizer = load(args.model)
    model.train()  # Lightning leaves a module in the mode in which it finds it
    rows = tokenized(preference_pairs(), tokenizer)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=lambda b: collate(b, tokenizer.pad_token_id))
    module = GAPOModule(model, args.lr)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_steps=args.steps, max_epochs=-1, devices=1, gradient_clip_val=1.0, **quiet)
    trainer.fit(module, loader)
    return module.model, module.history


if __name__ == "__main__":
    main()
