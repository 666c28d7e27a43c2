"""`fused_gapo_loss`: validate, dispatch, pack the result."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_kernels import ops, reference, validation
from gapo_kernels.outputs import GAPOOutput


class _FusedGAPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits,
        labels,
        anchor_logits,
        anchor_margin,
        cu_seqlens,
        options,
        shift,
        ignore_index,
        reduction,
        inplace_backward,
        backend,
    ):
        *fields, coefficients, row_shift, row_total = ops.loss_forward(
            logits, labels, anchor_logits, anchor_margin, cu_seqlens, *options, shift, ignore_index, reduction, backend
        )
        ctx.mark_non_differentiable(*fields[1:])
        # The policy's logits to rebuild the softmax from, two statistics per row and one coefficient per sequence;
        # the anchor is a constant: nothing of it is kept.
        ctx.save_for_backward(logits, labels, cu_seqlens, coefficients, row_shift, row_total)
        ctx.options = (shift, ignore_index, backend, inplace_backward)
        ctx.inplace_backward = inplace_backward  # gapo_step asks
        return tuple(fields)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        logits, labels, cu_seqlens, coefficients, row_shift, row_total = ctx.saved_tensors
        # reduction="none": one upstream gradient a pair, for its chosen and its rejected row
        scale = coefficients * (grad_loss.repeat(2) if grad_loss.dim() else grad_loss)
        scale = scale.masked_fill(coefficients == 0, 0)  # an inert pair has no gradient, whatever comes from above
        gradient = ops.logits_gradient(scale, logits, labels, cu_seqlens, row_shift, row_total, *ctx.options)
        return (gradient, None, None, None, None, None, None, None, None, None, None)


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
    backend: str = "auto",
) -> GAPOOutput:
    """GAPO's loss (arXiv 2602.04909) from policy and anchor logits, in one pass forward and one backward.

    With s(y) the completion's mean token log-prob, M = s(chosen) - s(rejected), M~ the same at the anchor and
    Gamma = M - M~ the Anchor Gap:  L = mean_i -log sigma(beta * Gamma_i - gamma).  Without an anchor Gamma = M, the
    SimPO loss; with a frozen reference model as anchor and gamma = 0, length-normalised DPO.

    Args:
        logits: (2B, T, V) floating (float16, bfloat16, float32, float64), rows 0..B-1 the chosen completions, rows
            B..2B-1 the rejected ones in the same order, any strides with a contiguous last dimension; or (N, V) with
            `cu_seqlens`.
        labels: (2B, T) int64, or (N,) with `cu_seqlens`; `ignore_index` on prompt and padding.
        anchor_logits: like logits, the anchor's; never differentiated.
        anchor_margin: (B,), M~ itself, instead of `anchor_logits`; never differentiated.
        beta, gamma: the logistic's argument is z = beta * gap - gamma. beta > 0. The authors set gamma = beta * ratio.
        label_smoothing: eps in [0, 0.5), L = -(1 - eps) log sigma(z) - eps log sigma(-z). The hinge has none.
        loss_type: "sigmoid", or "hinge" for relu(1 - z).
        length_normalized: s is the mean over the tokens; False: their sum.
        sft_weight: adds sft_weight * NLL, the mean over all chosen tokens of the valid pairs of -log p, at no extra pass.
        shift: position t predicts labels[t + 1]; False: labels are already aligned.
        cu_seqlens: (2B + 1,) int32, 2B sequences packed one after another without padding, chosen then rejected.
        reduction: "mean" over the valid pairs, or "none" for (B,) (then each pair carries its share of the NLL).
        inplace_backward: write the gradient over the logits' storage, which saves a tensor of their size. The logits
            are gone after the backward: autograd refuses a second backward, and any other use that saved them.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        GAPOOutput; only its `loss` carries gradient.

    Raises:
        ValueError: shapes, strides, devices, hyperparameters, both anchors given, or, on the CPU, a label outside of
            [0, V). On a GPU such a label makes its pair's loss NaN (no sync; GAPO_KERNELS_DEBUG=1 raises).
        TypeError: logits not floating, labels not integer, anchor_logits of another dtype.
        RuntimeError: backend="triton" without a GPU; double backward.
    """
    validation.check_hyperparameters(beta, gamma, label_smoothing, loss_type, reduction, sft_weight)
    validation.check_logits_and_labels(logits, labels, cu_seqlens, ignore_index)
    validation.check_flags(length_normalized=length_normalized, shift=shift, inplace_backward=inplace_backward)
    validation.check_pairs(logits, cu_seqlens)
    validation.check_anchor(logits, cu_seqlens, anchor_logits, anchor_margin)
    if inplace_backward:
        validation.check_inplace(logits)
    backend = ops.resolve_backend(backend, logits.device)
    if backend == "reference":
        return reference.fused_gapo_loss(
            logits,
            labels,
            anchor_logits=anchor_logits,
            anchor_margin=anchor_margin,
            beta=beta,
            gamma=gamma,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            length_normalized=length_normalized,
            sft_weight=sft_weight,
            shift=shift,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            reduction=reduction,
        )
    fields = _FusedGAPOLoss.apply(
        logits,
        labels,
        None if anchor_logits is None else anchor_logits.detach(),
        None if anchor_margin is None else anchor_margin.detach(),
        cu_seqlens,
        (beta, gamma, label_smoothing, loss_type, length_normalized, sft_weight),
        shift,
        ignore_index,
        reduction,
        inplace_backward,
        backend,
    )
    return GAPOOutput(*fields)
