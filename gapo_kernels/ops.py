"""The registered operators: one opaque boundary per hot call, for eager mode, torch.compile and opcheck alike.

They dispatch to a back end's launchers, `cpu` or `kernels`, which share their signatures. What makes them differentiable
is an autograd.Function around them, in `logprobs.py` and `loss.py`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from gapo_kernels import cpu, validation
from gapo_kernels.layout import like_rows, sequence_count


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "auto" means Triton on CUDA, ROCm and XPU tensors and the torch implementation on CPU."""
    validation.check_choice(backend, validation.BACKENDS, "backend")
    if backend == "auto":
        return "triton" if device.type in ("cuda", "xpu") else "torch"
    return backend


def launchers(backend: str, device: torch.device) -> ModuleType:
    """The back end's launchers, or a RuntimeError that says what is missing."""
    if backend == "torch":
        return cpu
    try:
        from gapo_kernels import kernels
    except ImportError as error:
        raise RuntimeError(
            f"backend 'triton' was chosen for a {device.type} tensor, but Triton cannot be imported ({error}); "
            "install triton >= 3.5 or pass backend='torch'"
        ) from error
    if device.type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' needs a GPU tensor, got one on {device}; on the CPU it works only under Triton's "
            "interpreter (TRITON_INTERPRET=1 set before import): pass backend='auto' or 'torch'"
        )
    return kernels


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@torch.library.custom_op("gapo_kernels::logps_forward", mutates_args=())
def logps_forward(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    length_normalized: bool,
    shift: bool,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s (S,), counts (S,) int64, and per row (R,) the shift and total that `logps_backward` takes."""
    back_end = launchers(backend, logits.device)
    validation.check_values(labels, logits.shape[-1], cu_seqlens, shift, ignore_index)
    with on(logits.device):
        return back_end.logps_forward(logits, labels, cu_seqlens, length_normalized, shift, ignore_index)


@logps_forward.register_fake
def _(logits, labels, cu_seqlens, length_normalized, shift, ignore_index, backend):
    dtype = cpu.accumulation_dtype(logits)
    sequences = sequence_count(labels, cu_seqlens)
    return (
        logits.new_empty(sequences, dtype=dtype),
        logits.new_empty(sequences, dtype=torch.int64),
        logits.new_empty(labels.numel(), dtype=dtype),
        logits.new_empty(labels.numel(), dtype=dtype),
    )


@torch.library.custom_op("gapo_kernels::loss_forward", mutates_args=())
def loss_forward(
    logits: Tensor,
    labels: Tensor,
    anchor_logits: Optional[Tensor],
    anchor_margin: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    beta: float,
    gamma: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    sft_weight: float,
    shift: bool,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """objective.PairResults' ten fields, then per row (R,) the shift and total that `logps_backward` takes."""
    back_end = launchers(backend, logits.device)
    validation.check_values(labels, logits.shape[-1], cu_seqlens, shift, ignore_index)
    with on(logits.device):
        results, row_shift, row_total = back_end.loss_forward(
            logits,
            labels,
            anchor_logits,
            anchor_margin,
            cu_seqlens,
            beta,
            gamma,
            label_smoothing,
            loss_type,
            length_normalized,
            sft_weight,
            shift,
            ignore_index,
            reduction,
        )
    return (*results, row_shift, row_total)


@loss_forward.register_fake
def _(logits, labels, anchor_logits, anchor_margin, cu_seqlens, *options):
    dtype = cpu.accumulation_dtype(logits)
    reduction = options[-2]
    pairs = sequence_count(labels, cu_seqlens) // 2
    fields = [logits.new_empty(pairs, dtype=dtype) for _ in range(6)]
    return (
        logits.new_empty(() if reduction == "mean" else pairs, dtype=dtype),
        *fields,
        logits.new_empty((), dtype=dtype),
        logits.new_empty(pairs, dtype=torch.bool),
        logits.new_empty(2 * pairs, dtype=dtype),
        logits.new_empty(labels.numel(), dtype=dtype),
        logits.new_empty(labels.numel(), dtype=dtype),
    )


@torch.library.custom_op("gapo_kernels::logps_backward", mutates_args=())
def logps_backward(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    row_shift: Tensor,
    row_total: Tensor,
    shift: bool,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """d logits: scale[sequence] * (softmax - onehot) on predicting rows, zero elsewhere."""
    back_end = launchers(backend, logits.device)
    arguments = (scale, logits, labels, cu_seqlens, row_shift, row_total, shift, ignore_index)
    with on(logits.device):
        return back_end.logps_backward(*arguments, inplace=False)


@logps_backward.register_fake
def _(scale, logits, labels, cu_seqlens, row_shift, row_total, shift, ignore_index, backend):
    return like_rows(logits) if backend == "triton" else logits.new_empty(logits.shape)


def _once_differentiable(*_):
    raise RuntimeError(
        "fused_gapo_loss and sequence_logps are differentiable once; for a gradient of their gradient use "
        "gapo_kernels.reference"
    )


logps_backward.register_autograd(_once_differentiable)


@torch.library.custom_op("gapo_kernels::logps_backward_", mutates_args=("logits",))
def logps_backward_(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Optional[Tensor],
    row_shift: Tensor,
    row_total: Tensor,
    shift: bool,
    ignore_index: int,
    backend: str,
) -> None:
    """`logps_backward`, the gradient written over the logits."""
    back_end = launchers(backend, logits.device)
    arguments = (scale, logits, labels, cu_seqlens, row_shift, row_total, shift, ignore_index)
    with on(logits.device):
        back_end.logps_backward(*arguments, inplace=True)


def logits_gradient(
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    row_shift: Tensor,
    row_total: Tensor,
    shift: bool,
    ignore_index: int,
    backend: str,
    inplace: bool,
) -> Tensor:
    arguments = (scale, logits, labels, cu_seqlens, row_shift, row_total, shift, ignore_index, backend)
    if not inplace:
        return logps_backward(*arguments)
    if torch.is_grad_enabled():  # create_graph=True: the logits that the second derivative needs are gone
        _once_differentiable()
    logps_backward_(*arguments)
    return logits
