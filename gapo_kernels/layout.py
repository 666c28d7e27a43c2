"""Which row of the logits predicts which token of which sequence: the one place where shift and packing are decoded.

Rows are either padded, logits (S, T, V) with labels (S, T), or packed, logits (N, V) with labels (N,) and
cu_seqlens (S + 1,): the rows of sequence s are cu_seqlens[s] .. cu_seqlens[s + 1] - 1.
"""

from __future__ import annotations

from torch import Tensor
import torch


def align_targets(
    labels: Tensor,  # (S, T) or (N,), any integer dtype
    cu_seqlens: Tensor | None,  # (S + 1,) or None
    shift: bool,
    ignore_index: int,
) -> Tensor:
    """The label that each row predicts, int64, shaped like `labels`; `ignore_index` where it predicts none."""
    labels = labels.long()
    if not shift:
        return labels
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        # The last row of a sequence predicts nothing; without this it would predict its neighbour's first token.
        following = torch.arange(1, labels.shape[0] + 1, device=labels.device)
        targets = targets.masked_fill(torch.isin(following, cu_seqlens), ignore_index)
    return targets


def sequence_of_rows(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sequence that each row belongs to, int64, flat: (S * T,) or (N,)."""
    if cu_seqlens is None:
        sequences, length = targets.shape
        return torch.arange(sequences, device=targets.device).repeat_interleave(length)
    rows = torch.arange(targets.shape[0], device=targets.device)
    return torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1


def sequence_count(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    return labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
