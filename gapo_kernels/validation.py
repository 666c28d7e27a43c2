"""Checks of what users pass in. Every message says what was expected and what was got."""

from __future__ import annotations

import os
import sys
from numbers import Real

import torch
from torch import Tensor

from gapo_kernels.layout import align_targets, rows_are_apart

HALF = (torch.float16, torch.bfloat16)
FLOAT_MAX = sys.float_info.max
LOSS_TYPES = ("sigmoid", "hinge")
REDUCTIONS = ("mean", "none")
BACKENDS = ("auto", "triton", "torch", "reference")


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value != value or not -FLOAT_MAX <= value <= FLOAT_MAX:
        raise ValueError(f"{name} must be finite, got {value}")


def check_hyperparameters(
    beta: float, gamma: float, label_smoothing: float, loss_type: str, reduction: str = "mean", sft_weight: float = 0.0
) -> None:
    check_choice(loss_type, LOSS_TYPES, "loss_type")
    check_choice(reduction, REDUCTIONS, "reduction")
    for name, value in (
        ("beta", beta),
        ("gamma", gamma),
        ("label_smoothing", label_smoothing),
        ("sft_weight", sft_weight),
    ):
        check_number(value, name)
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if sft_weight < 0:
        raise ValueError(f"sft_weight must be >= 0, got {sft_weight}")


def check_margin(margin: Tensor, name: str, like: Tensor | None = None) -> None:
    if not isinstance(margin, Tensor) or not margin.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(margin)}")
    if margin.dim() != 1 or margin.shape[0] == 0:
        raise ValueError(f"{name} must have shape (B,) with B >= 1, got {tuple(margin.shape)}")
    if like is not None and margin.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, one value a pair, got {tuple(margin.shape)}")
    if like is not None:
        check_device(margin, like, name, "margin")


def check_valid(valid: Tensor, margin: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        raise TypeError(f"valid must be a bool tensor, got {describe(valid)}")
    if valid.shape != margin.shape:
        raise ValueError(f"valid must have shape {tuple(margin.shape)}, one value a pair, got {tuple(valid.shape)}")
    check_device(valid, margin, "valid", "margin")


def describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got {got}")


def check_device(tensor: Tensor, like: Tensor, name: str, like_name: str) -> None:
    check_dense(tensor, name)
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def check_logits_and_labels(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> None:
    """Ranks, shapes, dtypes and devices; nothing that would wait for a GPU."""
    _check_rows_and_labels(logits, labels, cu_seqlens, ignore_index, "logits", "V", "vocabulary of at least one token")


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Hidden states, their labels and the LM head."""
    check_plain(hidden=hidden, labels=labels)
    _check_rows_and_labels(hidden, labels, cu_seqlens, ignore_index, "hidden", "H", "width of at least 1")
    check_head(weight, hidden, "weight")
    if bias is not None:
        if getattr(bias, "device_mesh", None) is not None:
            raise TypeError("bias is a DTensor: pass bias.full_tensor(), or shard it as the weight")
        if not isinstance(bias, Tensor) or bias.dtype != hidden.dtype:
            raise TypeError(f"bias must have hidden's dtype, {hidden.dtype}, got {describe(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        check_device(bias, hidden, "bias", "hidden")
    check_number(logit_scale, "logit_scale")
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0")
    if softcap is not None:
        check_number(softcap, "softcap")
        if softcap <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {softcap}")


def check_plain(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if getattr(tensor, "device_mesh", None) is not None:
            raise TypeError(f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor()")


def check_group(group: object, name: str = "vocab_parallel_group") -> None:
    if group is None or isinstance(group, torch.distributed.ProcessGroup):
        return
    non_member = torch.distributed.GroupMember.NON_GROUP_MEMBER
    if type(group) is type(non_member) and group == non_member:
        raise TypeError(f"{name} is GroupMember.NON_GROUP_MEMBER: this rank is none of the group's")
    remedy = "; pass mesh.get_group()" if hasattr(group, "get_group") else ""
    raise TypeError(f"{name} must be a torch.distributed process group, got {type(group).__name__}{remedy}")


def check_head(weight: Tensor, hidden: Tensor, name: str) -> None:
    if isinstance(weight, torch.nn.Module):
        raise TypeError(
            f"{name} must be the LM head's weight, (V, H), got the module {type(weight).__name__}; pass its .weight, and "
            "its bias= if it has one. A head with an adapter on it (LoRA) is more than its weight: merge the adapter, or "
            "use sequence_logps on the model's logits"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if getattr(weight, "device_mesh", None) is not None:
        raise TypeError(
            f"{name} is a DTensor, got placements {weight.placements} on {weight.device_mesh}: pass {name}.full_tensor(); or, "
            "if it is sharded by rows of the vocabulary over one mesh dimension, that dimension's group as "
            "vocab_parallel_group"
        )
    # torchao's tensors are wrapped ones of a floating-point dtype; so is a collective's result under way, which is plain.
    wrapped = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "trigger_wait")
    if weight.is_quantized or not weight.is_floating_point() or hasattr(weight, "quant_state") or wrapped:
        got = type(weight).__name__ if wrapped else describe(weight)
        raise TypeError(f"{name} must be a floating-point tensor, got {got}: dequantise a quantised head first")
    check_dense(weight, name)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{name} must have hidden's dtype, {hidden.dtype}, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{name} must have shape (V, H) with H = {hidden.shape[-1]}, got {tuple(weight.shape)}")
    check_device(weight, hidden, name, "hidden")


def check_linear_anchor(
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    anchor_hidden: Tensor | None,
    anchor_weight: Tensor | None,
    anchor_margin: Tensor | None,
) -> None:
    check_plain(anchor_hidden=anchor_hidden)
    check_anchor(hidden, cu_seqlens, anchor_hidden, anchor_margin, "hidden")
    if anchor_weight is not None:
        if anchor_hidden is None:
            raise ValueError("anchor_weight was given without anchor_hidden")
        check_head(anchor_weight, hidden, "anchor_weight")
        if anchor_weight.shape != weight.shape:
            raise ValueError(
                f"anchor_weight must have weight's shape, {tuple(weight.shape)}, got {tuple(anchor_weight.shape)}"
            )


def check_budget(max_logits_bytes: int, hidden: Tensor) -> None:
    if isinstance(max_logits_bytes, bool) or not isinstance(max_logits_bytes, int):
        raise TypeError(f"max_logits_bytes must be an int, got {type(max_logits_bytes).__name__}")
    least = max(4, hidden.element_size())
    if max_logits_bytes < least:
        raise ValueError(f"max_logits_bytes must be at least one logit's, {least}, got {max_logits_bytes}")
    if max_logits_bytes >= 2**63:
        raise ValueError(f"max_logits_bytes must be below 2**63, got {max_logits_bytes}")


def _check_rows_and_labels(
    rows: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, name: str, last: str, least: str
) -> None:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(rows)}")
    if rows.dtype not in (*HALF, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"labels must be an integer tensor (int64), got {describe(labels)}")
    check_dense(rows, name)
    check_dense(labels, "labels")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    packed = cu_seqlens is not None
    if rows.dim() != (2 if packed else 3):
        expected = (
            f"(N, {last}) when cu_seqlens is given" if packed else f"(S, T, {last}), or (N, {last}) with cu_seqlens"
        )
        raise ValueError(f"{name} must have shape {expected}, got {tuple(rows.shape)}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must have the {name}' shape without the vocabulary, {tuple(rows.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
            if name == "logits"
            else f"labels must have hidden's shape without its width, {tuple(rows.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if rows.shape[-1] == 0:
        raise ValueError(f"{name} must have a {least}, got shape {tuple(rows.shape)}")
    check_last_stride(rows, name)
    check_device(labels, rows, "labels", name)
    if packed:
        check_cu_seqlens(cu_seqlens, rows)


def check_last_stride(tensor: Tensor, name: str) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in their last dimension (stride 1), got strides {tuple(tensor.stride())}; "
            f"nothing is copied silently: pass {name}.contiguous()"
        )


def check_cu_seqlens(cu_seqlens: Tensor, logits: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape (S + 1,) with S >= 1, got {tuple(cu_seqlens.shape)}")
    check_device(cu_seqlens, logits, "cu_seqlens", "logits")


def check_pairs(logits: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences == 0 or sequences % 2:
        raise ValueError(
            f"expected 2B sequences, the B chosen rows and then the B rejected rows with B >= 1, got {sequences}"
        )


def check_anchor(
    logits: Tensor,
    cu_seqlens: Tensor | None,
    anchor_logits: Tensor | None,
    anchor_margin: Tensor | None,
    name: str = "logits",
) -> None:
    owner = "the logits'" if name == "logits" else "hidden's"
    if anchor_logits is not None and anchor_margin is not None:
        raise ValueError(f"anchor_{name} and anchor_margin were both given; expected at most one of them")
    if anchor_logits is not None:
        if not isinstance(anchor_logits, Tensor) or anchor_logits.dtype != logits.dtype:
            raise TypeError(f"anchor_{name} must have {owner} dtype, {logits.dtype}, got {describe(anchor_logits)}")
        check_dense(anchor_logits, f"anchor_{name}")
        if anchor_logits.shape != logits.shape:
            raise ValueError(
                f"anchor_{name} must have {owner} shape, {tuple(logits.shape)}, got {tuple(anchor_logits.shape)}"
            )
        check_last_stride(anchor_logits, f"anchor_{name}")
        check_device(anchor_logits, logits, f"anchor_{name}", name)
    if anchor_margin is not None:
        check_margin(anchor_margin, "anchor_margin")
        pairs = (logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2
        if anchor_margin.shape[0] != pairs:
            raise ValueError(
                f"anchor_margin must have shape ({pairs},), one value a pair, got {tuple(anchor_margin.shape)}"
            )
        check_device(anchor_margin, logits, "anchor_margin", "logits")


def check_inplace(logits: Tensor) -> None:
    """The gradient may replace the logits only where every element has memory of its own."""
    if not rows_are_apart(logits):
        raise ValueError(
            "inplace_backward=True writes the gradient over the logits, so no two logits may share memory; got shape "
            f"{tuple(logits.shape)} with strides {tuple(logits.stride())}"
        )


def check_values(labels: Tensor, vocabulary: int, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> None:
    """What only the values tell: cu_seqlens' order and labels' range.

    It reads the tensors back, so it runs for CPU tensors, and for others only with GAPO_KERNELS_DEBUG=1: elsewhere
    a label out of range makes its pair's loss NaN, and rows outside of cu_seqlens count as ignored.
    """
    if labels.device.type != "cpu" and os.environ.get("GAPO_KERNELS_DEBUG") != "1":
        return
    if cu_seqlens is not None:
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != labels.shape[0] or (steps < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of rows, {labels.shape[0]}, got {cu_seqlens.tolist()}"
            )
    targets = align_targets(labels, cu_seqlens, shift, ignore_index)
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        *row, position = wrong.nonzero()[0].tolist()
        value = targets[(*row, position)].item()
        where = f"row {row[0]}, position {position + shift}" if row else f"row {position + shift}"
        raise ValueError(
            f"labels must be in [0, {vocabulary}) or ignore_index ({ignore_index}), got {value} at {where}"
        )
