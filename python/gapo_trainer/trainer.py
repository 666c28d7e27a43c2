"""`GAPOTrainer`: transformers' Trainer, on TRL's preference data, with the loss, evaluation and log of GAPO."""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, is_peft_model, parse_flag_from_env
from transformers import PreTrainedModel, Trainer
from transformers.training_args import ParallelMode
from transformers.utils import logging

from gapo_kernels import GeometricAnchor, distributed, gapo_objective, gapo_step
from gapo_kernels.layout import align_targets, sequence_count, sequence_of_rows

from . import metrics
from .adapters import warn_of_zeros, with_adapters
from .checks import check_logps, check_shared_backward
from .config import GAPOConfig, nearest
from .forward import MARK, install
from .preferences import IGNORE_INDEX, PreferenceCollator, are_marked, prepare_pairs
from .storage import write_json

logger = logging.get_logger(__name__)

ANCHOR_FILE = "anchor.json"
LEAST_RATE_16_BIT = 1e-5  # half a unit in the last place of a bfloat16 weight of 0.005
INPUTS = ("input_ids", "position_ids", "cu_seqlens")
SFT_SHARE = "sft_share"  # by which a micro-batch's NLL counts in its update's
WITHOUT_TRITON = ("cpu", "mps")
PACKED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
OF_METRICS = ("compute_metrics", "preprocess_logits_for_metrics")
OF_METRICS_TOO = ("label_names", "include_for_metrics", "batch_eval_metrics")  # arguments
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


class GAPOTrainer(Trainer):
    """Trains a causal language model of transformers with geometric anchor preference optimization.

    model: a PreTrainedModel with a linear LM head, or a PeftModel of one; its dropout is switched off.
    args: GAPOConfig.
    train_dataset, eval_dataset: preference pairs, a datasets.Dataset or a list of dicts, as TRL takes them: chosen and
        rejected, and prompt unless those contain it, all text or all lists of messages. A column is_flipped marks pairs
        known to be wrong, for the log. Rows that `tokenize_pairs` returned are taken as they are.
    processing_class: the tokenizer. data_collator: defaults to `PreferenceCollator`.
    peft_config: makes a PeftModel of the model; only the adapters are then moved by the anchor, and trained.
    The other arguments are Trainer's.

    One anchor is made per micro-batch, from that micro-batch on all processes, so that accumulation is not the same as a
    larger batch. With it the gradient of an update is the mean over all its pairs: micro-batches count by their pairs,
    also when the last of an epoch is smaller; pairs that accelerate repeats there, lest a process has none, count again.
    The NLL of sft_weight is the mean over all chosen tokens of the update, on all processes.

    Evaluation has no anchor: its loss is that of the margin itself (SimPO), its accuracy the share of pairs with a
    positive margin. No reference model is ever made.

    Runs on one device, with DDP, and with FSDP2. Raises NotImplementedError for other ways to distribute; TypeError
    for a model that is no PreTrainedModel with a linear LM head, or whose head carries an adapter or is quantised;
    ValueError without collator and tokenizer.
    """

    # compute_loss divides by the pairs of the whole update itself, which is exact for uneven micro-batches too.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model,
        args,
        *,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        if not isinstance(args, GAPOConfig):
            raise TypeError(f"expected a GAPOConfig as args, got {type(args).__name__}")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"expected a PreTrainedModel with an output head, got {type(model).__name__}")
        if args.n_gpu > 1:
            # nn.DataParallel would cut the (2B, T) batch between chosen and rejected rows. Trainer resets the number
            # in the same way for models that are spread over several GPUs.
            logger.warning(f"using one of {args.n_gpu} visible GPUs")
            args._n_gpu = 1
        _refuse_what_has_no_place(args, model, kwargs)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("expected a data_collator or a tokenizer as processing_class, got neither")
            # No forward sees padding, so that of Llama and Mistral, which have no token for it, may be any other.
            padding, end = processing_class.pad_token_id, processing_class.eos_token_id
            data_collator = PreferenceCollator(
                end if padding is None else padding,
                pad_to_multiple_of=args.pad_to_multiple_of,
                padding_free=args.padding_free,
            )
        model = with_adapters(model, peft_config, args.seed)
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"expected adapters on the model's weights, LoRA say, got {type(model.active_peft_config).__name__}: the "
                "anchor has no weights to move, and virtual tokens have no place in the rows of log-probs"
            )
        base = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
            raise TypeError(f"expected a PreTrainedModel with an output head, got {type(base).__name__}")
        if args.padding_free and base.config._attn_implementation not in PACKED_ATTENTION:
            raise ValueError(
                f"padding_free expects attention that keeps packed sequences apart, one of {', '.join(PACKED_ATTENTION)}, "
                f"got attn_implementation = {base.config._attn_implementation!r}"
            )
        if isinstance(train_dataset, dict):
            raise TypeError(f"expected one dataset to train on, got {type(train_dataset).__name__} of {', '.join(train_dataset)}")
        if any(parameter.dtype == torch.float16 for parameter in base.parameters()):
            raise ValueError("expected weights in float32 or bfloat16, got float16: the probe's gradient has no loss scaling")
        text = base.config.get_text_config()
        if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0):
            raise ValueError(
                "expected no auxiliary loss of the experts' router, got router_aux_loss_coef = "
                f"{text.router_aux_loss_coef}: the loss is GAPO's alone; set model.config.output_router_logits = False"
            )
        install(base, args.max_logits_bytes)
        _disable_dropout(model)
        if any(map(_is_reentrant, base.modules())):
            raise ValueError("gradient checkpointing must have use_reentrant=False: the step walks one graph twice, got True")
        self._vocabulary = base.get_input_embeddings().weight.shape[0]
        train_dataset, eval_dataset = (
            prepare_pairs(pairs, processing_class, args, self._vocabulary) for pairs in (train_dataset, eval_dataset)
        )
        if train_dataset is not None:
            _check_batch(data_collator([train_dataset[0]]), args.padding_free)
            together = args.train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
            if args.dataloader_drop_last and len(train_dataset) < together:
                raise ValueError(
                    f"dataloader_drop_last expects a batch of pairs to train on, {together}, got {len(train_dataset)}: "
                    "nothing would be trained"
                )
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            # Trainer refuses it later: accelerate has noted it for the whole process by then.
            _refuse_fsdp(f"fsdp = {args.fsdp!r}", args.parallel_mode.value)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # what transformers 5.17 reads in the place of loss_is_scaled_for_ga
        if self.accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"expected no mixed precision or bf16, got {self.accelerator.mixed_precision}: the probe's gradient has no "
                "loss scaling"
            )
        backend = self.accelerator.state.dynamo_plugin.backend.value  # which the launcher may set, too
        _refuse_for_sharing([f"dynamo_backend = {backend!r}"] if args.share_backward and backend != "NO" else [])
        # accelerate's launcher asks for it past the arguments.
        fsdp = f"fsdp = {args.fsdp!r}" if args.fsdp else ""
        fsdp = fsdp or ("ACCELERATE_USE_FSDP = true" if parse_flag_from_env("ACCELERATE_USE_FSDP") else "")
        if fsdp and self.accelerator.distributed_type != DistributedType.FSDP:
            _refuse_fsdp(fsdp, self.accelerator.distributed_type.value)
        if self.accelerator.distributed_type not in DISTRIBUTED and not self._fsdp2:
            raise NotImplementedError(
                f"GAPOTrainer runs on one device, with DDP and with FSDP2 (fsdp_version: 2), got "
                f"{self.accelerator.distributed_type.value}"
            )
        _refuse_parallelism(self.accelerator.parallelism_config)
        self.anchor = self._make_anchor()
        warn_of_zeros(model, args.geometry)
        if args.learning_rate < LEAST_RATE_16_BIT and any(p.dtype == torch.bfloat16 for p in self.anchor.params):
            warnings.warn(
                f"updates of learning_rate = {args.learning_rate} are rounded away in bfloat16 weights: load the model with "
                "dtype=torch.float32, and train with bf16=True",
                stacklevel=2,
            )
        self._before = None
        with self.accelerator.autocast():
            check_logps(self.accelerator.unwrap_model(self.model), base, args.padding_free)
            if args.share_backward:
                check_shared_backward(self.accelerator.unwrap_model(self.model), self.anchor)
        self._record = metrics.TrainingRecord(args.record_pairs)
        self._are_marked = are_marked(train_dataset)
        self._evaluated = []
        best, names = args.metric_for_best_model, self.evaluation_names()
        if best is not None and best.removeprefix("eval_") not in names:
            near = nearest(best.removeprefix("eval_"), names)
            raise ValueError(f"metric_for_best_model must be one of {', '.join(names)}, got {best!r}{near}")

    @property
    def _fsdp2(self):
        return self.accelerator.distributed_type == DistributedType.FSDP and self.accelerator.is_fsdp2

    def _make_anchor(self):
        args = self.args
        return GeometricAnchor.from_model(
            self.accelerator.unwrap_model(self.model),
            scope=args.scope,
            rho=args.rho,
            geometry=args.geometry,
            direction=args.direction,
            rounding=args.rounding,
            # accelerate's, which its launcher may set past the arguments.
            compute_dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None,
            seed=args.seed,
        )

    def _follow_sharding(self):
        """FSDP2 puts sharded parameters in the place of the model's when training begins."""
        if not hasattr(self.anchor.params[0], "placements"):
            counter = self.anchor.state_dict()
            self.anchor = self._make_anchor()
            self.anchor.load_state_dict(counter)

    # ---- Training ----

    def train(self, *args, **kwargs):
        """Trainer's train; the pair records begin anew."""
        self._begin = self.anchor.state_dict()
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        # With auto_find_batch_size this may not be the first attempt.
        self._record = metrics.TrainingRecord(self.args.record_pairs)
        self.anchor.load_state_dict(self._begin)
        # An evaluation before it prepares the model without DDP, and accelerate would leave it so: each process would
        # train alone.
        if self.args.world_size > 1 and not self._fsdp2 and self.model_wrapped is self.model:
            self.model._is_accelerate_prepared = False
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one update, and in place of Trainer's number of tokens the pairs in them, on all
        processes together; those of which a completion is empty, and that no mean counts, are left out."""
        self._before = self.state.global_step, self.anchor.state_dict()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = torch.stack([torch.zeros(2, dtype=torch.int64, device=device), *(_counts(b).to(device) for b in batches)])
        total = own.sum(0, keepdim=True)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum(0, keepdim=True)
        (pairs, tokens), _, *counts = torch.cat([total, own]).tolist()  # the one wait for the device
        for batch, (valid, chosen) in zip(batches, counts):
            # Over the share of the pairs, with which compute_loss multiplies.
            batch[SFT_SHARE] = chosen / max(tokens, 1) * pairs / max(valid, 1)
        return batches, max(pairs, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, its pairs' mean, scaled by world_size * their number / num_items_in_batch (that of the
        whole update; the gradients' mean over the processes takes the world_size away).

        Returns a scalar tensor, or (loss, GAPOOutput) with return_outputs.
        """
        args = self.args
        if self._fsdp2:
            self._follow_sharding()
            # The probe's gradient is averaged over the ranks in every micro-batch, so Trainer's no_sync is overruled.
            model.set_requires_gradient_sync(True)
        self.anchor.replicas = distributed.replicas(model)  # wrapped when training begins
        with self.accelerator.autocast():  # where the anchor sees it
            out = gapo_step(
                lambda: self._logps(model, inputs),
                self.anchor,
                beta=args.beta,
                gamma=args.gamma,
                probe=args.probe,
                label_smoothing=args.label_smoothing,
                loss_type=args.loss_type,
                sft_weight=args.sft_weight * inputs.get(SFT_SHARE, 1.0),
                share_backward=args.share_backward,
            )
        self._record.add(self.state.global_step + 1, metrics.table(out, inputs))
        loss = out.loss
        if num_items_in_batch is not None:
            loss = loss * (out.valid.sum().to(loss.dtype) * (args.world_size / num_items_in_batch))
        return (loss, out) if return_outputs else loss

    def _logps(self, model, inputs):
        """Length-normalised sequence log-probs (2B,) under the current weights, and token counts (2B,) int64."""
        places = {name: inputs[name] for name in INPUTS if name in inputs}
        # Trainer's evaluation calls a model that accelerate may not have prepared; entered twice, autocast is the same.
        with self.accelerator.autocast():
            return model(**places, **{MARK: inputs["labels"]})

    # ---- Checkpoints: the anchor's counter goes with the optimizer's state ----

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's; under FSDP2 the whole model also where checkpoints hold shards (SHARDED_STATE_DICT)."""
        if _internal_call or not self._fsdp2:
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            return super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(before)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            # Of an update that is half done, the next run does all micro-batches again.
            step, counter = self._before or (None, None)
            half_done = step == self.state.global_step
            write_json(counter if half_done else self.anchor.state_dict(), Path(output_dir) / ANCHOR_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint) / ANCHOR_FILE
            if not file.is_file():
                raise FileNotFoundError(
                    f"expected {ANCHOR_FILE} in {checkpoint}, got none: the checkpoint is incomplete, of another trainer, or "
                    "saved with save_only_model; resume from an earlier one, or start from its weights"
                )
            self.anchor.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    # ---- The log ----

    @property
    def pair_records(self):
        """list of dicts, one per pair of each finished update, in the order of training: step (from 1), index (the
        pair's position in the dataset), gap, weight, margin, anchor_margin (float) and is_flipped (bool).

        Of this process's pairs. Empty unless args.record_pairs.
        """
        return self._record.pairs(self.state.global_step)

    def log(self, logs, start_time=None):
        """Trainer's log; a training entry also gets the means since the last one: rewards/, logps/ and gapo/."""
        if "loss" in logs:
            rows = self._record.take()
            if rows is not None:
                rows = self._of_all(rows)
                logs.update(metrics.means(rows.cpu(), self.args.beta, anchor=True, split=self._are_marked))
                stats = self.anchor.stats
                if stats is not None and stats.intended_norm > 0:
                    logs["gapo/applied_norm_ratio"] = stats.applied_norm / stats.intended_norm
        super().log(logs, start_time)

    def _of_all(self, rows):
        """The tables of all processes, one after another; they may differ in length."""
        if self.args.world_size == 1:
            return rows
        longest = self.accelerator.pad_across_processes(rows, dim=0, pad_index=float("nan"))
        rows = self.accelerator.gather(longest)
        return rows[~rows[:, -1].isnan()]

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's; the pairs may be in any form that the constructor takes."""
        is_new = eval_dataset is not None and eval_dataset is not self.eval_dataset and not isinstance(eval_dataset, str)
        if is_new:
            eval_dataset = prepare_pairs(eval_dataset, self.processing_class, self.args, self._vocabulary)
        with self._every_pair():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """Trainer's; the pairs may be in any form that the constructor takes."""
        pairs = prepare_pairs(test_dataset, self.processing_class, self.args, self._vocabulary)
        with self._every_pair():
            return super().get_test_dataloader(pairs)

    @contextmanager
    def _every_pair(self):
        """dataloader_drop_last is for training: a mean without the last batch's pairs is not that of the dataset."""
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = before

    def evaluation_names(self):
        """list of what metric_for_best_model may be: the names of evaluation's means, with several datasets each with
        the dataset's before it. A subclass that measures more adds to it."""
        rows = torch.ones(1, len(metrics.FIELDS + metrics.MARKS))
        names = list(metrics.evaluation(rows, torch.ones(1), torch.ones(1), self.args))
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        return [f"{dataset}_{name}" for dataset in several for name in names] or names

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one batch without an anchor; returns (loss, None, None), or with prediction_loss_only=False
        (loss, margins (B,), None)."""
        args = self.args
        inputs = self._prepare_inputs(inputs)
        options = {name: getattr(args, name) for name in ("beta", "gamma", "label_smoothing", "loss_type")}
        with torch.no_grad():
            logps, counts = self._logps(model, inputs)
            out = gapo_step(lambda: (logps, counts), None, sft_weight=args.sft_weight, **options)
            losses, _ = gapo_objective(out.margin, valid=out.valid, reduction="none", **options)
        columns = torch.stack([losses.double(), counts[: len(losses)].double()], 1)
        rows = torch.cat([metrics.table(out, inputs), columns], 1)
        # Without the pairs that fill up the last batch to the number of processes.
        self._evaluated.append(self.accelerator.gather_for_metrics(rows))
        return out.loss, None if prediction_loss_only else out.margin, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's loop; its metrics get means over pairs, where Trainer takes means over batches."""
        if self._fsdp2 and not hasattr(next(self.model.parameters()), "placements"):
            raise RuntimeError(
                "expected train() before evaluate() and predict(), which under FSDP2 need the shards that it makes, got "
                "whole parameters: pass eval_on_start=True for an evaluation before the first step"
            )
        self._evaluated = []
        result = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        evaluated, self._evaluated = self._evaluated, []
        if evaluated:
            rows = torch.cat(evaluated).cpu()
            *columns, losses, counts = rows.t()
            found = metrics.evaluation(torch.stack(columns, 1), losses, counts, self.args)
            result.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return result


def _counts(batch):
    """(2,) int64: a batch's pairs without an empty completion, and the scored tokens of their chosen ones. No wait for a
    device."""
    offsets = batch.get("cu_seqlens")
    targets = align_targets(batch["labels"], offsets, True, IGNORE_INDEX)
    counts = torch.zeros(sequence_count(targets, offsets), dtype=torch.int64, device=targets.device)
    counts.index_add_(0, sequence_of_rows(targets, offsets), (targets != IGNORE_INDEX).flatten().long())
    chosen, rejected = counts.chunk(2)
    valid = (chosen > 0) & (rejected > 0)
    return torch.stack([valid.sum(), (chosen * valid).sum()])


def _refuse_for_sharing(found):
    if found:
        raise ValueError(f"share_backward needs the probe's backward of a whole, padded batch, got {', '.join(found)}")


def _refuse_fsdp(name, found):
    raise ValueError(f"{name} expects accelerators and several processes, got {found}: nothing would be sharded")


def _refuse_what_has_no_place(args, model, options):
    if args.share_backward:
        without = ("gradient_checkpointing", "torch_compile", "padding_free", "fsdp", "use_liger_kernel", "ddp_static_graph")
        found = [f"{name} = {value!r}" for name in without if (value := getattr(args, name, None))]
        found += [f"scope = {args.scope!r}"] if isinstance(args.scope, int) else []
        found += ["ACCELERATE_USE_FSDP = true"] if parse_flag_from_env("ACCELERATE_USE_FSDP") and not args.fsdp else []
        found += ["a model whose gradient_checkpointing is on"] if any(map(_checkpoints, model.modules())) else []
        _refuse_for_sharing(found)
    liger = args.liger_kernel_config or {}
    every = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
    refused = [
        (
            "liger_kernel_config.fused_linear_cross_entropy",
            args.use_liger_kernel and liger.get("fused_linear_cross_entropy"),
            "the loss has a fused head of its own",
        ),
        (
            "use_liger_kernel",
            args.use_liger_kernel and args.device.type in WITHOUT_TRITON,
            f"Liger's kernels expect a GPU, got the device {args.device.type}",
        ),
        (
            "use_liger_kernel without gradient_checkpointing of every layer",
            args.use_liger_kernel and not (args.gradient_checkpointing and every == 1),
            "its kernels write over what they saved for the backward, and the step walks one graph twice; set "
            f"gradient_checkpointing=True, got {args.gradient_checkpointing} with every_n_layers = {every}",
        ),
        ("neftune_noise_alpha", args.neftune_noise_alpha, "the anchor's forward would draw other noise"),
        (
            "train_sampling_strategy",
            args.train_sampling_strategy in ("group_by_length", "batch_rebalance"),
            "a pair has two lengths; leave it at 'random' or 'sequential'",
        ),
        (
            "accelerator_config.dispatch_batches",
            args.accelerator_config.dispatch_batches,
            "a batch's tensors have 2B and B rows, which accelerate would cut alike",
        ),
        (
            "accelerator_config.even_batches = False",
            not args.accelerator_config.even_batches,
            "evaluation gathers as many rows of each process, and the ranks would wait for one another; leave it at True",
        ),
        (
            "accelerator_config.use_seedable_sampler = False",
            not args.accelerator_config.use_seedable_sampler,
            "a resumed run would draw the pairs in another order; leave it at True",
        ),
        (
            "ignore_data_skip",
            args.ignore_data_skip,
            "a resumed run would begin its epoch anew, and train on other pairs than the uninterrupted one",
        ),
        *((name, options.get(name), "evaluation has its own metrics; use a callback") for name in OF_METRICS),
        *((name, getattr(args, name, None), "evaluation has its own metrics and labels") for name in OF_METRICS_TOO),
        (
            "ddp_static_graph with gradient_accumulation_steps > 1",
            getattr(args, "ddp_static_graph", None) and args.gradient_accumulation_steps > 1 and args.world_size > 1,
            "DDP's first backward would be one without synchronisation, which a static graph cannot begin with",
        ),
        ("compute_loss_func", options.get("compute_loss_func"), "the loss is GAPO's; override compute_loss"),
    ]
    for name, is_set, why in refused:
        if is_set:
            raise ValueError(f"{name} is not supported: {why}")
    if args.use_liger_kernel:  # its head would take the place of ours when training begins
        args.liger_kernel_config = liger | {"fused_linear_cross_entropy": False}


def _check_batch(batch, padding_free):
    missing = {"input_ids", "labels", "index", "is_flipped"} - batch.keys()
    if missing:
        raise ValueError(
            f"expected a data_collator that returns input_ids, labels, index, is_flipped, as PreferenceCollator does, got "
            f"{', '.join(batch)}"
        )
    if padding_free != ("cu_seqlens" in batch):
        packed = "packed rows, with cu_seqlens," if padding_free else "padded rows, without cu_seqlens,"
        raise ValueError(
            f"padding_free = {padding_free} expects {packed} of the data_collator, got {', '.join(batch)}: make both alike"
        )


def _refuse_parallelism(config):
    """config: accelerate's ParallelismConfig, which its launcher may set, or None."""
    for kind in ("tp", "cp", "sp"):
        if config is not None and getattr(config, f"{kind}_enabled"):
            raise NotImplementedError(
                f"expected processes that are parallel over data alone, got parallelism_config.{kind}_size = "
                f"{getattr(config, f'{kind}_size')}: the anchor and the log-probs know no other"
            )


def _disable_dropout(model):
    """The anchor's gap is the difference of two forwards; dropout would make it noise, also in attention."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Many models of transformers read a probability from a float, not from a module.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(module, name, 0.0)


def _checkpoints(module):
    """Whether the module checkpoints its activations, set past the arguments."""
    return bool(getattr(module, "gradient_checkpointing", False))


def _is_reentrant(module):
    """Whether it does so in the reentrant way."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    return _checkpoints(module) and getattr(function, "keywords", {}).get("use_reentrant")
