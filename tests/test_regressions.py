"""Defects that a review found, each held where it happened."""

import contextvars
import subprocess
import sys

import pytest
import torch

import gapo_kernels
from batches import make_batch
from gapo_kernels import (
    GeometricAnchor,
    cpu,
    fused_gapo_loss,
    fused_linear_gapo_loss,
    gapo_objective,
    gapo_step,
    reference,
    sequence_logps,
)


@pytest.mark.parametrize("call", [fused_gapo_loss, sequence_logps])
def test_inference_mode(call, monkeypatch):
    """The CPU path's worker threads do not inherit the caller's inference mode."""
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", 131 * 4)  # a row
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batch = make_batch(4, 6, 131)
    expected = call(batch.logits, batch.labels, backend="torch")
    with torch.inference_mode():
        found = call(batch.logits.clone(), batch.labels.clone(), backend="torch")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("drop", [30, 34, 36, 60, 80, 86, 88, 89, 120])
def test_gradient_of_an_improbable_label(backend, device, drop):
    """p(label) of e^-drop: the sum over exp(x - x_label) would leave the gradient's factor denormal."""
    logits = torch.zeros(1, 3, 101, device=device)
    logits[..., 1] = drop
    labels = torch.zeros(1, 3, dtype=torch.int64, device=device)
    gradients = []
    for dtype, chosen in ((torch.float32, backend), (torch.float64, "reference")):
        x = logits.to(dtype, copy=True).requires_grad_()
        (sequence_logps(x, labels, backend=chosen).sum() * 1e-7).backward()
        gradients.append(x.grad[0, 0, :2].double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)


def test_cu_seqlens_with_gaps_in_memory(backend, device):
    batch = make_batch(4, 5, 31, packed=True, device=device)
    strided = torch.stack([batch.cu_seqlens, batch.cu_seqlens + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    results = []
    for cu_seqlens in (batch.cu_seqlens, strided):
        logits = batch.logits.clone().requires_grad_()
        out = fused_gapo_loss(logits, batch.labels, cu_seqlens=cu_seqlens, backend=backend)
        out.loss.backward()
        results.append((*out, logits.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_no_second_derivative_over_the_logits_storage(backend, device):
    batch = make_batch(4, 5, 31, device=device)
    logits = batch.logits.clone().requires_grad_()
    out = fused_gapo_loss(logits * 1, batch.labels, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.loss, logits, create_graph=True)


def test_hinge_at_nan_has_no_finite_gradient():
    margin = torch.tensor([torch.nan, 0.3, 5.0], requires_grad=True)
    loss, weight = gapo_objective(margin, loss_type="hinge", reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(margin.grad, -weight, equal_nan=True)
    assert weight.isnan().tolist() == [True, False, False] and weight[1] == 2.0 and weight[2] == 0.0


@pytest.mark.parametrize("hinge", [False, True])
def test_an_inert_pair_of_nan_has_no_gradient(backend, device, hinge):
    """Rejected completion empty, NaN among the chosen one's logits."""
    batch = make_batch(4, 5, 31, device=device)
    batch.labels[:2] = 3
    batch.labels[2] = -100
    batch.labels[3] = 4
    batch.logits[0, 1, 7] = torch.nan
    options = dict(loss_type="hinge" if hinge else "sigmoid", sft_weight=0.3)
    for chosen in (backend, "reference"):
        logits = batch.logits.clone().requires_grad_()
        out = fused_gapo_loss(logits, batch.labels, backend=chosen, **options)
        out.loss.backward()
        assert out.valid.tolist() == [False, True] and out.loss.isfinite()
        assert (logits.grad[[0, 2]] == 0).all() and (logits.grad[[1, 3]] != 0).any()
        assert logits.grad.isfinite().all()


def test_an_inert_pair_of_nan_has_no_gradient_through_a_softcap(backend, device):
    """Its hidden states are NaN, and so is the softcap's slope."""
    hidden, weight = torch.randn(4, 3, 5, device=device), torch.randn(7, 5, device=device)
    hidden[0, 1] = torch.nan
    labels = torch.ones(4, 3, dtype=torch.int64, device=device)
    labels[2] = -100
    for budget in (12, 28, 2**30):
        operands = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = fused_linear_gapo_loss(*operands, labels, softcap=30.0, max_logits_bytes=budget, backend=backend)
        d_hidden, d_weight = torch.autograd.grad(out.loss, operands)
        assert out.valid.tolist() == [False, True]
        assert d_weight.isfinite().all() and d_weight.any()
        assert (d_hidden[[0, 2]] == 0).all() and d_hidden.isfinite().all()


def test_a_frozen_heads_bfloat16_gradient_is_rounded_once(backend, device):
    """Below one pair's budget d hidden is made up to its coefficient: that came on top of a rounding, and was one itself."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 4, 24, generator=generator).bfloat16().to(device)
    weight = torch.randn(67, 24, generator=generator).bfloat16().to(device)
    labels = torch.randint(67, (4, 4), generator=generator).to(device)

    def gradient(function, dtype, **options):
        x = hidden.to(dtype, copy=True).requires_grad_()
        loss = function(x, weight.to(dtype), labels, beta=0.3, **options).loss
        return torch.autograd.grad(loss, x)[0].double()

    def logits_rounded(hidden, weight, labels, **options):
        return reference.fused_gapo_loss((hidden @ weight.t()).float(), labels, **options)

    truth = gradient(reference.fused_linear_gapo_loss, torch.float64)
    # A GPU's GEMMs write 16-bit logits; a CPU widens such heads.
    eager = gradient(reference.fused_linear_gapo_loss if device.type == "cpu" else logits_rounded, torch.bfloat16)
    found = gradient(fused_linear_gapo_loss, torch.bfloat16, max_logits_bytes=4 * 67, backend=backend)
    assert (found - truth).norm() <= 1.2 * (eager - truth).norm()


def test_reference_knows_the_back_ends():
    batch = make_batch(4, 5, 31)
    with pytest.raises(ValueError, match="backend must be one of"):
        reference.fused_gapo_loss(batch.logits, batch.labels, backend="bogus")


def test_flags_and_huge_numbers_are_refused_by_name():
    batch = make_batch(4, 5, 31)
    for backend in ("auto", "reference"):
        module = reference if backend == "reference" else gapo_kernels
        for options, error, message in (
            (dict(shift=None), TypeError, "shift must be True or False, got None"),
            (dict(length_normalized="yes"), TypeError, "length_normalized must be True or False, got 'yes'"),
            (dict(beta=10**400), ValueError, "beta must be finite"),
            (dict(ignore_index=10**30), ValueError, "ignore_index must fit in 64 bits"),
        ):
            with pytest.raises(error, match=message):
                module.fused_gapo_loss(batch.logits, batch.labels, backend=backend, **options)


def test_an_expanded_gradient_of_a_parameter_with_gaps_in_memory(passes, device):
    """As one number for all elements it was read beyond its memory by the kernels."""
    base = torch.arange(1.0, 13.0, dtype=torch.float64, device=device).view(6, 2)
    param = torch.nn.Parameter(base[:, :1])
    before = base.clone()
    anchor = GeometricAnchor([param], rho=0.5)
    for gradients in (dict(objective=param.sum()), dict(grads=[before[:1, :1].expand(6, 1)])):
        with anchor.perturbed(**gradients):
            expected = before[:, :1] + 0.5 * before[:, :1] ** 2 / before[:, 0].norm()
            torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=0)
        assert torch.equal(base, before)


def test_a_step_leaves_nothing_in_the_threads_context():
    """Each call set a ContextVar of its own, which the context keeps for as long as the thread lives."""
    param = torch.nn.Parameter(torch.randn(4, 3))
    anchor = GeometricAnchor([param], rho=0.1)
    held = []
    for _ in range(4):
        gapo_step(lambda: param.sum(1), anchor).loss.backward()
        held.append(len(contextvars.copy_context()))
    assert held[3] == held[0]


THREADS = """
import threading, torch
from gapo_kernels import sequence_logps
torch.set_num_threads(2)
logits, labels = torch.randn(2, 60, 20000, requires_grad=True), torch.zeros(2, 60, dtype=torch.int64)
def work():
    threading.main_thread().join()
    sequence_logps(logits, labels).sum().backward()
    print("done", logits.grad.abs().sum().item() > 0)
"""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


def test_a_thread_that_outlives_the_main_thread_may_train():
    finished = run_python(THREADS + "threading.Thread(target=work).start()")
    assert finished.stdout == "done True\n", finished.stderr


def test_a_thread_that_cannot_be_started_is_done_without():
    failing = """
begin, begun = threading.Thread.start, []
def start(thread):
    begun.append(thread)
    if len(begun) == 2:
        raise RuntimeError("can't start new thread")
    begin(thread)
threading.Thread.start = start
work()
"""
    finished = run_python(THREADS.replace("threading.main_thread().join()", "pass") + failing)
    assert finished.stdout == "done True\n", finished.stderr
