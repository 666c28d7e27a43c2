"""The eager specification of GAPO: readable line by line beside the paper, exact, slow, and public.

Functions have the names and keywords of the fused API. Inputs in float16 and bfloat16 are computed in float32, float64
throughout in float64. Everything else is tested against this module in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_kernels import validation
from gapo_kernels.layout import align_targets, sequence_count, sequence_of_rows
from gapo_kernels.objective import gapo_objective, sequence_means, sft_terms
from gapo_kernels.outputs import GAPOOutput

__all__ = ["fused_gapo_loss", "fused_linear_gapo_loss", "gapo_objective", "linear_sequence_logps", "sequence_logps"]


def _rows(
    labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int, in_pairs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' targets, which of them each sequence has (S, rows) bool, how many each predicts (S,) int64, and which
    rows have a gradient, shaped like labels: those that predict, with in_pairs only where both completions do."""
    targets = align_targets(labels, cu_seqlens, shift, ignore_index)
    predicted = targets != ignore_index
    sequence = sequence_of_rows(targets, cu_seqlens)
    count = sequence_count(labels, cu_seqlens)
    members = sequence == torch.arange(count, device=labels.device).unsqueeze(-1)
    counts = (members & predicted.flatten()).sum(-1)
    active = predicted
    if in_pairs:
        inert = (counts == 0).view(2, -1).any(0).repeat(2)
        active = predicted & ~(members & inert.unsqueeze(-1)).any(0).view_as(targets)
    return targets, members, counts, active


def _token_sums(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int, in_pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum of the predicted tokens' log-probs (S,), and their number (S,) int64.

    With in_pairs, no gradient reaches the logits of a pair with an empty completion: 0 * NaN would, if they are NaN.
    """
    vocabulary = logits.shape[-1]
    if not torch.compiler.is_compiling():
        validation.check_values(labels, vocabulary, cu_seqlens, shift, ignore_index)
    targets, members, counts, active = _rows(labels, cu_seqlens, shift, ignore_index, in_pairs)
    predicted = targets != ignore_index
    in_range = (targets >= 0) & (targets < vocabulary)

    # Rows that predict nothing are blanked before the softmax, so that not even a NaN in them reaches the gradient.
    logits = torch.where(active.unsqueeze(-1), logits, logits.detach())
    logits = logits.masked_fill(~predicted.unsqueeze(-1), 0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = torch.log_softmax(logits, -1).gather(-1, targets.where(in_range, 0).unsqueeze(-1)).squeeze(-1)
    logps = logps.where(in_range, torch.nan).masked_fill(~predicted, 0)

    return logps.flatten().expand_as(members).masked_fill(~members, 0).sum(-1), counts


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    length_normalized: bool = True,
    shift: bool = True,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    inplace_backward: bool = False,
    return_counts: bool = False,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:
    """Eager twin of `gapo_kernels.sequence_logps`; `inplace_backward` and `backend` are accepted and change nothing."""
    validation.check_logits_and_labels(logits, labels, cu_seqlens, ignore_index)
    validation.check_flags(length_normalized=length_normalized, shift=shift, inplace_backward=inplace_backward)
    validation.check_choice(backend, validation.BACKENDS, "backend")
    sums, counts = _token_sums(logits, labels, cu_seqlens, shift, ignore_index)
    logps = sequence_means(sums, counts, length_normalized)
    return (logps, counts) if return_counts else logps


def fused_gapo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    anchor_logits: Tensor | None = None,
    anchor_margin: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    length_normalized: bool = True,
    sft_weight: float = 0.0,
    shift: bool = True,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str = "reference",
) -> GAPOOutput:
    """Eager twin of `gapo_kernels.fused_gapo_loss`; `inplace_backward` and `backend` are accepted and change nothing."""
    validation.check_hyperparameters(beta, gamma, label_smoothing, loss_type, reduction, sft_weight)
    validation.check_logits_and_labels(logits, labels, cu_seqlens, ignore_index)
    validation.check_flags(length_normalized=length_normalized, shift=shift, inplace_backward=inplace_backward)
    validation.check_choice(backend, validation.BACKENDS, "backend")
    validation.check_pairs(logits, cu_seqlens)
    validation.check_anchor(logits, cu_seqlens, anchor_logits, anchor_margin)

    # s(y), the mean log-prob of a completion's tokens, and the preference margin M = s(chosen) - s(rejected)
    sums, counts = _token_sums(logits, labels, cu_seqlens, shift, ignore_index, in_pairs=True)
    chosen, rejected = sequence_means(sums, counts, length_normalized).chunk(2)
    margin = chosen - rejected
    valid = (counts > 0).view(2, -1).all(0)

    # M~, the margin at the anchor, is a constant; without an anchor it is 0 and the loss is SimPO's
    if anchor_logits is not None:
        with torch.no_grad():
            anchor_sums, _ = _token_sums(anchor_logits, labels, cu_seqlens, shift, ignore_index)
            anchor_chosen, anchor_rejected = sequence_means(anchor_sums, counts, length_normalized).chunk(2)
            anchor_margin = anchor_chosen - anchor_rejected
    elif anchor_margin is None:
        anchor_margin = torch.zeros_like(margin)
    anchor_margin = anchor_margin.detach().to(margin.dtype).clone()

    # L = -(1 - eps) log sigma(z) - eps log sigma(-z) with z = beta * (M - M~) - gamma, averaged over the valid pairs
    loss, weight = gapo_objective(
        margin,
        anchor_margin,
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        valid=valid,
        reduction=reduction,
    )
    sft_loss = torch.zeros_like(chosen[0])
    if sft_weight:
        pairs = margin.shape[0]
        sft_loss, sft_shares = sft_terms(sums[:pairs], counts[:pairs], valid, sft_weight)
        loss = loss + (sft_weight * sft_loss if reduction == "mean" else sft_shares)
    gap = margin - anchor_margin
    fields = (chosen, rejected, margin, anchor_margin, gap, weight, sft_loss, valid)
    return GAPOOutput(loss, *(field.detach() for field in fields))


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    vocab_parallel_group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """cap(logit_scale * (hidden @ weight^T + bias)) with cap(x) = softcap * tanh(x / softcap)."""
    if vocab_parallel_group is not None:
        raise NotImplementedError("backend='reference' takes the whole weight: pass vocab_parallel_group=None")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _differentiable_logits(hidden: Tensor, labels: Tensor, head: tuple, in_pairs: bool, options: dict) -> Tensor:
    """_logits whose rows without a gradient are constants: their hidden states may be NaN, and 0 * NaN is no 0."""
    layout = (options.get("cu_seqlens"), options.get("shift", True), options.get("ignore_index", -100))
    *_, active = _rows(labels, *layout, in_pairs)
    active = active.unsqueeze(-1)
    return torch.where(active, _logits(hidden.masked_fill(~active, 0), *head), _logits(hidden, *head).detach())


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int = 2**30,
    vocab_parallel_group: torch.distributed.ProcessGroup | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """Eager twin of `gapo_kernels.linear_sequence_logps`, with all logits; `max_logits_bytes` changes nothing."""
    validation.check_linear(
        hidden, weight, labels, bias, options.get("cu_seqlens"), options.get("ignore_index", -100), softcap, logit_scale
    )
    head = (weight, bias, softcap, logit_scale, vocab_parallel_group)
    return sequence_logps(_differentiable_logits(hidden, labels, head, False, options), labels, **options)


def fused_linear_gapo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    anchor_hidden: Tensor | None = None,
    anchor_weight: Tensor | None = None,
    anchor_margin: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int = 2**30,
    vocab_parallel_group: torch.distributed.ProcessGroup | None = None,
    **options,
) -> GAPOOutput:
    """Eager twin of `gapo_kernels.fused_linear_gapo_loss`, with all logits; `max_logits_bytes` changes nothing."""
    validation.check_linear(
        hidden, weight, labels, bias, options.get("cu_seqlens"), options.get("ignore_index", -100), softcap, logit_scale
    )
    validation.check_pairs(hidden, options.get("cu_seqlens"))
    validation.check_linear_anchor(
        hidden, weight, options.get("cu_seqlens"), anchor_hidden, anchor_weight, anchor_margin
    )
    head = (bias, softcap, logit_scale, vocab_parallel_group)
    anchor_logits = None
    if anchor_hidden is not None:
        with torch.no_grad():
            anchor_logits = _logits(anchor_hidden, weight if anchor_weight is None else anchor_weight, *head)
    logits = _differentiable_logits(hidden, labels, (weight, *head), True, options)
    return fused_gapo_loss(logits, labels, anchor_logits=anchor_logits, anchor_margin=anchor_margin, **options)
