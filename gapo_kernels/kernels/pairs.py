"""Forward, second launch: from partials to sequence log-probs, margins, gaps, loss, weights and gradient coefficients.

One program a sequence, the policy's and the anchor's: it merges its rows' partials in a fixed order, gathers the label
logits and sums logp = (x_label - m) - log s. The program that finishes last, told by an integer ticket, makes the pairs'
numbers and adds them up in their order: no float atomics, so the same bits on every run. Reads 8 to 16 bytes a row and
part, writes 8 a row (m and s for the backward), whatever V; what counts is how often it waits for them (config.PAIRS).

Scalars are float64: there are few of them, and a loss of 1e-9 keeps its digits. The formulas are objective.py's.
"""

import struct

import torch
import triton
import triton.language as tl

from gapo_kernels.kernels import config
from gapo_kernels.kernels.primitives import exp, float_from_bits, predicted_label, row_offset
from gapo_kernels.kernels.statistics import launch_statistics, row_layout, row_strides, starts_of
from gapo_kernels.objective import PairResults


@triton.jit
def sequence_bounds(i_sequence, cu_seqlens, rows, length, PACKED: tl.constexpr):
    """First row of a sequence, and the first after it."""
    if PACKED:
        begin = tl.load(cu_seqlens + i_sequence).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens + i_sequence + 1).to(tl.int64), rows)
    else:
        begin = i_sequence * length
        end = begin + length
    return begin, end


@triton.jit
def sequence_sum(
    begin,
    end,
    logits,
    labels,
    part_max,  # (splits, R) of one plane
    part_sum,
    row_max,  # (R,) written if STORE
    row_sum,
    rows,
    splits,
    length,
    vocabulary,
    stride_sequence,
    stride_row,
    ignore_index,
    SHIFT: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum of the predicted tokens' log-probs (float64) and their number (int64) over rows begin .. end - 1."""
    rows64 = rows.to(tl.int64)
    b_logps = tl.zeros([ROWS], tl.float64)
    b_count = tl.zeros([ROWS], tl.int64)
    for i in range(begin, end, ROWS):
        o_row = i + tl.arange(0, ROWS).to(tl.int64)
        b_label, m_row = predicted_label(o_row, end, labels, ignore_index, SHIFT)
        b_max = tl.load(part_max + o_row, mask=m_row, other=0)
        b_sum = tl.load(part_sum + o_row, mask=m_row, other=1)
        for i_split in range(1, splits):
            o_part = i_split * rows64 + o_row
            b_part = tl.load(part_max + o_part, mask=m_row, other=0)
            b_new = tl.maximum(b_max, b_part)
            b_sum = b_sum * exp(b_max - b_new)
            b_sum += tl.load(part_sum + o_part, mask=m_row, other=0) * exp(b_part - b_new)
            b_max = b_new
        # A label out of range has no logit: NaN, which the pair's loss then shows without a sync.
        m_label = m_row & (b_label >= 0) & (b_label < vocabulary)
        o_label = row_offset(o_row, length, stride_sequence, stride_row) + b_label
        b_x = tl.load(logits + o_label, mask=m_label, other=float("nan")).to(b_max.dtype)
        b_logp = b_x.to(tl.float64) - b_max.to(tl.float64) - tl.log(b_sum.to(tl.float64))
        b_logps += tl.where(m_row, b_logp, 0)
        b_count += m_row.to(tl.int64)
        if STORE:
            # Rows that predict nothing too: what is returned must not depend on what memory held before.
            m_store = o_row < end
            tl.store(row_max + o_row, b_max, mask=m_store)
            tl.store(row_sum + o_row, b_sum, mask=m_store)
    return tl.sum(b_logps, 0), tl.sum(b_count, 0)


@triton.jit
def sequence_mean(b_sum, b_count, LENGTH_NORMALIZED: tl.constexpr):
    if LENGTH_NORMALIZED:
        b_sum = b_sum / tl.maximum(b_count, 1).to(tl.float64)
    return b_sum


@triton.jit(
    do_not_specialize=["rows", "splits", "length", "vocabulary", "stride_sequence", "stride_row", "ignore_index"]
)
def logps_kernel(
    logits,
    labels,
    cu_seqlens,
    part_max,  # (1, splits, R)
    part_sum,
    logps,  # (S,)
    counts,  # (S,) int64
    row_max,  # (R,)
    row_sum,  # (R,)
    rows,
    splits,
    length,
    vocabulary,
    stride_sequence,
    stride_row,
    ignore_index,
    LENGTH_NORMALIZED: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_sequence = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(i_sequence, cu_seqlens, rows, length, PACKED)
    b_sum, b_count = sequence_sum(
        begin, end, logits, labels, part_max, part_sum, row_max, row_sum, rows, splits, length, vocabulary,
        stride_sequence, stride_row, ignore_index, SHIFT, True, ROWS,
    )  # fmt: skip
    tl.store(logps + i_sequence, sequence_mean(b_sum, b_count, LENGTH_NORMALIZED))
    tl.store(counts + i_sequence, b_count)


@triton.jit
def softplus(z):
    """log(1 + exp(z)) in float64. log1p(e) by log(u) e / (u - 1) with u = 1 + e, exact to rounding for every e."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(z > 0, z, 0.0) + log1p


@triton.jit
def pair_terms(gap, beta, gamma, label_smoothing, HINGE: tl.constexpr):
    """objective.pair_terms: loss and weight = -dL/dM of one pair."""
    z = beta * gap - gamma
    if HINGE:
        loss = tl.where(z >= 1, 0.0, 1 - z)
        weight = tl.where(z != z, z, tl.where(z < 1, beta, 0.0))
    else:
        loss = (1 - label_smoothing) * softplus(-z)
        loss += tl.where(label_smoothing > 0, label_smoothing * softplus(z), 0.0)
        e = tl.exp(-tl.abs(z))
        weight = beta * (tl.where(z >= 0, e, 1.0) / (1.0 + e) - label_smoothing)
    return loss, weight


@triton.jit(
    do_not_specialize=[
        "pairs",
        "rows",
        "splits",
        "length",
        "vocabulary",
        "stride_sequence",
        "stride_row",
        "anchor_stride_sequence",
        "anchor_stride_row",
        "ignore_index",
        "beta_bits",
        "gamma_bits",
        "label_smoothing_bits",
        "sft_weight_bits",
    ]
)
def pairs_kernel(
    logits,
    anchor_logits,
    given_margin,  # (B,) the anchor's margin, read if GIVEN
    labels,
    cu_seqlens,
    part_max,  # (planes, splits, R)
    part_sum,
    ticket,  # (1,) int32, 0
    sums,  # (planes, 2B) float64 scratch: the log-probs' of each sequence
    pair_terms_f64,  # (2, B) float64 scratch: loss and weight of each pair
    counts,  # (2B,) int64 scratch
    loss,  # () or (B,)
    chosen_logps,  # (B,), like all up to weight
    rejected_logps,
    margin,
    anchor_margin,
    gap,
    weight,
    sft_loss,  # ()
    valid,  # (B,) bool
    coefficients,  # (2B,)
    row_max,  # (R,)
    row_sum,  # (R,)
    pairs,
    rows,
    splits,
    length,
    vocabulary,
    stride_sequence,
    stride_row,
    anchor_stride_sequence,
    anchor_stride_row,
    ignore_index,
    beta_bits,
    gamma_bits,
    label_smoothing_bits,
    sft_weight_bits,
    ANCHOR: tl.constexpr,
    GIVEN: tl.constexpr,
    HINGE: tl.constexpr,
    MEAN: tl.constexpr,
    LENGTH_NORMALIZED: tl.constexpr,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    sequences = 2 * pairs.to(tl.int64)
    i_sequence = i_program % sequences
    begin, end = sequence_bounds(i_sequence, cu_seqlens, rows, length, PACKED)
    if i_program < sequences:
        b_sum, b_count = sequence_sum(
            begin, end, logits, labels, part_max, part_sum, row_max, row_sum, rows, splits, length, vocabulary,
            stride_sequence, stride_row, ignore_index, SHIFT, True, ROWS,
        )  # fmt: skip
        tl.store(counts + i_sequence, b_count)
    else:
        plane = splits.to(tl.int64) * rows
        b_sum, b_count = sequence_sum(
            begin, end, anchor_logits, labels, part_max + plane, part_sum + plane, row_max, row_sum, rows, splits,
            length, vocabulary, anchor_stride_sequence, anchor_stride_row, ignore_index, SHIFT, False, ROWS,
        )  # fmt: skip
    tl.store(sums + i_program, b_sum)

    # Last program out: every thread's stores stand before the ticket is drawn (barrier, then release), and the loads
    # below come from L2, past what this processor's L1 may hold of the others' memory.
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket, 1, sem="acq_rel")
    if drawn == tl.num_programs(0) - 1:
        finish_batch(
            sums, counts, given_margin, pair_terms_f64, loss, chosen_logps, rejected_logps, margin, anchor_margin, gap,
            weight, sft_loss, valid, coefficients, pairs.to(tl.int64), float_from_bits(beta_bits),
            float_from_bits(gamma_bits), float_from_bits(label_smoothing_bits), float_from_bits(sft_weight_bits),
            ANCHOR, GIVEN, HINGE, MEAN, LENGTH_NORMALIZED, ROWS,
        )  # fmt: skip


@triton.jit
def means_of_pairs(sums, b_count_c, b_count_r, o_pair, m_pair, pairs, LENGTH_NORMALIZED: tl.constexpr):
    """Log-probs of chosen and of rejected sequences, and the former's sums."""
    b_sum_c = tl.load(sums + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
    b_sum_r = tl.load(sums + pairs + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
    b_chosen = sequence_mean(b_sum_c, b_count_c, LENGTH_NORMALIZED)
    return b_chosen, sequence_mean(b_sum_r, b_count_r, LENGTH_NORMALIZED), b_sum_c


@triton.jit
def finish_batch(
    sums,
    counts,
    given_margin,
    pair_terms_f64,
    loss,
    chosen_logps,
    rejected_logps,
    margin,
    anchor_margin,
    gap,
    weight,
    sft_loss,
    valid,
    coefficients,
    pairs,
    beta,
    gamma,
    label_smoothing,
    sft_weight,
    ANCHOR: tl.constexpr,
    GIVEN: tl.constexpr,
    HINGE: tl.constexpr,
    MEAN: tl.constexpr,
    LENGTH_NORMALIZED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """objective.pair_results, from every sequence's sum, the pairs in their order."""
    b_losses = tl.zeros([PAIRS], tl.float64)
    b_nlls = tl.zeros([PAIRS], tl.float64)
    b_valids = tl.zeros([PAIRS], tl.int64)
    b_tokens = tl.zeros([PAIRS], tl.int64)
    for i in range(0, pairs, PAIRS):
        o_pair = i + tl.arange(0, PAIRS)
        m_pair = o_pair < pairs
        b_count_c = tl.load(counts + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
        b_count_r = tl.load(counts + pairs + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
        b_chosen, b_rejected, b_sum_c = means_of_pairs(
            sums, b_count_c, b_count_r, o_pair, m_pair, pairs, LENGTH_NORMALIZED
        )
        b_margin = b_chosen - b_rejected
        if GIVEN:
            b_anchor = tl.load(given_margin + o_pair, mask=m_pair, other=0).to(tl.float64)
        elif ANCHOR:
            b_anchor_c, b_anchor_r, _ = means_of_pairs(
                sums + 2 * pairs, b_count_c, b_count_r, o_pair, m_pair, pairs, LENGTH_NORMALIZED
            )
            b_anchor = b_anchor_c - b_anchor_r
        else:
            b_anchor = tl.zeros([PAIRS], tl.float64)
        b_gap = b_margin - b_anchor
        m_valid = (b_count_c > 0) & (b_count_r > 0)
        b_loss, b_weight = pair_terms(b_gap, beta, gamma, label_smoothing, HINGE)
        b_loss = tl.where(m_valid, b_loss, 0.0)
        tl.store(chosen_logps + o_pair, b_chosen, mask=m_pair)
        tl.store(rejected_logps + o_pair, b_rejected, mask=m_pair)
        tl.store(margin + o_pair, b_margin, mask=m_pair)
        tl.store(anchor_margin + o_pair, b_anchor, mask=m_pair)
        tl.store(gap + o_pair, b_gap, mask=m_pair)
        b_weight = tl.where(m_valid, b_weight, 0.0)
        tl.store(weight + o_pair, b_weight, mask=m_pair)
        tl.store(valid + o_pair, m_valid, mask=m_pair)
        tl.store(pair_terms_f64 + o_pair, b_loss, mask=m_pair)
        tl.store(pair_terms_f64 + pairs + o_pair, b_weight, mask=m_pair)
        b_losses += b_loss
        b_nlls += tl.where(m_valid, -b_sum_c, 0.0)
        b_valids += m_valid.to(tl.int64)
        b_tokens += tl.where(m_valid, b_count_c, 0)
    n_valid = tl.maximum(tl.sum(b_valids, 0), 1).to(tl.float64)
    n_tokens = tl.maximum(tl.sum(b_tokens, 0), 1).to(tl.float64)
    nll = tl.sum(b_nlls, 0) / n_tokens
    use_sft = sft_weight > 0
    tl.store(sft_loss, tl.where(use_sft, nll, 0.0))
    if MEAN:
        tl.store(loss, tl.sum(b_losses, 0) / n_valid + tl.where(use_sft, sft_weight * nll, 0.0))
    tl.debug_barrier()  # a pair's terms may have been stored by another thread than the one that loads them
    for i in range(0, pairs, PAIRS):
        o_pair = i + tl.arange(0, PAIRS)
        m_pair = o_pair < pairs
        b_chosen = tl.load(counts + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
        b_rejected = tl.load(counts + pairs + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
        m_valid = (b_chosen > 0) & (b_rejected > 0)
        b_share = tl.load(pair_terms_f64 + pairs + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
        b_sft = tl.where(m_valid, sft_weight / n_tokens, 0.0)
        if MEAN:
            b_share = b_share / n_valid
        else:
            b_sft = b_sft * n_valid
            b_loss = tl.load(pair_terms_f64 + o_pair, mask=m_pair, other=0, cache_modifier=".cg")
            b_nll = tl.where(m_valid, -tl.load(sums + o_pair, mask=m_pair, other=0, cache_modifier=".cg"), 0.0)
            tl.store(loss + o_pair, b_loss + tl.where(use_sft, b_sft * b_nll, 0.0), mask=m_pair)
        tl.store(coefficients + o_pair, sequence_mean(b_share, b_chosen, LENGTH_NORMALIZED) + b_sft, mask=m_pair)
        tl.store(coefficients + pairs + o_pair, -sequence_mean(b_share, b_rejected, LENGTH_NORMALIZED), mask=m_pair)


def logps_forward(
    logits: torch.Tensor,  # (S, T, V) or (N, V)
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    length_normalized: bool,
    shift: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """s (S,), counts (S,) int64, and per row (R,) the maximum and sum that the backward needs."""
    labels = labels.contiguous()
    part_max, part_sum, _ = launch_statistics(logits, None, labels, cu_seqlens, shift, ignore_index)
    sequences, length = row_layout(logits, cu_seqlens)
    dtype, device, rows = part_max.dtype, logits.device, labels.numel()
    logps = torch.empty(sequences, dtype=dtype, device=device)
    counts = torch.empty(sequences, dtype=torch.int64, device=device)
    row_max, row_sum = _row_statistics(part_max, cu_seqlens)
    if sequences:
        logps_kernel[(sequences,)](
            logits,
            labels,
            starts_of(labels, cu_seqlens),
            part_max,
            part_sum,
            logps,
            counts,
            row_max,
            row_sum,
            rows,
            part_max.shape[1],
            length,
            logits.shape[-1],
            *row_strides(logits),
            ignore_index,
            LENGTH_NORMALIZED=length_normalized,
            SHIFT=int(shift),
            PACKED=cu_seqlens is not None,
            **config.pairs(device),
        )
    return logps, counts, row_max, row_sum


def _row_statistics(part_max: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the rows' maxima and sums. Packed rows beyond the last sequence are nobody's to write: zeros."""
    new = torch.empty if cu_seqlens is None else torch.zeros
    return tuple(new(part_max.shape[-1], dtype=part_max.dtype, device=part_max.device) for _ in range(2))


def loss_forward(
    logits: torch.Tensor,  # (2B, T, V) or (N, V)
    labels: torch.Tensor,
    anchor_logits: torch.Tensor | None,
    anchor_margin: torch.Tensor | None,  # (B,)
    cu_seqlens: torch.Tensor | None,
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    sft_weight: float,
    shift: bool,
    ignore_index: int,
    reduction: str,
) -> tuple[PairResults, torch.Tensor, torch.Tensor]:
    """Every field of the output with the gradient's coefficients, and per row (R,) the maximum and sum."""
    labels = labels.contiguous()
    part_max, part_sum, ticket = launch_statistics(logits, anchor_logits, labels, cu_seqlens, shift, ignore_index)
    sequences, length = row_layout(logits, cu_seqlens)
    pairs, dtype, device = sequences // 2, part_max.dtype, logits.device

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    results = PairResults(
        new() if reduction == "mean" else new(pairs),
        *(new(pairs) for _ in range(6)),
        new(),
        new(pairs, dtype=torch.bool),
        new(2 * pairs),
    )
    row_max, row_sum = _row_statistics(part_max, cu_seqlens)
    anchor = logits if anchor_logits is None else anchor_logits
    planes = 1 if anchor_logits is None else 2
    pairs_kernel[(planes * sequences,)](
        logits,
        anchor,
        results.margin if anchor_margin is None else anchor_margin.contiguous(),
        labels,
        starts_of(labels, cu_seqlens),
        part_max,
        part_sum,
        ticket,
        new(planes, sequences, dtype=torch.float64),
        new(2, pairs, dtype=torch.float64),
        new(2 * pairs, dtype=torch.int64),
        *results,
        row_max,
        row_sum,
        pairs,
        labels.numel(),
        part_max.shape[1],
        length,
        logits.shape[-1],
        *row_strides(logits),
        *row_strides(anchor),
        ignore_index,
        *(struct.unpack("<q", struct.pack("<d", value))[0] for value in (beta, gamma, label_smoothing, sft_weight)),
        ANCHOR=anchor_logits is not None,
        GIVEN=anchor_margin is not None,
        HINGE=loss_type == "hinge",
        MEAN=reduction == "mean",
        LENGTH_NORMALIZED=length_normalized,
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        **config.pairs(device),
    )
    return results, row_max, row_sum
