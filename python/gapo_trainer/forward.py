"""The policy's forward for preference pairs: hidden states through the fused LM head to sequence log-probs.

It runs inside of the model's own `forward`, called through whatever wraps the model: DDP prepares its gradients there,
FSDP2 gathers the parameters there, accelerate switches autocast on there.
"""

import functools
import types

from gapo_kernels import linear_sequence_logps

from .checks import check_head

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


def logit_scale(config):
    """What a model of this configuration multiplies its logits by (float)."""
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
