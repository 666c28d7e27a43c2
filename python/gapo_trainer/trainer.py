"""`GAPOTrainer`: transformers' Trainer with the loss, the evaluation and the log of GAPO."""

import torch
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from gapo_kernels import GeometricAnchor, fused_gapo_loss, gapo_step, sequence_logps

from .preferences import PreferenceCollator

logger = logging.get_logger(__name__)


class GAPOTrainer(Trainer):
    """Trains a causal language model of transformers with geometric anchor preference optimization.

    model: a PreTrainedModel with a backbone and an output head; its dropout is switched off.
    args: GAPOConfig. train_dataset, eval_dataset: rows as `tokenize_pairs` returns them. The other arguments are
    Trainer's; data_collator defaults to `PreferenceCollator`, with the padding token of processing_class.

    One anchor is made per micro-batch, from that micro-batch. With gradient accumulation the gradient of an update is
    the mean over all its pairs: micro-batches count by their pairs, also when the last of an epoch is smaller.

    Evaluation has no anchor: its loss is that of the margin itself (SimPO), its accuracy the share of pairs with a
    positive margin.

    Raises NotImplementedError for distributed training and for models that scale their logits, TypeError for a model
    that is no PreTrainedModel with an output head, ValueError without collator and tokenizer.
    """

    # compute_loss divides by the pairs of the whole update itself, which is exact for uneven micro-batches too.
    loss_is_scaled_for_ga = True

    def __init__(self, model, args, *, data_collator=None, processing_class=None, **kwargs):
        if args.world_size > 1:
            raise NotImplementedError(
                f"GAPOTrainer runs in one process so far, got world_size = {args.world_size}: the anchor's gradient is "
                "not averaged across processes yet"
            )
        if args.n_gpu > 1:
            # nn.DataParallel would cut the (2B, T) batch between chosen and rejected rows. Trainer resets the number
            # in the same way for models that are spread over several GPUs.
            logger.warning(f"using one of {args.n_gpu} visible GPUs")
            args._n_gpu = 1
        if data_collator is None:
            if processing_class is None:
                raise ValueError("expected a data_collator or a tokenizer as processing_class, got neither")
            data_collator = PreferenceCollator(processing_class.pad_token_id)
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise TypeError(f"expected a PreTrainedModel with an output head, got {type(model).__name__}")
        _refuse_scaled_logits(model.config.get_text_config())
        _disable_dropout(model)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        compute_dtype = torch.bfloat16 if args.bf16 else None
        self.anchor = GeometricAnchor.from_model(
            self.model,
            scope=args.scope,
            rho=args.rho,
            geometry=args.geometry,
            direction=args.direction,
            rounding=args.rounding,
            compute_dtype=compute_dtype,
            seed=args.seed,
        )
        self._buffer = []  # (step, values (6, B), marks (3, B)) of micro-batches not logged yet, on their device
        self._records = []
        self._evaluated = []

    # ---- Training ----

    def train(self, *args, **kwargs):
        """Trainer's train; the pair records begin anew."""
        self._buffer, self._records = [], []
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one update, and in place of Trainer's number of tokens their number of pairs."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["index"]) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch of B pairs, scaled by B / num_items_in_batch (pairs in the whole update).

        Returns a scalar tensor, or (loss, GAPOOutput) with return_outputs. model is ignored but for its parameters
        being those of self.model.
        """
        args = self.args
        out = gapo_step(
            lambda: self._logps(inputs),
            self.anchor,
            beta=args.beta,
            gamma=args.gamma,
            probe=args.probe,
            label_smoothing=args.label_smoothing,
            loss_type=args.loss_type,
            sft_weight=args.sft_weight,
        )
        self._remember(inputs, out)
        pairs = len(inputs["index"])
        loss = out.loss if num_items_in_batch is None else out.loss * (pairs / num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def _logps(self, inputs):
        """Length-normalised sequence log-probs (2B,) under the current weights, and token counts (2B,) int64."""
        return sequence_logps(
            self._completion_logits(inputs),
            inputs["completion_labels"],
            cu_seqlens=inputs["cu_seqlens"],
            shift=False,
            return_counts=True,
        )

    def _completion_logits(self, inputs):
        """Logits (N, V) of the N positions that predict a completion token: no other row reaches the head."""
        model = self.accelerator.unwrap_model(self.model)
        # Entered anew for each forward: autocast keeps the weights it has cast until it is left, and the forward under
        # the anchor would read those of the forward before it.
        with self.accelerator.autocast():
            # No attention mask: with causal attention and padding on the right no completion token sees padding, and
            # without a mask the attention takes its fast path.
            hidden = model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1).index_select(0, inputs["completion_positions"])
            logits = model.get_output_embeddings()(hidden)
            softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    # ---- The log ----

    @property
    def pair_records(self):
        """list of dicts, one per pair of each finished update, in the order of training: step (from 1), index (the
        pair's position in the dataset), gap, weight, margin, anchor_margin (float) and is_flipped (bool).

        Empty unless args.record_pairs.
        """
        self._read_back()
        return [record for record in self._records if record["step"] <= self.state.global_step]

    def log(self, logs, start_time=None):
        """Trainer's log; a training entry also gets the means since the last one: rewards/, logps/ and gapo/."""
        if "loss" in logs:
            logs.update(self._read_back())
        super().log(logs, start_time)

    def _remember(self, inputs, out):
        # Stays on the device until the log is due: reading it here would stall a GPU at every step.
        values = [out.gap, out.weight, out.margin, out.anchor_margin, out.chosen_logps, out.rejected_logps]
        marks = [out.valid.long(), inputs["is_flipped"].long(), inputs["index"]]
        self._buffer.append((self.state.global_step + 1, torch.stack(values), torch.stack(marks)))

    def _read_back(self):
        """Empty the buffer into the records; returns the means over its pairs for the log."""
        if not self._buffer:
            return {}
        steps, values, marks = zip(*self._buffer)
        self._buffer = []
        gap, weight, margin, anchor_margin, chosen, rejected = torch.cat(values, 1).cpu().double()
        valid, flipped, index = torch.cat(marks, 1).cpu()
        valid, flipped = valid.bool(), flipped.bool()
        if self.args.record_pairs:
            columns = {
                "step": [step for step, micro_batch in zip(steps, marks) for _ in range(micro_batch.shape[1])],
                "index": index.tolist(),
                "gap": gap.tolist(),
                "weight": weight.tolist(),
                "margin": margin.tolist(),
                "anchor_margin": anchor_margin.tolist(),
                "is_flipped": flipped.tolist(),
            }
            self._records += [dict(zip(columns, row)) for row in zip(*columns.values())]
        if not valid.any():
            return {}
        means = {
            "rewards/margins": margin[valid],
            "rewards/accuracies": (margin[valid] > 0).double(),
            "logps/chosen": chosen[valid],
            "logps/rejected": rejected[valid],
            "gapo/gap": gap[valid],
            "gapo/weight": weight[valid],
            "gapo/anchor_margin": anchor_margin[valid],
        }
        if flipped.any():
            for name, group in (("clean", valid & ~flipped), ("flipped", valid & flipped)):
                if group.any():
                    means |= {f"gapo/gap_{name}": gap[group], f"gapo/weight_{name}": weight[group]}
        return {name: values.mean().item() for name, values in means.items()}

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one batch without an anchor; returns (loss, None, None), or with prediction_loss_only=False
        (loss, margins (B,), None)."""
        args = self.args
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            out = fused_gapo_loss(
                self._completion_logits(inputs),
                inputs["completion_labels"],
                cu_seqlens=inputs["cu_seqlens"],
                shift=False,
                beta=args.beta,
                gamma=args.gamma,
                label_smoothing=args.label_smoothing,
                loss_type=args.loss_type,
                sft_weight=args.sft_weight,
            )
        pairs = len(inputs["index"])
        self._evaluated.append((pairs, out))
        return out.loss, None if prediction_loss_only else out.margin, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's loop; its metrics get means over pairs, where Trainer takes means over batches."""
        self._evaluated = []
        result = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        evaluated, self._evaluated = self._evaluated, []
        if evaluated:
            counts = torch.tensor([pairs for pairs, _ in evaluated], dtype=torch.float64)
            losses = torch.stack([out.loss for _, out in evaluated]).cpu().double()
            margins, chosen, rejected = (
                torch.cat([getattr(out, name) for _, out in evaluated]).cpu().double()
                for name in ("margin", "chosen_logps", "rejected_logps")
            )
            metrics = {
                "loss": (losses * counts).sum() / counts.sum(),
                "rewards/margins": margins.mean(),
                "rewards/accuracies": (margins > 0).double().mean(),
                "logps/chosen": chosen.mean(),
                "logps/rejected": rejected.mean(),
            }
            result.metrics.update({f"{metric_key_prefix}_{name}": value.item() for name, value in metrics.items()})
        return result


def _disable_dropout(model):
    """The anchor's gap is the difference of two forwards; dropout would make it noise, also in attention."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Attention of transformers reads its dropout from a float, not from a module.
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _refuse_scaled_logits(config):
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise NotImplementedError(
                f"{config.model_type} multiplies its logits ({name} = {getattr(config, name)}), which GAPOTrainer does "
                "not do yet; expected a model that does not"
            )
