"""What the losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GAPOOutput(NamedTuple):
    """The loss and what it was made of. B pairs; fields are float32, or float64 for float64 inputs.

    Only `loss` carries gradient. A pair with an empty completion is inert: loss 0, weight 0, `valid` False.
    """

    loss: Tensor  # scalar, the mean over the valid pairs; (B,) with reduction="none"
    chosen_logps: Tensor  # (B,)  s(chosen)
    rejected_logps: Tensor  # (B,)  s(rejected)
    margin: Tensor  # (B,)  M = s(chosen) - s(rejected)
    anchor_margin: Tensor  # (B,)  M~, the margin at the anchor; zeros without one
    gap: Tensor  # (B,)  Gamma = M - M~, the Anchor Gap
    weight: Tensor  # (B,)  w = -dL/dM before the mean: how hard the pair pulls
    sft_loss: Tensor  # scalar, the NLL over the chosen tokens; 0 when sft_weight == 0
    valid: Tensor  # (B,)  bool: both completions have a token
