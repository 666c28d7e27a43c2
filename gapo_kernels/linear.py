"""`fused_linear_gapo_loss` and `linear_sequence_logps`: from hidden states and the LM head, without all logits."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from gapo_kernels import cpu, linear_engine, ops, reference, validation
from gapo_kernels.head import Head, VocabularyShard
from gapo_kernels.layout import sequence_count
from gapo_kernels.leaf_uses import will_run
from gapo_kernels.objective import gapo_objective, margin_shares, sequence_means, sft_terms
from gapo_kernels.outputs import GAPOOutput

# How many rows predict a token is asked of the device: what captures CUDA graphs (torch.compile's "reduce-overhead") must
# leave these operators out.
TAGS = (torch.Tag.cudagraph_unsafe,)


def _head(weight, bias, softcap, logit_scale, max_logits_bytes, group_name, backend) -> tuple[Head, int]:
    """And the budget: of several ranks the least, for they must cut their tiles alike."""
    shard, budget = _shard(weight, max_logits_bytes, group_name)
    return Head(weight.detach(), bias, softcap, logit_scale, ops.launchers(backend, weight.device), shard), budget


def _shard(weight: Tensor, budget: int, group_name: str | None) -> tuple[VocabularyShard | None, int]:
    if group_name is None:
        return None, budget
    group = torch.distributed.distributed_c10d._resolve_process_group(group_name)
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    numbers = torch.zeros(2, ranks, dtype=torch.int64, device=weight.device)
    numbers[0, rank], numbers[1, rank] = weight.shape[0], budget
    torch.distributed.all_reduce(numbers, group=group)
    sizes, budgets = numbers.tolist()
    return VocabularyShard(group, sum(sizes[:rank]), max(sizes), sum(sizes)), min(budgets)


def _all_rows(values: Tensor, rows: linear_engine.Rows, count: int) -> Tensor:
    """(K, ...) spread to all rows: a shape that does not depend on the labels, for the compiler."""
    every = values.new_zeros(count, *values.shape[1:])
    every[rows.index] = values
    return every


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors only: an empty one stands for None."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("gapo_kernels::linear_loss_forward", mutates_args=(), tags=TAGS)
def linear_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    anchor_hidden: Optional[Tensor],
    anchor_weight: Optional[Tensor],
    anchor_margin: Optional[Tensor],
    bias: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    softcap: Optional[float],
    logit_scale: float,
    max_logits_bytes: int,
    group_name: Optional[str],
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    sft_weight: float,
    shift: bool,
    ignore_index: int,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """PairResults' ten fields, then per row (all of them) the shift and total, then d hidden, d weight, d bias: of
    16-bit operands in float32, so that they are rounded once, after the upstream gradient is folded in."""
    head, max_logits_bytes = _head(weight, bias, softcap, logit_scale, max_logits_bytes, group_name, backend)
    validation.check_values(labels, head.vocabulary, cu_seqlens, shift, ignore_index)
    rows = linear_engine.find_rows(labels, cu_seqlens, shift, ignore_index, in_pairs=True)
    with ops.on(hidden.device), torch.autocast(hidden.device.type, enabled=False):
        results = linear_engine.loss(
            hidden.detach(),
            rows,
            head,
            None if anchor_hidden is None else anchor_hidden.detach(),
            head if anchor_weight is None else head._replace(weight=anchor_weight.detach()),
            anchor_margin,
            max_logits_bytes,
            dict(
                beta=beta,
                gamma=gamma,
                label_smoothing=label_smoothing,
                loss_type=loss_type,
                length_normalized=length_normalized,
                sft_weight=sft_weight,
                reduction="mean",
            ),
            needs,
        )
    d_hidden, *others = results.gradients
    if d_hidden is not None:
        d_hidden = d_hidden.view(hidden.shape)
    statistics = [_all_rows(values, rows, labels.numel()) for values in (results.shift, results.total)]
    return [*results.fields, *statistics, *(_present(gradient, hidden) for gradient in (d_hidden, *others))]


@linear_loss_forward.register_fake
def _(hidden, weight, labels, anchor_hidden, anchor_weight, anchor_margin, bias, cu_seqlens, *options):
    dtype, needs = cpu.accumulation_dtype(hidden), options[-2]
    pairs = sequence_count(labels, cu_seqlens) // 2
    gradients = (hidden, weight, hidden if bias is None else bias)
    return [
        hidden.new_empty((), dtype=dtype),
        *(hidden.new_empty(pairs, dtype=dtype) for _ in range(6)),
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(pairs, dtype=torch.bool),
        hidden.new_empty(2 * pairs, dtype=dtype),
        *(hidden.new_empty(labels.numel(), dtype=dtype) for _ in range(2)),
        *(like.new_empty(like.shape, dtype=dtype) if n else hidden.new_empty(0) for like, n in zip(gradients, needs)),
    ]


@torch.library.custom_op("gapo_kernels::linear_logps_forward", mutates_args=(), tags=TAGS)
def linear_logps_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    anchor_hidden: Optional[Tensor],
    anchor_weight: Optional[Tensor],
    softcap: Optional[float],
    logit_scale: float,
    max_logits_bytes: int,
    group_name: Optional[str],
    length_normalized: bool,
    shift: bool,
    ignore_index: int,
    needs: list[bool],
    keep: bool,
    backend: str,
) -> list[Tensor]:
    """s (S,), counts (S,), the anchor's s (S,); per row (all of them) the shift, the total and d hidden at scale 1; kept
    logits (K, V). With `keep`, whose shapes may depend on the labels, d hidden of the K kept rows alone."""
    head, max_logits_bytes = _head(weight, bias, softcap, logit_scale, max_logits_bytes, group_name, backend)
    validation.check_values(labels, head.vocabulary, cu_seqlens, shift, ignore_index)
    rows = linear_engine.find_rows(labels, cu_seqlens, shift, ignore_index, in_pairs=False)

    def means(sums: Tensor) -> Tensor:
        return sequence_means(sums, rows.counts, length_normalized).to(cpu.accumulation_dtype(hidden), copy=True)

    anchor = None
    with ops.on(hidden.device), torch.autocast(hidden.device.type, enabled=False):
        if anchor_hidden is not None:  # before the policy's logits are kept
            anchor_head = head if anchor_weight is None else head._replace(weight=anchor_weight.detach())
            nothing = [False] * len(needs)
            anchor = linear_engine.logps(anchor_hidden.detach(), rows, anchor_head, max_logits_bytes, nothing, False)
        results = linear_engine.logps(hidden.detach(), rows, head, max_logits_bytes, needs, keep)
    unit = results.unit if keep or results.unit is None else _all_rows(results.unit, rows, labels.numel())
    statistics = [_all_rows(values, rows, labels.numel()) for values in (results.shift, results.total)]
    logps = means(results.sums), rows.counts, hidden.new_empty(0) if anchor is None else means(anchor.sums)
    return [*logps, *statistics, _present(unit, hidden), _present(results.logits, hidden)]


@linear_logps_forward.register_fake
def _(hidden, weight, labels, bias, cu_seqlens, anchor_hidden, *options):
    dtype, needs = cpu.accumulation_dtype(hidden), options[-3]
    sequences, every = sequence_count(labels, cu_seqlens), labels.numel()
    return [
        hidden.new_empty(sequences, dtype=dtype),
        hidden.new_empty(sequences, dtype=torch.int64),
        hidden.new_empty(0) if anchor_hidden is None else hidden.new_empty(sequences, dtype=dtype),
        *(hidden.new_empty(every, dtype=dtype) for _ in range(2)),
        hidden.new_empty((every, hidden.shape[-1]), dtype=dtype) if needs[0] else hidden.new_empty(0),
        hidden.new_empty(0),
    ]


@torch.library.custom_op("gapo_kernels::linear_logps_backward", mutates_args=(), tags=TAGS)
def linear_logps_backward(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    row_shift: Tensor,
    row_total: Tensor,
    unit: Tensor,
    logits: Tensor,
    softcap: Optional[float],
    logit_scale: float,
    max_logits_bytes: int,
    group_name: Optional[str],
    shift: bool,
    ignore_index: int,
    needs: list[bool],
    in_pairs: bool,
    length_normalized: Optional[bool],
    backend: str,
) -> list[Tensor]:
    """d hidden, d weight and d bias of sum(scale[sequence] * -log-prob). length_normalized: of the margins, if the scales
    of a pair are its margin's shares but for a factor."""
    rows = linear_engine.find_rows(labels, cu_seqlens, shift, ignore_index, in_pairs)
    head, max_logits_bytes = _head(weight, bias, softcap, logit_scale, max_logits_bytes, group_name, backend)
    with ops.on(hidden.device), torch.autocast(hidden.device.type, enabled=False):
        d_hidden, *others = linear_engine.logps_gradients(
            hidden.detach(),
            rows,
            head,
            max_logits_bytes,
            scale,
            row_shift[rows.index],
            row_total[rows.index],
            None if unit.dim() != 2 else unit if unit.shape[0] == rows.index.shape[0] else unit[rows.index],
            logits if logits.dim() == 2 else None,
            needs,
            in_pairs,
            None if length_normalized is None else margin_shares(rows.counts, length_normalized),
        )
    if d_hidden is not None:
        d_hidden = d_hidden.view(hidden.shape)
    return [_present(gradient, hidden) for gradient in (d_hidden, *others)]


@linear_logps_backward.register_fake
def _(scale, hidden, weight, labels, bias, *options):
    gradients, needs = (hidden, weight, hidden if bias is None else bias), options[-4]
    return [like.new_empty(like.shape if needed else 0) for like, needed in zip(gradients, needs)]


def _once_differentiable(*_):
    raise RuntimeError(
        "fused_linear_gapo_loss and linear_sequence_logps are differentiable once; for a gradient of their gradient use "
        "gapo_kernels.reference"
    )


linear_logps_backward.register_autograd(_once_differentiable)


def _needs(*tensors: Tensor | None) -> list[bool]:
    """Which gradients will be asked for. Asked outside of the Function: in its forward grad mode is off in any case."""
    return [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors]


def _needed_now(ctx, needs: list[bool]) -> list[bool]:
    """Without what this backward does not ask for: gapo_step's probe wants no gradient of a head that does not move."""
    if torch.compiler.is_compiling():
        return needs
    return [needed and will_run(ctx.next_functions[i][0]) for i, needed in enumerate(needs)]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, anchors, cu_seqlens, head_options, loss_options, layout, needs, backend
    ):
        *fields, coefficients, row_shift, row_total, d_hidden, d_weight, d_bias = linear_loss_forward(
            hidden, weight, labels, *anchors, bias, cu_seqlens, *head_options, *loss_options, *layout, needs, backend
        )
        ctx.mark_non_differentiable(*fields[1:])
        gradients = [g if needed else None for g, needed in zip((d_hidden, d_weight, d_bias), needs)]
        ctx.compiled = torch.compiler.is_compiling()
        # In eager mode they are handed over to the first backward. Saved, autograd would copy them.
        ctx.ready = None if ctx.compiled else gradients
        ctx.save_for_backward(
            hidden, weight, bias, labels, cu_seqlens, coefficients, row_shift, row_total, *(gradients * ctx.compiled)
        )
        ctx.options, ctx.dtype = (*head_options, *layout), hidden.dtype
        *_, length_normalized, sft_weight = loss_options
        ctx.of_margins = None if sft_weight else length_normalized
        ctx.needs, ctx.backend = needs, backend
        return tuple(fields)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.compiled:
            d_hidden, *others = ctx.saved_tensors[8:]
            if d_hidden is not None:  # 0 * NaN, as below
                d_hidden = torch.where(d_hidden == 0, 0, d_hidden * grad_loss).to(ctx.dtype)
            return (d_hidden, *(None if g is None else (g * grad_loss).to(ctx.dtype) for g in others), *[None] * 8)
        if torch.is_grad_enabled():
            _once_differentiable()
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:  # again on the same graph
            hidden, weight, bias, labels, cu_seqlens, coefficients, row_shift, row_total = ctx.saved_tensors
            nothing = hidden.new_empty(0)
            results = linear_logps_backward(
                (coefficients * grad_loss).masked_fill(coefficients == 0, 0),
                hidden,
                weight,
                labels,
                bias,
                cu_seqlens,
                row_shift,
                row_total,
                nothing,
                nothing,
                *ctx.options,
                ctx.needs,
                True,
                ctx.of_margins,
                ctx.backend,
            )
            gradients = [g if needed else None for g, needed in zip(results, ctx.needs)]
        else:
            for i, gradient in enumerate(gradients):
                gradients[i] = None if gradient is None else _scaled(gradient, grad_loss, ctx.dtype, zeros_stay=i == 0)
        return (*gradients, *[None] * 8)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, zeros_stay: bool) -> Tensor:
    """gradient * scale, rounded to dtype; over the gradient where that is its own. zeros_stay: whatever the scale is, as
    rows that predict nothing have no gradient."""
    on_cpu = scale.device.type == "cpu"  # a GPU's scale would have to be waited for
    zeros = gradient == 0 if zeros_stay and not (on_cpu and scale.isfinite()) else None
    if on_cpu:
        out = (gradient if scale.item() == 1 else gradient.mul_(scale)).to(dtype)
    else:
        out = gradient if gradient.dtype == dtype else gradient.new_empty(gradient.shape, dtype=dtype)
        torch.mul(gradient, scale, out=out)
    return out if zeros is None else out.masked_fill_(zeros, 0)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, anchors, cu_seqlens, head_options, length_normalized, layout, needs, backend
    ):
        keep, normalized = not torch.compiler.is_compiling(), length_normalized
        logps, counts, anchor_logps, row_shift, row_total, unit, logits = linear_logps_forward(
            hidden, weight, labels, bias, cu_seqlens, *anchors, *head_options, normalized, *layout, needs, keep, backend
        )
        ctx.mark_non_differentiable(counts, anchor_logps)
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, counts, row_shift, row_total, unit, logits)
        ctx.options, ctx.length_normalized = (*head_options, *layout), length_normalized
        ctx.needs, ctx.backend = needs, backend
        return logps, counts, anchor_logps

    @staticmethod
    def backward(ctx, grad_logps, *_):
        return _LinearLogps._gradients(ctx, ctx.saved_tensors, grad_logps, _needed_now(ctx, ctx.needs))

    @staticmethod
    def parameter_gradients(ctx, saved, grad_logps, *_):
        """`backward` without d hidden, also outside of one: what leaf_uses asks for."""
        return _LinearLogps._gradients(ctx, saved, grad_logps, [False, *ctx.needs[1:]])

    @staticmethod
    def _gradients(ctx, saved, grad_logps, needs):
        hidden, weight, bias, labels, cu_seqlens, counts, row_shift, row_total, unit, logits = saved
        scale = -grad_logps / counts.clamp(min=1) if ctx.length_normalized else -grad_logps
        results = linear_logps_backward(
            scale,
            hidden,
            weight,
            labels,
            bias,
            cu_seqlens,
            row_shift,
            row_total,
            unit,
            logits,
            *ctx.options,
            needs,
            False,
            None,
            ctx.backend,
        )
        return (*(g if needed else None for g, needed in zip(results, needs)), *[None] * 8)


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
    length_normalized: bool = True,
    shift: bool = True,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    return_counts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`sequence_logps` from hidden states and the LM head, never with more logits in memory than a budget.

    logits = cap(logit_scale * (hidden @ weight^T + bias)) with cap(x) = softcap * tanh(x / softcap); rows that predict
    nothing are left out before any GEMM. Any number of backwards may run on one graph: d log-prob / d hidden is made in
    the forward, once, and scaled by each; for d weight the logits are kept if they fit (not in compiled code, whose
    shapes may not depend on the labels), or computed again. Between the two it holds d log-prob / d hidden of the rows
    that predict, (K, H) in float32 at least, beyond the budget. The kept rows are counted: on a GPU that waits for it,
    and cannot be captured in a CUDA graph.

    Args:
        hidden: (S, T, H) floating, the last hidden states; or (N, H) with `cu_seqlens`.
        weight: (V, H) of hidden's dtype, the LM head's. A tied embedding is fine: its gradients add up.
        labels: (S, T) int64, or (N,); `ignore_index` on prompt and padding.
        bias: (V,), the head's.
        softcap: > 0, as Gemma-2's final_logit_softcapping.
        logit_scale: not 0, as Cohere's logit_scale, or 1 / Granite's logits_scaling.
        max_logits_bytes: at most this much logits at a time; one logit or more. For fewer than 16 rows' it is slow, and
            d weight, which adds up tile after tile, loses digits over thousands of rows. Of ranks that differ the least.
        vocab_parallel_group: the ranks over which the rows of weight (and bias) are sharded, in their order; hidden and
            labels are the same on all of them, and d hidden comes out whole on all of them. The head may be a DTensor
            with placements (Shard(0),), or this rank's rows.
        length_normalized, shift, ignore_index, cu_seqlens, return_counts, backend: as in `sequence_logps`.

    Returns:
        (S,) float32, or float64 for float64 inputs; with return_counts also (S,) int64. Differentiable once in hidden,
        weight and bias.

    Raises:
        ValueError, TypeError: as `sequence_logps`; TypeError for a head that is a DTensor, quantised, or a module.
    """
    validation.check_group(vocab_parallel_group)
    weight, bias = _own_rows(vocab_parallel_group, weight, bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    validation.check_linear(hidden, weight, labels, bias, cu_seqlens, ignore_index, softcap, logit_scale)
    validation.check_budget(max_logits_bytes, hidden)
    validation.check_flags(length_normalized=length_normalized, shift=shift)
    backend = ops.resolve_backend(backend, hidden.device)
    if backend == "reference":
        return reference.linear_sequence_logps(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_parallel_group=vocab_parallel_group,
            length_normalized=length_normalized,
            shift=shift,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            return_counts=return_counts,
        )
    head_options = (softcap, float(logit_scale), max_logits_bytes, _name(vocab_parallel_group))
    logps, counts, _ = _LinearLogps.apply(
        hidden,
        weight,
        bias,
        labels,
        (None, None),
        cu_seqlens,
        head_options,
        length_normalized,
        (shift, ignore_index),
        _needs(hidden, weight, bias),
        backend,
    )
    return (logps, counts) if return_counts else logps


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
    backend: str = "auto",
) -> GAPOOutput:
    """`fused_gapo_loss` from hidden states and the LM head (arXiv 2602.04909), never with all logits in memory.

    Rows that predict nothing are left out before any GEMM. Whole pairs at a time share one buffer of logits, and
    their gradients are made there in the forward, if they will be needed: four GEMMs in all, policy and anchor
    logits, d hidden, d weight. Only what of a pair goes beyond the budget has its logits computed again, and not even
    that if the head is frozen, or for the first pair (without sft_weight, in float32 or float64, with a row of logits
    within the budget). bfloat16's gradients wait in float32 until the backward: the upstream gradient is folded in, and
    they are rounded once. With reduction="none", and in float16, the gradients are made in the backward instead, and the
    logits of all pairs are kept for it, or computed again. CUDA graphs: as `linear_sequence_logps`.

    Args:
        hidden: (2B, T, H) floating, the last hidden states, rows 0..B-1 of the chosen completions, rows B..2B-1 of the
            rejected ones; or (N, H) with `cu_seqlens`.
        weight, bias, softcap, logit_scale, max_logits_bytes, vocab_parallel_group: as in `linear_sequence_logps`.
        labels: (2B, T) int64, or (N,) with `cu_seqlens`; `ignore_index` on prompt and padding.
        anchor_hidden: like hidden, the anchor's; never differentiated.
        anchor_weight: (V, H), the anchor's head; default: weight, as a constant. Needs anchor_hidden.
        anchor_margin: (B,), M~ itself, instead of `anchor_hidden`.
        the others: as in `fused_gapo_loss`.

    Returns:
        GAPOOutput; only its `loss` carries gradient, to hidden, weight and bias.

    Raises:
        ValueError, TypeError: as `fused_gapo_loss`; TypeError for a head that is a DTensor, quantised, or a module.
    """
    validation.check_group(vocab_parallel_group)
    weight, bias, anchor_weight = _own_rows(vocab_parallel_group, weight, bias, anchor_weight)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    validation.check_hyperparameters(beta, gamma, label_smoothing, loss_type, reduction, sft_weight)
    validation.check_linear(hidden, weight, labels, bias, cu_seqlens, ignore_index, softcap, logit_scale)
    validation.check_budget(max_logits_bytes, hidden)
    validation.check_flags(length_normalized=length_normalized, shift=shift)
    validation.check_pairs(hidden, cu_seqlens)
    anchor_hidden, anchor_weight, _ = _autocast(anchor_hidden, anchor_weight, None)
    validation.check_linear_anchor(hidden, weight, cu_seqlens, anchor_hidden, anchor_weight, anchor_margin)
    backend = ops.resolve_backend(backend, hidden.device)
    layout = dict(shift=shift, ignore_index=ignore_index, cu_seqlens=cu_seqlens, length_normalized=length_normalized)
    head = dict(bias=bias, softcap=softcap, logit_scale=logit_scale, vocab_parallel_group=vocab_parallel_group)
    loss = dict(beta=beta, gamma=gamma, label_smoothing=label_smoothing, loss_type=loss_type, reduction=reduction)
    anchors = [None if t is None else t.detach() for t in (anchor_hidden, anchor_weight, anchor_margin)]
    if backend == "reference":
        anchors = dict(zip(("anchor_hidden", "anchor_weight", "anchor_margin"), anchors))
        return reference.fused_linear_gapo_loss(
            hidden, weight, labels, **anchors, **head, **loss, **layout, sft_weight=sft_weight
        )
    head_options = (softcap, float(logit_scale), max_logits_bytes, _name(vocab_parallel_group))
    operands, ending = (hidden, weight, bias, labels), ((shift, ignore_index), _needs(hidden, weight, bias), backend)
    if reduction == "none" or hidden.dtype == torch.float16:
        sums = _LinearLogps.apply(*operands, tuple(anchors[:2]), cu_seqlens, head_options, False, *ending)
        return _loss_of_sums(*sums, anchors[2], length_normalized, loss, sft_weight)
    loss_options = (beta, gamma, label_smoothing, loss_type, length_normalized, sft_weight)
    return GAPOOutput(*_LinearLoss.apply(*operands, tuple(anchors), cu_seqlens, head_options, loss_options, *ending))


def _loss_of_sums(
    sums: Tensor,  # (2B,)
    counts: Tensor,  # (2B,)
    anchor_sums: Tensor,  # (2B,), or empty: there is no anchor, or only its margin
    anchor_margin: Tensor | None,  # (B,)
    normalized: bool,
    loss: dict,
    sft_weight: float,
) -> GAPOOutput:
    """The loss where the forward cannot know its gradients' scale: one upstream gradient a pair, or a loss scale without
    which float16 gradients vanish."""
    pairs = sums.shape[0] // 2
    if anchor_sums.shape[0]:
        anchor_chosen, anchor_rejected = sequence_means(anchor_sums, counts, normalized).chunk(2)
        anchor_margin = anchor_chosen - anchor_rejected
    valid = (counts > 0).view(2, pairs).all(0)
    # An inert pair's NaN would reach the gradient: 0 * NaN.
    sums = sums.masked_fill(~valid.repeat(2), 0) + sums.detach().masked_fill(valid.repeat(2), 0)
    chosen, rejected = sequence_means(sums, counts, normalized).chunk(2)
    margin = chosen - rejected
    anchor_margin = torch.zeros_like(margin) if anchor_margin is None else anchor_margin.to(margin.dtype, copy=True)
    value, pair_weight = gapo_objective(margin, anchor_margin, valid=valid, **loss)
    sft_loss = torch.zeros_like(chosen[0])
    if sft_weight:
        sft_loss, shares = sft_terms(sums[:pairs], counts[:pairs], valid, sft_weight)
        value = value + (sft_weight * sft_loss if loss["reduction"] == "mean" else shares)
    fields = (chosen, rejected, margin, anchor_margin, margin - anchor_margin, pair_weight, sft_loss, valid)
    return GAPOOutput(value, *(field.detach() for field in fields))


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """As autocast would cast them for F.linear."""
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    eligible = (*validation.HALF, torch.float32)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in eligible else t for t in tensors]


def _own_rows(group: torch.distributed.ProcessGroup | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """A head sharded as DTensors by rows of the vocabulary over the group, as this rank's part; anything else as it is."""
    return [tensor.to_local() if _is_sharded_over(group, tensor) else tensor for tensor in tensors]


def _is_sharded_over(group: torch.distributed.ProcessGroup | None, tensor: Tensor | None) -> bool:
    placements = getattr(tensor, "placements", None)
    if group is None or placements is None or len(placements) != 1 or not placements[0].is_shard(0):
        return False
    ranks = torch.distributed.get_process_group_ranks
    return ranks(tensor.device_mesh.get_group()) == ranks(group)


def _name(group: torch.distributed.ProcessGroup | None) -> str | None:
    return None if group is None else group.group_name
