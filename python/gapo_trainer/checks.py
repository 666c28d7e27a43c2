"""Whether a model does what the fused forward takes it to do, looked at on two short sequences before any training."""

from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from gapo_kernels import reference
from gapo_kernels.shared_backward import SharedBackward


@torch.no_grad()
def check_logps(model, base, padding_free):
    """Compares the log-probs of two short sequences with those of the model's own logits, and packed with padded.

    model: what is called, adapters and all; base: the PreTrainedModel. Raises NotImplementedError where they differ:
    models scale, cap and pack in ways of their own; and where a token changes logits before it. ValueError where a forward
    in training draws random numbers. Weights without values (meta device), and flash attention on a CPU, cannot be checked.
    """
    device = base.get_input_embeddings().weight.device
    if device.type == "meta" or (device.type == "cpu" and "flash" in str(base.config._attn_implementation)):
        return
    exact, training = _is_exact(model, base, device), model.training
    is_off = exact and torch.is_autocast_enabled(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if is_off else nullcontext():
            _check_forwards(model, base, padding_free, exact)
    finally:
        model.train(training)


def _is_exact(model, base, device):
    """Whether the model computes in float32 at least, when autocast is switched off around it."""
    # Another trainer has put autocast inside of the model's forward, or attention that takes 16 bits alone needs it.
    if hasattr(model, "_original_forward") or "flash" in str(base.config._attn_implementation):
        return False
    one = torch.eye(64, device=device)
    rounded = (one * (1 + 2**-20)) @ one  # to TF32's 10 bits, on a GPU for which that was allowed
    return bool(rounded[0, 0] > 1) and all(p.dtype in (torch.float32, torch.float64) for p in base.parameters())


def _check_forwards(model, base, padding_free, exact):
    device = base.get_input_embeddings().weight.device
    vocabulary = min(base.get_output_embeddings().weight.shape[0], base.config.get_text_config().vocab_size)
    ids = (torch.arange(3, 13, device=device).view(2, 5) * 7) % vocabulary
    strict = loose = dict(rtol=2e-5, atol=1e-5)
    if not exact:  # strict is enough for one rounding to bfloat16
        strict, loose = dict(rtol=4e-3, atol=4e-3), dict(rtol=3e-2, atol=3e-2)
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits
    _check_causal(model, base, ids, logits, 1e-4 if exact else 2e-2)
    expected = reference.sequence_logps(logits, ids).float()
    labels, rows = _probing_rows(base.get_output_embeddings().weight, ids)
    with _hidden_states(base, rows):
        own = reference.sequence_logps(model(input_ids=ids, use_cache=False).logits, labels).float()
        _compare(model(input_ids=ids, sequence_labels=labels)[0].float(), own, base, strict)
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
    _compare(found, expected, base, loose)
    if padding_free:
        places = torch.arange(5, device=device).repeat(2)[None]
        offsets = torch.tensor([0, 5, 10], dtype=torch.int32, device=device)
        packed = dict(input_ids=ids.view(1, 10), position_ids=places, sequence_labels=ids.flatten(), cu_seqlens=offsets)
        apart = model(**packed)[0].float()
        if not torch.allclose(apart, found, equal_nan=True, **loose):
            raise NotImplementedError(
                f"padding_free expects a model that keeps packed sequences apart by position_ids, log-probs "
                f"{found.tolist()}, got {apart.tolist()} from {type(base).__name__}: pass padding_free=False"
            )


def _compare(found, expected, base, tolerance):
    if not torch.allclose(found, expected, equal_nan=True, **tolerance):
        raise NotImplementedError(
            f"expected the fused head's log-probs to be those of the model's own logits, {expected.tolist()}, got "
            f"{found.tolist()}: {type(base).__name__} does something to its logits that is not known here"
        )


def _check_causal(model, base, ids, logits, tolerance):
    """tolerance: of a logit, relative to the largest."""
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    change = (model(input_ids=other, use_cache=False).logits - logits)[:, :-1].abs().max()
    if change > tolerance * logits.abs().max():
        raise NotImplementedError(
            f"expected a causal model, whose last token changes no logit before it, got changes up to {change.item():.2g} "
            f"from {type(base).__name__}: a completion's tokens would see those that they are to predict"
        )


def _probing_rows(weight, ids):
    """(labels (S, T), hidden states (S, T, H)) with which logits show what a model does to them in any dtype: each row is
    a power of two in one column and 0 elsewhere, so that the head's products and sums have no rounding. The largest is 8
    to 16, and each label's the smallest."""
    rows = torch.zeros(ids.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
    row = torch.arange(len(rows), device=weight.device)
    columns = row * max(1, weight.shape[1] // len(rows)) % weight.shape[1]
    picked = weight[:, columns].float()
    rows[row, columns] = (2.0 ** (3 - picked.abs().amax(0).clamp(min=2**-20).log2().floor())).to(rows.dtype)
    predicted = picked.argmin(0).view(ids.shape)
    return torch.cat([predicted[:, :1], predicted[:, :-1]], 1), rows.view(*ids.shape, -1)


@contextmanager
def _hidden_states(base, rows):
    """In the place of those that the model computes; and the head's logits in float32 at least, for what follows them."""
    replaced = []

    def put(module, args, output):
        output.last_hidden_state = rows.to(output.last_hidden_state)
        replaced.append(module)
        return output

    def put_late(module, args):  # of OPT, say, which calls its decoder past its base model
        late = args if replaced else (rows.to(args[0]).view_as(args[0]), *args[1:])
        replaced.clear()
        return late

    def widen(module, args, output):  # of the fused head it is a tuple, of log-probs
        is_half = isinstance(output, torch.Tensor) and output.dtype == torch.bfloat16
        return output.float() if is_half else output

    head = base.get_output_embeddings()
    hooks = (
        base.base_model.register_forward_hook(put),
        head.register_forward_pre_hook(put_late),
        head.register_forward_hook(widen),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
