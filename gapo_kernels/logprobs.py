"""`sequence_logps`: differentiable log-probs of sequences, the primitive that the rest is built on."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_kernels import ops, reference, validation


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, cu_seqlens, length_normalized, shift, ignore_index, inplace_backward, backend):
        logps, counts, row_shift, row_total = ops.logps_forward(
            logits, labels, cu_seqlens, length_normalized, shift, ignore_index, backend
        )
        ctx.mark_non_differentiable(counts)
        # The logits to rebuild the softmax from, and its two statistics per row: no tensor of their size.
        ctx.save_for_backward(logits, labels, cu_seqlens, counts, row_shift, row_total)
        ctx.options = (shift, ignore_index, backend, inplace_backward)
        ctx.inplace_backward = inplace_backward  # gapo_step asks
        ctx.length_normalized = length_normalized
        return logps, counts

    @staticmethod
    def backward(ctx, grad_logps, _):
        logits, labels, cu_seqlens, counts, row_shift, row_total = ctx.saved_tensors
        # d s / d logits[row] = (onehot - softmax) / n
        scale = -grad_logps / counts.clamp(min=1) if ctx.length_normalized else -grad_logps
        gradient = ops.logits_gradient(scale, logits, labels, cu_seqlens, row_shift, row_total, *ctx.options)
        return (gradient, None, None, None, None, None, None, None)


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each sequence under next-token logits: s(y) of arXiv 2602.04909.

    s = 1/n sum_t log softmax(logits[t])[labels[t + 1]] over the n tokens that are not `ignore_index`.

    Args:
        logits: (S, T, V) floating (float16, bfloat16, float32, float64), any strides with a contiguous last dimension;
            or (N, V) with `cu_seqlens`. S may be any number, not only 2B.
        labels: (S, T) int64, or (N,) with `cu_seqlens`; `ignore_index` on prompt and padding.
        length_normalized: mean over the predicted tokens; False: their sum.
        shift: position t predicts labels[t + 1], and the last position predicts nothing; False: position t predicts
            labels[t], the labels are already aligned.
        cu_seqlens: (S + 1,) int32, rows cu_seqlens[s] .. cu_seqlens[s + 1] - 1 are sequence s (padding-free packing).
        inplace_backward: write the gradient over the logits' storage, which saves a tensor of their size. The logits
            are gone after the backward: autograd refuses a second backward, and any other use that saved them. So does
            `gapo_step`, which has two.
        return_counts: also return the number of predicted tokens, (S,) int64.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (S,) float32, or float64 for float64 logits; 0 with zero gradient for a sequence that predicts no token.

    Raises:
        ValueError: shapes, strides, devices, or, on the CPU, a label outside of [0, V). On a GPU such a label makes
            its sequence NaN (no sync; GAPO_KERNELS_DEBUG=1 raises).
        TypeError: logits not floating, labels not integer.
        RuntimeError: backend="triton" without a GPU; double backward.
    """
    validation.check_logits_and_labels(logits, labels, cu_seqlens, ignore_index)
    validation.check_flags(length_normalized=length_normalized, shift=shift, inplace_backward=inplace_backward)
    if inplace_backward:
        validation.check_inplace(logits)
    backend = ops.resolve_backend(backend, logits.device)
    if backend == "reference":
        logps, counts = reference.sequence_logps(
            logits,
            labels,
            length_normalized=length_normalized,
            shift=shift,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            return_counts=True,
        )
    else:
        logps, counts = _SequenceLogps.apply(
            logits, labels, cu_seqlens, length_normalized, shift, ignore_index, inplace_backward, backend
        )
    return (logps, counts) if return_counts else logps
