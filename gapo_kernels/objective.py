"""The scalar math of GAPO, from sequence log-probs to loss, pair weights and gradient coefficients.

Every torch path (the eager reference, the CPU path, `gapo_step`) calls these functions; the Triton pair kernel
(`kernels/pairs.py`) is their one twin and is tested against them. Equations: arXiv 2602.04909, with
M the preference margin, M~ the margin at the anchor, Gamma = M - M~ the Anchor Gap:

    z = beta * Gamma - gamma
    sigmoid: L = -(1 - eps) log sigma(z) - eps log sigma(-z),    w = -dL/dM = beta (sigma(-z) - eps)
    hinge:   L = relu(1 - z),                                    w = beta [z < 1]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
import torch.nn.functional as F

from gapo_kernels import validation


def pair_terms(
    gap: Tensor,  # (B,)
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
) -> tuple[Tensor, Tensor]:
    """Loss and weight of each pair, both (B,), in the gap's dtype; the loss is differentiable."""
    z = beta * gap - gamma
    if loss_type == "hinge":
        # relu passes a finite gradient at NaN; this factor makes it NaN there, as the weight is.
        nan_or_one = torch.where(z.isnan(), z, 1).detach()
        return torch.relu(1 - z) * nan_or_one, beta * (z < 1).to(z.dtype).detach() * nan_or_one
    loss = -(1 - label_smoothing) * F.logsigmoid(z)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-z)
    return loss, beta * (torch.sigmoid(-z) - label_smoothing).detach()


def gapo_objective(
    margin: Tensor,
    anchor_margin: Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    valid: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """GAPO's loss on preference margins from any source (arXiv 2602.04909; module docstring for the equations).

    Args:
        margin: (B,) floating, M = s(chosen) - s(rejected); the gradient flows through it. float16 and bfloat16 are
            computed in float32.
        anchor_margin: (B,) floating, the same margin at the anchor, a constant; None means 0, the SimPO loss.
        beta, gamma: the logistic's argument is z = beta * gap - gamma. beta > 0.
        label_smoothing: eps in [0, 0.5); ignored by the hinge loss.
        loss_type: "sigmoid" or "hinge".
        valid: (B,) bool; a pair marked False has loss 0, weight 0 and zero gradient and is left out of the mean.
        reduction: "mean" over the valid pairs (0 if there is none), or "none".

    Returns:
        loss: scalar, or (B,) with reduction="none"; weight: (B,), w = -dL/dM before the mean, detached.

    Raises:
        ValueError, TypeError: shapes, dtypes or hyperparameters outside of what is said above.
    """
    validation.check_hyperparameters(beta, gamma, label_smoothing, loss_type, reduction)
    validation.check_margin(margin, "margin")
    if margin.dtype in validation.HALF:
        margin = margin.float()
    gap = margin
    if anchor_margin is not None:
        validation.check_margin(anchor_margin, "anchor_margin", like=margin)
        gap = margin - anchor_margin.detach().to(margin.dtype)
    if valid is None:
        valid = torch.ones_like(gap, dtype=torch.bool)
    else:
        validation.check_valid(valid, margin)
    # Masked before the loss, not only after it: 0 * NaN would leak an inert pair's NaN into the gradient.
    loss, weight = pair_terms(gap.masked_fill(~valid, 0), beta, gamma, label_smoothing, loss_type)
    loss, weight = loss.masked_fill(~valid, 0), weight.masked_fill(~valid, 0)
    return (loss if reduction == "none" else loss.sum() / valid.sum().clamp(min=1)), weight


def sft_terms(
    chosen_sums: Tensor,  # (B,) sum of the chosen completion's token log-probs
    chosen_counts: Tensor,  # (B,) its number of tokens
    valid: Tensor,  # (B,) bool
    sft_weight: float,
) -> tuple[Tensor, Tensor]:
    """The NLL over all chosen tokens of the valid pairs (scalar), and each pair's share of sft_weight * NLL (B,).

    The shares' mean over the valid pairs is sft_weight * NLL, so that a loss with reduction="none" averages to the
    loss with reduction="mean", and a NaN stays in its own pair's share.
    """
    nll = -chosen_sums.masked_fill(~valid, 0)
    token_scale = _sft_scale(chosen_counts, valid, chosen_sums.dtype)
    return nll.sum() * token_scale, sft_weight * nll * (valid.sum() * token_scale)


def _sft_scale(chosen_counts: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (tokens of the valid pairs' chosen completions). Integer counts would divide in float32 at best."""
    return chosen_counts.masked_fill(~valid, 0).sum().clamp(min=1).to(dtype).reciprocal()


class PairResults(NamedTuple):
    """GAPOOutput's fields in GAPOOutput's order, then the coefficients of the gradient."""

    loss: Tensor  # scalar or (B,)
    chosen_logps: Tensor  # (B,)
    rejected_logps: Tensor  # (B,)
    margin: Tensor  # (B,)
    anchor_margin: Tensor  # (B,)
    gap: Tensor  # (B,)
    weight: Tensor  # (B,)
    sft_loss: Tensor  # scalar
    valid: Tensor  # (B,) bool
    coefficients: Tensor  # (2B,)  d loss / d logits[row] = coefficients[sequence] * (softmax - onehot)


def sequence_means(sums: Tensor, counts: Tensor, length_normalized: bool) -> Tensor:
    """s(y) from the sum of token log-probs; an empty sequence has s = 0."""
    return sums / counts.clamp(min=1) if length_normalized else sums


def margin_shares(counts: Tensor, length_normalized: bool) -> Tensor:
    """(2B,) float64: dM / d(log-prob of a token) of its sequence's pair, 0 of inert pairs."""
    valid = (counts > 0).view(2, -1).all(0)
    shares = torch.cat([valid.double(), -valid.double()])
    return shares / counts.clamp(min=1) if length_normalized else shares


def pair_results(
    sums: Tensor,  # (2B,) sums of token log-probs, chosen rows then rejected rows
    counts: Tensor,  # (2B,) predicted tokens
    anchor_margin: Tensor | None,  # (B,)
    *,
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    sft_weight: float,
    reduction: str,
) -> PairResults:
    """All of a batch's results in closed form, without autograd: loss, fields and d loss / d logits coefficients."""
    pairs = sums.shape[0] // 2
    chosen, rejected = sequence_means(sums, counts, length_normalized).split(pairs)
    valid = (counts > 0).view(2, pairs).all(0)
    margin = chosen - rejected
    anchor_margin = torch.zeros_like(margin) if anchor_margin is None else anchor_margin.to(margin.dtype)
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
    # c_row = +- w / (B n) for the preference loss, + sft_weight / (chosen tokens) for the NLL.
    share = weight / valid.sum().clamp(min=1) if reduction == "mean" else weight
    coefficients = share.repeat(2) * margin_shares(counts, length_normalized)
    sft_loss = torch.zeros_like(sums[0])
    if sft_weight:
        sft_loss, sft_shares = sft_terms(sums[:pairs], counts[:pairs], valid, sft_weight)
        loss = loss + (sft_weight * sft_loss if reduction == "mean" else sft_shares)
        scale = sft_weight * _sft_scale(counts[:pairs], valid, sums.dtype)
        coefficients[:pairs] += valid * (scale if reduction == "mean" else scale * valid.sum())
    return PairResults(
        loss, chosen, rejected, margin, anchor_margin, margin - anchor_margin, weight, sft_loss, valid, coefficients
    )
