"""Forward, first launch: online softmax partials of every predicting row, policy and anchor in one grid.

    m = max_j x_j,  s = sum_j exp(x_j - m)      over a part of the row; merged by the second launch (pairs.py)

Reads 2 N_valid V b bytes (policy and anchor, b bytes a logit) once, writes 8 bytes a row and part: bandwidth is the
floor. A row that predicts nothing costs its label.

The running maximum and sum are kept per lane, a lane being one 16-byte vector of the tile, so that the loop has no
step across threads; the lanes meet once, at the end.
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

UNSPECIALIZED = [
    "sequences",
    "length",
    "vocabulary",
    "chunk",
    "stride_sequence",
    "stride_row",
    "anchor_stride_sequence",
    "anchor_stride_row",
    "ignore_index",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    logits,  # (2B, T, V) or (N, V), last dimension contiguous
    anchor_logits,  # like logits; read by the programs of axis 2's second plane
    labels,  # (R,) flat
    cu_seqlens,  # (S + 1,)
    part_max,  # (planes, splits, R) float32, or float64 for float64 logits
    part_sum,  # (planes, splits, R)
    ticket,  # (1,) int32, set to 0 for the second launch
    sequences,
    length,
    vocabulary,
    chunk,
    stride_sequence,
    stride_row,
    anchor_stride_sequence,
    anchor_stride_row,
    ignore_index,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    i_plane = tl.program_id(2)
    if (i_row == 0) & (i_split == 0) & (i_plane == 0):
        tl.store(ticket, 0)
    i_sequence, end = sequence_of_row(i_row, cu_seqlens, sequences, length, PACKED)
    _, predicted = predicted_label(i_row, end, labels, ignore_index, SHIFT)
    if not predicted:
        return

    # Chosen by address: a branch that yields a pointer stops Triton 3.6's compiler for AMD.
    policy_row = row_address(logits, i_row, length, stride_sequence, stride_row)
    anchor_row = row_address(anchor_logits, i_row, length, anchor_stride_sequence, anchor_stride_row)
    row = tl.where(i_plane == 1, anchor_row, policy_row).to(logits.dtype)
    first, b_head, b_whole = aligned_part(row, vocabulary, VEC)

    ACC: tl.constexpr = part_max.dtype.element_ty
    LANES: tl.constexpr = BLOCK // VEC
    o_lane = tl.arange(0, LANES) * VEC
    o_tile = o_lane[:, None] + tl.arange(0, VEC)[None, :]
    # The lowest finite number, not -inf: -inf - -inf is NaN, and rows may hold nothing but -inf or the lowest number.
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    b_max = tl.full([LANES], LOWEST, ACC)
    b_sum = tl.zeros([LANES], ACC)

    start = tl.multiple_of(i_split * chunk, 16)  # chunk is a multiple of BLOCK, which the compiler cannot know
    stop = tl.minimum(start + chunk, b_whole)
    whole_tiles = start + tl.maximum(stop - start, 0) // BLOCK * BLOCK
    for i in range(start, whole_tiles, BLOCK):
        b_x = tl.load(first + i + o_tile).to(ACC)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_sum = b_sum * exp(b_max - b_new) + tl.sum(exp(b_x - b_new[:, None]), 1)
        b_max = b_new
    # The mask is the same for all of a vector, which keeps the load 16 bytes wide.
    m_lane = whole_tiles + o_lane < stop
    b_x = tl.load(first + whole_tiles + o_tile, mask=m_lane[:, None], other=-float("inf")).to(ACC)
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_sum = b_sum * exp(b_max - b_new) + tl.sum(exp(b_x - b_new[:, None]), 1)
    b_max = b_new
    if i_split == 0:
        o_ragged, m_ragged = ragged_offsets(vocabulary, b_head, b_whole, LANES)
        b_ragged = tl.load(row + o_ragged, mask=m_ragged, other=-float("inf")).to(ACC)
        b_new = tl.maximum(b_max, b_ragged)
        b_sum = b_sum * exp(b_max - b_new) + exp(b_ragged - b_new)
        b_max = b_new

    m = tl.max(b_max, 0)
    s = tl.sum(b_sum * exp(b_max - m), 0)
    o_part = (i_plane * tl.num_programs(1) + i_split).to(tl.int64) * tl.num_programs(0) + i_row
    tl.store(part_max + o_part, m)
    tl.store(part_sum + o_part, s)


def launch_statistics(
    logits: torch.Tensor,
    anchor_logits: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    shift: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """part_max and part_sum (planes, splits, R), of which only predicting rows are written, and the zero ticket."""
    planes = 1 if anchor_logits is None else 2
    rows, vocabulary = labels.numel(), logits.shape[-1]
    parameters = config.launch("statistics", logits.device, logits.dtype)
    splits, chunk = config.split_row(logits.device, rows * planes, vocabulary, parameters["BLOCK"])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    part_max = torch.empty(planes, splits, rows, dtype=dtype, device=logits.device)
    part_sum = torch.empty_like(part_max)
    if rows == 0:
        return part_max, part_sum, torch.zeros(1, dtype=torch.int32, device=logits.device)
    ticket = torch.empty(1, dtype=torch.int32, device=logits.device)
    anchor = logits if anchor_logits is None else anchor_logits
    statistics_kernel[(rows, splits, planes)](
        logits,
        anchor,
        labels,
        starts_of(labels, cu_seqlens),
        part_max,
        part_sum,
        ticket,
        *row_layout(logits, cu_seqlens),
        vocabulary,
        chunk,
        *row_strides(logits),
        *row_strides(anchor),
        ignore_index,
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        VEC=config.vector_width(logits),
        **parameters,
    )
    return part_max, part_sum, ticket


def starts_of(labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """What to pass for cu_seqlens: contiguous, as the kernels read it; padded rows have none and pass what is at hand."""
    return labels if cu_seqlens is None else cu_seqlens.contiguous()


def row_layout(logits: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """(sequences, length): with packed rows, length is that of the one stretch that they form, for addressing."""
    if cu_seqlens is None:
        return logits.shape[0], logits.shape[1]
    return cu_seqlens.shape[0] - 1, logits.shape[0]


def row_strides(logits: torch.Tensor) -> tuple[int, int]:
    """(stride of a sequence, stride of a row), in elements."""
    return (logits.stride(0), logits.stride(1)) if logits.dim() == 3 else (0, logits.stride(0))
