"""torch.library's own checks of the registered operators: schema, fake tensors, aliasing, ahead-of-time dispatch."""

import pytest
import torch
from torch.library import opcheck

from batches import make_batch
from gapo_kernels import ops

LAYOUTS = {
    "padded": dict(packed=False, anchor=None, shift=True, reduction="mean", dtype=torch.float32),
    "padded, anchor logits": dict(packed=False, anchor="logits", shift=False, reduction="none", dtype=torch.float16),
    "packed, anchor margin": dict(packed=True, anchor="margin", shift=True, reduction="none", dtype=torch.float64),
}


def case(layout, device):
    options = dict(LAYOUTS[layout])
    batch = make_batch(2, 2, 7, packed=options["packed"], dtype=options["dtype"], device=device)
    return batch, options


def backward_arguments(batch, options, backend, inplace):
    _, _, row_shift, row_total = ops.logps_forward(
        batch.logits, batch.labels, batch.cu_seqlens, True, options["shift"], -100, backend
    )
    scale = torch.tensor([0.5, -2.0], dtype=row_total.dtype, device=batch.logits.device)
    logits = batch.logits.clone() if inplace else batch.logits
    return (scale, logits, batch.labels, batch.cu_seqlens, row_shift, row_total, options["shift"], -100, backend)


# Every operator, on inputs of each layout, dtype and shape of result.
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logps_forward(backend, device, layout):
    batch, options = case(layout, device)
    for length_normalized in (True, False):
        opcheck(
            ops.logps_forward,
            (batch.logits, batch.labels, batch.cu_seqlens, length_normalized, options["shift"], -100, backend),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_forward(backend, device, layout):
    batch, options = case(layout, device)
    anchor = options["anchor"]
    opcheck(
        ops.loss_forward,
        (
            batch.logits,
            batch.labels,
            batch.anchor_logits if anchor == "logits" else None,
            torch.tensor([0.3], dtype=torch.float64, device=device) if anchor == "margin" else None,
            batch.cu_seqlens,
            2.0,
            0.5,
            0.1,
            "sigmoid",
            True,
            0.2,
            options["shift"],
            -100,
            options["reduction"],
            backend,
        ),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logps_backward(backend, device, layout):
    batch, options = case(layout, device)
    arguments = backward_arguments(batch, options, backend, inplace=False)
    assert ops.logps_backward(*arguments).abs().max() > 1e-3
    opcheck(ops.logps_backward, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logps_backward_inplace(backend, device, layout):
    batch, options = case(layout, device)
    opcheck(ops.logps_backward_, backward_arguments(batch, options, backend, inplace=True))


# The fake results have the real ones' shapes, dtypes and strides also where the logits are no contiguous tensor: views with
# large gaps, with small ones, without any, and of rows that share memory.
VIEWS = {
    "gaps": lambda x: x[:, ::2, :7],
    "transposed": lambda x: x.transpose(0, 1),
    "padded": lambda x: x[..., :-1],
    "less the last row": lambda x: x[:, :-1],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(backend, device, view):
    wide = torch.randn(2, 12, 13, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(device)
    logits = VIEWS[view](wide)
    labels = torch.ones(logits.shape[:2], dtype=torch.int64, device=device)
    options = (labels, None, True, False, -100, backend)
    opcheck(ops.logps_forward, (logits, *options))
    _, _, row_shift, row_total = ops.logps_forward(logits, *options)
    scale = torch.linspace(0.5, 1, logits.shape[0], device=device)
    arguments = (labels, None, row_shift, row_total, False, -100, backend)
    opcheck(ops.logps_backward, (scale, logits, *arguments))
    found = ops.logps_backward(scale, logits, *arguments)
    torch.testing.assert_close(found, ops.logps_backward(scale, logits.contiguous(), *arguments))
    # Rows of a view with few gaps lie as its gradient's do, so that both are read and written 16 bytes at a time.
    alike = backend == "triton" and view in ("transposed", "padded", "less the last row")
    assert found.stride() == (logits if alike else logits.contiguous()).stride()


def test_scale_of_stride_zero(backend, device):
    """One number for all sequences, as an incoming gradient that was expanded."""
    batch = make_batch(2, 2, 7, device=device)
    _, _, row_shift, row_total = ops.logps_forward(batch.logits, batch.labels, None, True, True, -100, backend)
    rows = (batch.logits, batch.labels, None, row_shift, row_total, True, -100, backend)
    scale = torch.tensor([0.7], dtype=torch.float64, device=device).expand(2)
    found = ops.logps_backward(scale, *rows)
    assert torch.equal(found, ops.logps_backward(scale.contiguous(), *rows))
    assert found[1].abs().max() > 1e-3
