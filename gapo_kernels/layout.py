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
        # Looked up in order: isin would have a GPU sort, and be waited for.
        following, ends = torch.arange(1, labels.shape[0] + 1, device=labels.device), cu_seqlens.long()
        place = torch.searchsorted(ends, following).clamp(max=ends.shape[0] - 1)
        targets = targets.masked_fill(ends[place] == following, ignore_index)
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


def rows_are_apart(logits: Tensor) -> bool:
    """Whether no two of the logits (S, T, V) or (N, V) share memory; the last stride is 1."""
    *leading, vocabulary = logits.shape
    (outer, inner), strides = leading if len(leading) == 2 else (1, *leading), logits.stride()[:-1]
    outer_stride, inner_stride = strides if len(strides) == 2 else (0, *strides)

    def apart(rows: int, stride: int, groups: int, group_stride: int) -> bool:
        """Rows do not overlap within a group, nor the groups each other."""
        return (rows <= 1 or stride >= vocabulary) and (
            groups <= 1 or group_stride >= (vocabulary if rows <= 1 else stride * (rows - 1) + vocabulary)
        )

    # Written out for two dimensions in either order, not sorted: strides may be symbolic under torch.compile.
    return apart(inner, inner_stride, outer, outer_stride) or apart(outer, outer_stride, inner, inner_stride)


def like_rows(logits: Tensor) -> Tensor:
    """Memory for the logits' gradient on a GPU. Of a view that leaves out little, a padded vocabulary or the last rows, say,
    it has the strides. If the first logit lies at a multiple of 16 bytes, each row of both then begins at the same place in
    16 bytes, and is accessed so whatever V is."""
    extent = sum((n - 1) * stride for n, stride in zip(logits.shape, logits.stride())) + 1
    if not logits.is_contiguous() and 10 * extent <= 11 * logits.numel() and rows_are_apart(logits):
        return logits.new_empty_strided(logits.shape, logits.stride())
    return logits.new_empty(logits.shape)
