"""The policy's forward for preference pairs: hidden states through the fused LM head to sequence log-probs.

It runs inside of the model's own `forward`, called through whatever wraps the model: DDP prepares its gradients there,
FSDP2 gathers the parameters there, accelerate switches autocast on there.
"""

import functools
import types

import torch
from torch import nn

from gapo_kernels import linear_sequence_logps, reference
from gapo_kernels.shared_backward import SharedBackward

MARK = "sequence_labels"
INPUTS = ("input_ids", "position_ids", "sequence_labels", "cu_seqlens")


def install(model, max_logits_bytes):
    """Lets `model.forward` return (logps (S,), counts (S,)) when it gets `sequence_labels`; else it is as before.

    model: a PreTrainedModel, without an adapter around it. max_logits_bytes: as in `linear_sequence_logps`.

    Raises TypeError, with the remedy, for a head whose weight the log-probs cannot be computed from.
    """
    check_head(model)

    def model_logps(model, input_ids, position_ids=None, **options):
        return _model_logps(model, input_ids, position_ids, options | {"max_logits_bytes": max_logits_bytes})

    _extend(model, model_logps, INPUTS)
    _extend(model.get_output_embeddings(), _head_logps, None)


def _extend(module, logps, names):
    """Calls of the module with `sequence_labels` go to `logps`, with the keywords of these names, or all."""
    before = module.forward
    # The function, not the bound method: a copy of the module calls it with itself.
    bound = getattr(before, "__self__", None) is module
    of_any = before.__func__ if bound else lambda _, *args, **kwargs: before(*args, **kwargs)

    @functools.wraps(of_any)
    def forward(self, *args, **kwargs):
        if kwargs.get(MARK) is None:
            kwargs.pop(MARK, None)
            return of_any(self, *args, **kwargs)
        return logps(self, *args, **{name: value for name, value in kwargs.items() if names is None or name in names})

    module.forward = types.MethodType(forward, module)


def _model_logps(model, input_ids, position_ids, options):
    """Length-normalised log-probs (S,) and token counts (S,) int64.

    input_ids: (S, T) padded on the right, with sequence_labels (S, T); or (1, N) packed, with position_ids (1, N),
    sequence_labels (N,) and cu_seqlens (S + 1,). No attention mask: with causal attention no completion token sees
    padding on its right, and without a mask attention takes its fast path.
    """
    places = {} if position_ids is None else {"position_ids": position_ids}
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **places).last_hidden_state
    if options.get("cu_seqlens") is not None:
        hidden = hidden.squeeze(0)
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    # Called as a module, for FSDP2 may have made the head a unit of its own, gathered when it is called.
    head = model.get_output_embeddings()
    return head(hidden, softcap=softcap, logit_scale=logit_scale(config), **options)


def _head_logps(head, hidden, sequence_labels, **options):
    bias = getattr(head, "bias", None)
    return linear_sequence_logps(hidden, head.weight, sequence_labels, bias=bias, return_counts=True, **options)


@torch.no_grad()
def check_logps(model, base, padding_free):
    """Compares the log-probs of two short sequences with those of the model's own logits, and packed with padded.

    model: what is called, adapters and all; base: the PreTrainedModel. Raises NotImplementedError where they differ:
    models scale, cap and pack in ways of their own. ValueError where a forward in training draws random numbers. Weights
    without values (meta device), and flash attention on a CPU, cannot be checked.
    """
    device = base.get_input_embeddings().weight.device
    if device.type == "meta" or (device.type == "cpu" and "flash" in str(base.config._attn_implementation)):
        return
    vocabulary = base.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(3, 13, device=device).view(2, 5) * 7) % min(
        vocabulary, base.config.get_text_config().vocab_size
    )
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        expected = reference.sequence_logps(logits, ids).float()
        model.train()
        before = _random_state(device)
        found = model(input_ids=ids, sequence_labels=ids)[0].float()
        if not torch.equal(before, _random_state(device)):
            where, remedy = type(base).__name__, "set it to 0 in model.config"
            if hasattr(model, "disable_adapter"):
                before = _random_state(device)
                with model.disable_adapter():
                    model(input_ids=ids, sequence_labels=ids)
                if torch.equal(before, _random_state(device)):
                    where, remedy = type(model.active_peft_config).__name__, "train other adapters, LoRA say"
            raise ValueError(
                f"expected a forward that draws no random numbers, got dropout or noise in {where}: {remedy}; two "
                "forwards would differ by more than the anchor"
            )
        places = torch.arange(5, device=device).repeat(2)[None]
        offsets = torch.tensor([0, 5, 10], dtype=torch.int32, device=device)
        packed = dict(input_ids=ids.view(1, 10), position_ids=places, sequence_labels=ids.flatten(), cu_seqlens=offsets)
        if padding_free:
            apart = model(**packed)[0].float()
    finally:
        model.train(training)
    half = logits.dtype in (torch.float16, torch.bfloat16) or base.dtype in (torch.float16, torch.bfloat16)
    autocast = torch.is_autocast_enabled(device.type)
    tolerance = dict(rtol=3e-2, atol=3e-2) if half or autocast else dict(rtol=2e-5, atol=1e-5)
    if not torch.allclose(found, expected, equal_nan=True, **tolerance):
        raise NotImplementedError(
            f"expected the fused head's log-probs to be those of the model's own logits, {expected.tolist()}, got "
            f"{found.tolist()}: {type(base).__name__} does something to its logits that is not known here"
        )
    if padding_free and not torch.allclose(apart, found, equal_nan=True, **tolerance):
        raise NotImplementedError(
            f"padding_free expects a model that keeps packed sequences apart by position_ids, log-probs "
            f"{found.tolist()}, got {apart.tolist()} from {type(base).__name__}: pass padding_free=False"
        )


def check_shared_backward(model, anchor):
    """Looks, in the graph of two short sequences, at whatever the final backward must be able to do alone.

    model: what is called, adapters and all. Raises NotImplementedError at a layer that share_backward=True cannot take,
    DoRA's say. Weights without values (meta device) cannot be checked.
    """
    device = anchor.params[0].device
    if device.type == "meta":
        return
    ids = torch.ones(2, 5, dtype=torch.int64, device=device)
    logps, _ = model(input_ids=ids, sequence_labels=ids)
    SharedBackward(logps, anchor, anchor.params)


def _random_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def logit_scale(config):
    """What a model of this configuration multiplies its logits by (float)."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


def check_head(model):
    """Raises TypeError unless the model's head is a linear layer with a plain floating-point weight."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and type(head).__module__.startswith(("torch.", "transformers.")):
        if head.weight.is_floating_point():
            return
    name = type(head).__name__
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        raise TypeError(
            f"the LM head has an adapter on it ({name}): the fused head computes with its weight directly, so the "
            "adapter would not be trained. Take lm_head out of target_modules (or modules_to_save)"
        )
    raise TypeError(
        f"expected an LM head that is a torch.nn.Linear with a floating-point weight, got {name}: leave the head out of "
        "the quantisation (llm_int8_skip_modules=['lm_head'])"
    )
