"""sequence_logps against the float64 reference, for any number of sequences."""

import itertools

import pytest
import torch

from batches import assert_equals_reference, assert_same, in_float64, make_batch, run_logps
from gapo_kernels import sequence_logps


def upstream_for(sequences, device, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, dtype=torch.float64, generator=generator).to(device)


# An odd number of sequences, the second of them empty, in both layouts; 331 = tiles, a part of one and a ragged end.
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length_normalized, shift", list(itertools.product([True, False], [True, False])))
def test_every_keyword(backend, device, packed, length_normalized, shift):
    batch = make_batch(3, 4, 331, packed=packed, device=device)
    labels = batch.labels.clone()
    start, stop = (1, 2) if batch.cu_seqlens is None else batch.cu_seqlens[1:3].tolist()
    labels[start:stop] = -100
    found = assert_equals_reference(
        run_logps,
        batch._replace(labels=labels),
        backend,
        upstream_for(3, device),
        length_normalized=length_normalized,
        shift=shift,
    )
    logps, counts = found.fields["logps"], found.fields["counts"]
    assert logps.dtype == torch.float64 and counts.dtype == torch.int64
    assert logps[1] == 0 and counts[1] == 0 and (logps[[0, 2]] < -1).all()
    empty = found.gradient[1] if batch.cu_seqlens is None else found.gradient[start:stop]
    assert empty.numel() > 0 and (empty == 0).all()
    assert found.gradient.abs().max() > 1e-3


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_any_number_of_sequences(backend, device, sequences):
    for packed in (False, True):
        batch = make_batch(sequences, 3, 7, packed=packed, device=device)
        assert_equals_reference(run_logps, batch, backend, upstream_for(sequences, device))


def test_without_counts_it_is_the_tensor_alone(backend, device):
    batch = make_batch(3, 3, 7, device=device)
    logps = sequence_logps(batch.logits, batch.labels, backend=backend)
    with_counts, counts = sequence_logps(batch.logits, batch.labels, return_counts=True, backend=backend)
    assert torch.equal(logps, with_counts)
    assert counts.tolist() == (batch.labels[:, 1:] != -100).sum(1).tolist()
    assert not counts.requires_grad


# The sequences of a packed batch, one by one and together: the last row of each predicts nothing of its neighbour.
@pytest.mark.parametrize("shift", [True, False])
def test_packed_sequences_do_not_see_each_other(backend, device, shift):
    batch = make_batch(4, 4, 67, packed=True, device=device)
    # No label is ignored here, so that a sequence's last row would find its neighbour's first token.
    labels = torch.randint(67, batch.labels.shape, generator=torch.Generator().manual_seed(1)).to(device)
    packed = run_logps(batch._replace(labels=labels), backend, shift=shift)
    bounds = batch.cu_seqlens.tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        alone = batch._replace(logits=batch.logits[None, start:stop], labels=labels[None, start:stop], cu_seqlens=None)
        single = run_logps(alone, backend, shift=shift)
        torch.testing.assert_close(single.fields["logps"], packed.fields["logps"][s : s + 1], rtol=1e-12, atol=0)
        torch.testing.assert_close(single.gradient[0], packed.gradient[start:stop], rtol=1e-12, atol=1e-12)
        assert single.fields["counts"].item() == packed.fields["counts"][s] == stop - start - shift


@pytest.mark.parametrize("packed, length_normalized", [(False, True), (True, False)])
def test_gradcheck(backend, device, packed, length_normalized):
    batch = make_batch(3, 3, 11, packed=packed, device=device)

    def logps(logits):
        return sequence_logps(
            logits, batch.labels, cu_seqlens=batch.cu_seqlens, length_normalized=length_normalized, backend=backend
        )

    assert torch.autograd.gradcheck(logps, batch.logits.clone().requires_grad_(), fast_mode=True)


def test_gradients_of_single_sequences(backend, device):
    """Probe and final backward use one graph, each with weights of its own per sequence."""
    batch = make_batch(3, 3, 67, device=device)
    logits = batch.logits.clone().requires_grad_()
    logps = sequence_logps(logits, batch.labels, backend=backend)
    for s in range(3):
        (gradient,) = torch.autograd.grad(logps[s], logits, retain_graph=True)
        assert gradient[s].abs().max() > 1e-3
        assert (gradient[torch.arange(3, device=device) != s] == 0).all()


def test_double_backward_raises(backend, device):
    batch = make_batch(3, 3, 7, device=device)
    logits = batch.logits.clone().requires_grad_()
    logps = sequence_logps(logits, batch.labels, backend=backend)
    (gradient,) = torch.autograd.grad(logps.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_inplace_backward(backend, device, packed):
    batch = make_batch(3, 4, 67, packed=packed, device=device)
    upstream = upstream_for(3, device)
    expected = run_logps(batch, backend, upstream)
    logits = batch.logits.clone().requires_grad_() * 1
    logps = sequence_logps(logits, batch.labels, cu_seqlens=batch.cu_seqlens, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(logps, logits, upstream, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected.gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logps, logits, upstream)


def test_same_bits_on_every_run(backend, device):
    batch = make_batch(3, 4, 331, device=device).to(torch.float32)
    first, *others = [run_logps(batch, backend) for _ in range(3)]
    for other in others:
        assert_same(other, first, tolerance=0)


def test_strides(backend, device):
    """Every second position of an unaligned slice of a wider vocabulary."""
    batch = make_batch(3, 4, 67, device=device)
    wide = torch.full((3, 8, 80), torch.nan, dtype=torch.float64, device=device)
    view = wide[:, ::2, 5:72]
    view.copy_(batch.logits)
    assert_equals_reference(run_logps, batch._replace(logits=view), backend, upstream_for(3, device))


def test_equals_cross_entropy(backend, device):
    """Not only the reference: torch's own loss over the same tokens."""
    batch = make_batch(3, 4, 67, device=device)
    logps = sequence_logps(batch.logits, batch.labels, length_normalized=False, backend=backend)
    nll = torch.nn.functional.cross_entropy(
        batch.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(-logps.sum(), nll, rtol=1e-12, atol=0)


def test_low_precision_returns(backend, device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        batch = make_batch(3, 3, 7, device=device).to(dtype)
        found = run_logps(batch, backend)
        assert found.fields["logps"].dtype == torch.float32 and found.gradient.dtype == dtype
        truth = in_float64(run_logps, batch)
        torch.testing.assert_close(found.fields["logps"].double(), truth.fields["logps"], rtol=1e-6, atol=0)
