"""Backward: the gradient of the logits in one pass, optionally over the logits themselves.

    d logits[row] = scale[sequence] * (exp(x - m) / s - onehot(label))      on rows that predict a token, if scale is not 0
                  = 0                                                             elsewhere

m and s come from the forward. Reads N_valid V b bytes, writes N V b: rows that predict nothing are zeroed here, which is
cheaper than a memset before. The subtraction happens in the accumulation dtype before any rounding, so a token of
probability 1 - 1e-6 keeps its gradient in bfloat16.
"""

import torch
import triton
import triton.language as tl

from gapo_kernels.kernels import config
from gapo_kernels.kernels.primitives import (
    aligned_part,
    exp,
    predicted_label,
    ragged_offsets,
    row_address,
    sequence_of_row,
)
from gapo_kernels.kernels.statistics import row_layout, row_strides, starts_of
from gapo_kernels.layout import like_rows


@triton.jit
def softmax_minus_onehot(b_x, o_column, b_label, m, inverse_s, scale):
    b_onehot = tl.where(o_column == b_label, 1.0, 0.0).to(m.dtype)
    return (exp(b_x.to(m.dtype) - m) * inverse_s - b_onehot) * scale


@triton.jit(
    do_not_specialize=[
        "sequences",
        "length",
        "vocabulary",
        "chunk",
        "stride_sequence",
        "stride_row",
        "out_stride_sequence",
        "out_stride_row",
        "ignore_index",
    ]
)
def gradient_kernel(
    logits,  # (2B, T, V) or (N, V)
    gradient,  # the same shape; may be the logits
    labels,  # (R,) flat
    cu_seqlens,  # (S + 1,)
    scale,  # (S,)
    row_max,  # (R,)
    row_sum,  # (R,)
    sequences,
    length,
    vocabulary,
    chunk,
    stride_sequence,
    stride_row,
    out_stride_sequence,
    out_stride_row,
    ignore_index,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_sequence, end = sequence_of_row(i_row, cu_seqlens, sequences, length, PACKED)
    b_label, predicted = predicted_label(i_row, end, labels, ignore_index, SHIFT)
    b_label = b_label.to(tl.int32)
    # A sequence without upstream gradient has none, even if its logits are NaN (an inert pair, say): 0 * NaN is left out.
    active = tl.load(scale + i_sequence, mask=predicted, other=0) != 0

    row = row_address(logits, i_row, length, stride_sequence, stride_row).to(logits.dtype)
    out = row_address(gradient, i_row, length, out_stride_sequence, out_stride_row).to(gradient.dtype)
    LANES: tl.constexpr = BLOCK // VEC
    o_lane = tl.arange(0, LANES) * VEC
    o_tile = o_lane[:, None] + tl.arange(0, VEC)[None, :]
    start = tl.multiple_of(i_split * chunk, 16)  # chunk is a multiple of BLOCK, which the compiler cannot know

    if not active:
        out_first, b_head, b_whole = aligned_part(out, vocabulary, VEC)
        stop = tl.minimum(start + chunk, b_whole)
        b_zero = tl.zeros([LANES, VEC], gradient.dtype.element_ty)
        for i in range(start, stop, BLOCK):
            tl.store(out_first + i + o_tile, b_zero, mask=(i + o_lane < stop)[:, None])
        if i_split == 0:
            o_ragged, m_ragged = ragged_offsets(vocabulary, b_head, b_whole, LANES)
            tl.store(out + o_ragged, tl.zeros([LANES], gradient.dtype.element_ty), mask=m_ragged)
        return

    first, b_head, b_whole = aligned_part(row, vocabulary, VEC)
    out_first = out + b_head
    if SAME_ALIGNMENT:
        out_first = tl.multiple_of(out_first, 16)
    m = tl.load(row_max + i_row)
    inverse_s = 1.0 / tl.load(row_sum + i_row)
    b_scale = tl.load(scale + i_sequence)
    stop = tl.minimum(start + chunk, b_whole)
    whole_tiles = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for i in range(start, whole_tiles, BLOCK):
        b_x = tl.load(first + i + o_tile)
        b_g = softmax_minus_onehot(b_x, o_tile, b_label - b_head - i, m, inverse_s, b_scale)
        tl.store(out_first + i + o_tile, b_g.to(gradient.dtype.element_ty))
    m_tile = (whole_tiles + o_lane < stop)[:, None]
    b_x = tl.load(first + whole_tiles + o_tile, mask=m_tile, other=0)
    b_g = softmax_minus_onehot(b_x, o_tile, b_label - b_head - whole_tiles, m, inverse_s, b_scale)
    tl.store(out_first + whole_tiles + o_tile, b_g.to(gradient.dtype.element_ty), mask=m_tile)
    if i_split == 0:
        o_ragged, m_ragged = ragged_offsets(vocabulary, b_head, b_whole, LANES)
        b_ragged = tl.load(row + o_ragged, mask=m_ragged, other=0)
        b_ragged = softmax_minus_onehot(b_ragged, o_ragged, b_label, m, inverse_s, b_scale)
        tl.store(out + o_ragged, b_ragged.to(gradient.dtype.element_ty), mask=m_ragged)


def logps_backward(
    scale: torch.Tensor,  # (S,) d logits[row] = scale[sequence] * (softmax - onehot)
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    row_max: torch.Tensor,  # (R,)
    row_sum: torch.Tensor,  # (R,)
    shift: bool,
    ignore_index: int,
    inplace: bool,
) -> torch.Tensor:
    """The gradient, zero on rows that predict nothing; over the logits' storage with `inplace`."""
    gradient = logits if inplace else like_rows(logits)
    rows, vocabulary = labels.numel(), logits.shape[-1]
    if rows == 0:
        return gradient
    parameters = config.launch("gradient", logits.device, logits.dtype)
    splits, chunk = config.split_row(logits.device, rows, vocabulary, parameters["BLOCK"])
    gradient_kernel[(rows, splits)](
        logits,
        gradient,
        labels.contiguous(),
        starts_of(labels, cu_seqlens),
        scale.to(row_max.dtype).contiguous(),
        row_max,
        row_sum,
        *row_layout(logits, cu_seqlens),
        vocabulary,
        chunk,
        *row_strides(logits),
        *row_strides(gradient),
        ignore_index,
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        SAME_ALIGNMENT=_aligned_alike(logits, gradient),
        VEC=config.vector_width(logits),
        **parameters,
    )
    return gradient


def _aligned_alike(logits: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether every row begins at the same place in 16 bytes in both, also where one of them is a view."""
    apart = [one - other for one, other in zip(row_strides(logits), row_strides(gradient))]
    bytes_apart = [logits.data_ptr() - gradient.data_ptr(), *(steps * logits.element_size() for steps in apart)]
    return all(count % 16 == 0 for count in bytes_apart)
