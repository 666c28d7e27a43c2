"""fused_gapo_loss against the float64 reference: values, gradients, precision, autograd, strides."""

import itertools
import mmap
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from batches import assert_equals_reference, assert_same, in_float64, make_batch, run_logps, run_loss
from gapo_kernels import fused_gapo_loss

# beta small enough that summed log-probs do not saturate the logistic
LOSSES = [
    dict(beta=0.3, gamma=0.5),
    dict(beta=0.3, gamma=-0.3, label_smoothing=0.1),
    dict(beta=0.3, gamma=1.5, loss_type="hinge"),
]
# length_normalized, sft_weight, reduction, shift
INNER = list(itertools.product([True, False], [0.0, 0.3], ["mean", "none"], [True, False]))


def upstream_for(batch, reduction, seed=7):
    """An arbitrary incoming gradient, one a pair with reduction="none"."""
    sequences = batch.labels.shape[0] if batch.cu_seqlens is None else batch.cu_seqlens.shape[0] - 1
    shape = () if reduction == "mean" else (sequences // 2,)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(batch.logits.device)


def anchor_keywords(batch, anchor):
    if anchor == "logits":
        return dict(anchor_logits=batch.anchor_logits)
    if anchor == "margin":
        return dict(anchor_margin=upstream_for(batch, "none", seed=11))
    return {}


# Every keyword that changes a number, in full on the CPU and on a GPU: 2 layouts x 3 losses x 3 anchors x 16. Under the
# interpreter, where a call takes half a second, two or three of the 16, not the same ones in each case.
@pytest.mark.parametrize("anchor", ["none", "logits", "margin"])
@pytest.mark.parametrize("loss", range(len(LOSSES)))
@pytest.mark.parametrize("packed", [False, True])
def test_every_keyword(backend, device, interpreted, packed, loss, anchor):
    # 331 = two tiles of 128, part of one and a ragged end; the second of three pairs' rejected one has no token.
    batch = make_batch(6, length=3, vocabulary=331, packed=packed, device=device)
    labels = batch.labels.clone()
    start, stop = (4, 5) if batch.cu_seqlens is None else batch.cu_seqlens[4:6].tolist()
    labels[start:stop] = -100
    batch = batch._replace(labels=labels)
    chosen = INNER[(loss + len(anchor)) % 7 :: 6] if interpreted else INNER
    for length_normalized, sft_weight, reduction, shift in chosen:
        found = assert_equals_reference(
            run_loss,
            batch,
            backend,
            upstream_for(batch, reduction),
            length_normalized=length_normalized,
            sft_weight=sft_weight,
            reduction=reduction,
            shift=shift,
            **LOSSES[loss],
            **anchor_keywords(batch, anchor),
        )
        assert found.gradient.abs().max() > 1e-3
        assert found.fields["valid"].tolist() == [True, False, True]
        assert found.gradient.dtype == torch.float64
        assert {field.dtype for name, field in found.fields.items() if name != "valid"} == {torch.float64}


# Hyperparameters that a float32 argument would round (1/3), and ones so small or large that it would lose them.
@pytest.mark.parametrize(
    "options", [dict(beta=1 / 3, gamma=1e-9), dict(beta=1e3, gamma=-1 / 7), dict(label_smoothing=1 / 3)]
)
def test_hyperparameters_keep_their_digits(backend, device, options):
    batch = make_batch(length=3, vocabulary=7, device=device)
    assert_equals_reference(run_loss, batch, backend, sft_weight=1 / 7, anchor_logits=batch.anchor_logits, **options)


def test_only_the_loss_carries_gradient(backend, device):
    batch = make_batch(length=3, vocabulary=7, device=device)
    anchor = batch.anchor_logits.clone().requires_grad_()
    logits = batch.logits.clone().requires_grad_()
    out = fused_gapo_loss(logits, batch.labels, anchor_logits=anchor, sft_weight=0.1, backend=backend)
    assert [name for name, field in out._asdict().items() if field.requires_grad] == ["loss"]
    out.loss.backward()
    assert logits.grad.abs().max() > 1e-3
    assert anchor.grad is None
    # and where only the anchors require grad, there is nothing to differentiate
    margin = torch.zeros(2, dtype=torch.float64, device=device).requires_grad_()
    for options in (dict(anchor_logits=anchor), dict(anchor_margin=margin)):
        out = fused_gapo_loss(batch.logits, batch.labels, backend=backend, **options)
        assert not any(field.requires_grad for field in out)


def test_no_gradient_asked(backend, device):
    batch = make_batch(length=3, vocabulary=7, device=device)
    with torch.no_grad():
        out = fused_gapo_loss(batch.logits, batch.labels, backend=backend)
    assert not out.loss.requires_grad
    expected = in_float64(run_loss, batch)
    torch.testing.assert_close(out.loss, expected.fields["loss"])


# Precision ------------------------------------------------------------------------------------------------------------


def errors(found, truth):
    """Root mean square error over all sequences and pairs of each quantity, and over the gradient's elements."""

    def rms(have, want):
        return (have.double() - want.double()).square().mean().sqrt().item()

    keys = [key for key, field in truth.fields.items() if field.is_floating_point() and key not in ("loss", "sft_loss")]
    return {key: rms(found.fields[key], truth.fields[key]) for key in keys} | {
        "gradient": rms(found.gradient, truth.gradient)
    }


# Against float64 of the same, already rounded, numbers. Eight pairs on the CPU, so that no error is small by luck. What
# both paths round to last, the float32 of a field, is a floor under either.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", [run_loss, run_logps])
def test_error_is_at_most_1_5_times_eager(backend, device, interpreted, run, dtype):
    pairs, vocabulary = (2, 331) if interpreted else (8, 1003)
    batch = make_batch(2 * pairs, 6, vocabulary, device=device).to(dtype)
    options = dict(anchor_logits=batch.anchor_logits, reduction="none") if run is run_loss else {}
    upstream = upstream_for(batch, "none") if run is run_loss else None
    truth = in_float64(run, batch, upstream, **options)
    found = run(batch, backend, upstream, **options)
    eager = run(batch, "eager", upstream, **options)
    assert found.gradient.dtype == dtype
    allowed = errors(eager, truth)
    for name, error in errors(found, truth).items():
        floor = 2.0**-25 * truth.fields[name].abs().max().item() if name != "gradient" else 0
        assert error <= 1.5 * allowed[name] + floor, f"{name}: {error:.2e}, eager {allowed[name]:.2e}"
    assert allowed["gradient"] > 1e-12


# Small vocabularies average nothing out: what a shift of the logits costs shows here, and p = 1 must be exactly 1.
@pytest.mark.parametrize("vocabulary", [1, 5, 31, 331])
@pytest.mark.parametrize("label_logit", [-28.0, -14.0, 0.0, 14.0, 40.0])
def test_error_with_labels_that_are_improbable_or_certain(backend, device, interpreted, label_logit, vocabulary):
    batch = make_batch(8 if interpreted else 64, 6, vocabulary, device=device).to(torch.float32)
    places = batch.labels[:, 1:].clamp(min=0).unsqueeze(-1)
    batch.logits[:, :-1].scatter_(-1, places, label_logit)
    truth = in_float64(run_logps, batch)
    found, eager = run_logps(batch, backend), run_logps(batch, "eager")
    allowed = errors(eager, truth)
    for name, error in errors(found, truth).items():
        scale = truth.gradient if name == "gradient" else truth.fields[name]
        assert error <= 1.5 * allowed[name] + 2.0**-26 * scale.abs().max().item(), f"{name}: {error:.2e}, {allowed}"


# Logits around -100, as GPT-2's: neither their exponentials nor the sum of these is a number.
@pytest.mark.parametrize("offset", [-300.0, -100.0, 100.0, 300.0])
def test_logits_far_from_zero(backend, device, offset):
    batch = make_batch(4, 6, 331, device=device)
    batch.logits.add_(offset)
    batch.logits[1, 2].sub_(offset)  # one row unlike the others
    assert_equals_reference(run_logps, batch, backend)


# What is rounded off the product of a row's maximum with log2(e) is as far from nothing as the maximum from zero.
@pytest.mark.parametrize("offset", [300.0, -3000.0, 3000.0, 5000.0])
def test_error_far_from_zero_is_at_most_1_5_times_eager(backend, device, interpreted, offset):
    batch = make_batch(8 if interpreted else 64, 6, 331, device=device).to(torch.float32)
    batch.logits.add_(offset)
    truth = in_float64(run_logps, batch)
    found, eager = run_logps(batch, backend), run_logps(batch, "eager")
    allowed = errors(eager, truth)
    for name, error in errors(found, truth).items():
        assert error <= 1.5 * allowed[name], f"{name}: {error:.2e}, {allowed}"


# A sum over 4096 tokens in float32 would show here, a mean of rounded terms as well.
def test_long_sequences_lose_nothing(backend, device, interpreted):
    length = 64 if interpreted else 4096
    batch = make_batch(2, length, 5, device=device).to(torch.float32)
    truth = in_float64(run_logps, batch, length_normalized=False)
    found = run_logps(batch, backend, length_normalized=False)
    # each token's log-prob is good to float32 rounding, and their errors do not add up in one direction
    torch.testing.assert_close(found.fields["logps"].double(), truth.fields["logps"], rtol=2e-7, atol=0)
    assert truth.fields["logps"].abs().min() > length / 2


# Autograd -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packed, options",
    [
        (False, dict(label_smoothing=0.1)),
        (False, dict(length_normalized=False, sft_weight=0.3, reduction="none", beta=0.3)),
        (True, dict(sft_weight=0.3)),
        (True, dict(loss_type="hinge", gamma=3.0)),
    ],
)
def test_gradcheck(backend, device, packed, options):
    batch = make_batch(2, 3, 11, packed=packed, device=device)

    def loss(logits):
        out = fused_gapo_loss(
            logits,
            batch.labels,
            anchor_logits=batch.anchor_logits,
            cu_seqlens=batch.cu_seqlens,
            backend=backend,
            **options,
        )
        return out.loss

    logits = batch.logits.clone().requires_grad_()
    assert torch.autograd.grad(loss(logits).sum(), logits)[0].abs().max() > 1e-3
    assert torch.autograd.gradcheck(loss, logits, fast_mode=True)


# Where the incoming gradient has no memory of its own (stride 0), or another dtype than the loss by way of a cast.
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_stride_zero(backend, device, reduction):
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = batch.logits.clone().requires_grad_()
    out = fused_gapo_loss(logits, batch.labels, reduction=reduction, backend=backend)
    (out.loss.sum() * 3).backward()
    upstream = torch.full_like(out.loss.detach(), 3)
    torch.testing.assert_close(logits.grad, in_float64(run_loss, batch, upstream, reduction=reduction).gradient)


def test_two_backwards_on_one_graph(backend, device):
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = batch.logits.clone().requires_grad_()
    loss = fused_gapo_loss(logits, batch.labels, anchor_logits=batch.anchor_logits, backend=backend).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert first.abs().max() > 1e-3
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


# With an incoming gradient that requires grad itself, and with one that does not: there a gradient penalty through the
# head would find other paths to differentiate, and be wrong without a word.
@pytest.mark.parametrize("upstream", ["differentiable", "constant"])
def test_double_backward_raises(backend, device, upstream):
    batch = make_batch(length=3, vocabulary=7, device=device)
    head = torch.eye(7, dtype=torch.float64, device=device).requires_grad_()
    hidden = (batch.logits @ head).sin()
    loss = fused_gapo_loss(hidden @ head, batch.labels, backend=backend).loss
    if upstream == "differentiable":
        loss = loss.square()
    (gradient,) = torch.autograd.grad(loss, head, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_inplace_backward(backend, device, packed, dtype):
    batch = make_batch(vocabulary=67, packed=packed, device=device).to(dtype)
    expected = run_loss(batch, backend)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1  # what a model computes: not a leaf, so that autograd may give its memory away
    (gradient,) = torch.autograd.grad(
        fused_gapo_loss(logits, batch.labels, cu_seqlens=batch.cu_seqlens, inplace_backward=True, backend=backend).loss,
        logits,
    )
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(gradient, expected.gradient)
    assert gradient.abs().max() > 1e-3


def test_inplace_backward_reaches_what_made_the_logits(backend, device):
    batch = make_batch(vocabulary=7, device=device)
    gradients = []
    for inplace in (False, True):
        head = torch.eye(7, dtype=torch.float64, device=device).requires_grad_()
        fused_gapo_loss(batch.logits @ head, batch.labels, inplace_backward=inplace, backend=backend).loss.backward()
        gradients.append(head.grad)
    assert gradients[0].abs().max() > 1e-3
    assert torch.equal(*gradients)


def test_inplace_backward_runs_once(backend, device):
    """The logits are gone after it: a second backward must raise, not return a softmax of the gradient."""
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = batch.logits.clone().requires_grad_() * 1
    loss = fused_gapo_loss(logits, batch.labels, inplace_backward=True, backend=backend).loss
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_inplace_backward_is_seen_by_other_users_of_the_logits(backend, device):
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = batch.logits.clone().requires_grad_() * 1
    other = logits.square().sum()
    torch.autograd.grad(fused_gapo_loss(logits, batch.labels, inplace_backward=True, backend=backend).loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


# A row shared by two sequences, overlapping windows, and one logit for a whole vocabulary.
@pytest.mark.parametrize(
    "overlap",
    [
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.as_strided((4, 3, 7), (7, 7, 1)),
        lambda x: x.as_strided((4, 3, 7), (21, 3, 1)),
    ],
)
def test_inplace_backward_refuses_logits_that_share_memory(backend, device, overlap):
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = overlap(batch.logits.clone())
    with pytest.raises(ValueError, match=r"no two logits may share memory; got shape \(4, 3, 7\) with strides"):
        fused_gapo_loss(logits, batch.labels, inplace_backward=True, backend=backend)
    assert_equals_reference(run_loss, batch._replace(logits=logits), backend)  # without it they are fine


def test_activation_checkpointing(backend, device):
    batch = make_batch(length=3, vocabulary=7, device=device)
    logits = batch.logits.clone().requires_grad_()

    def loss(x):
        return fused_gapo_loss(x.sin() * 3, batch.labels, anchor_logits=batch.anchor_logits, backend=backend).loss

    (expected,) = torch.autograd.grad(loss(logits), logits)
    (found,) = torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), logits)
    assert expected.abs().max() > 1e-3
    assert torch.equal(found, expected)


def test_autocast(backend, device):
    """Under autocast a head gives bfloat16 logits: the loss takes them as they are and returns float32."""
    batch = make_batch(vocabulary=67, device=device).to(torch.float32)
    head = torch.eye(67, device=device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        logits = batch.logits @ head
        out = fused_gapo_loss(logits, batch.labels, anchor_logits=logits.detach() * 0.5, backend=backend)
    assert logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    rounded = batch._replace(logits=logits.detach())
    expected = in_float64(run_loss, rounded, anchor_logits=logits.detach() * 0.5)
    torch.testing.assert_close(out.loss.detach().double(), expected.fields["loss"], rtol=1e-6, atol=0)
    out.loss.backward()
    # the head's gradient is a sum of products of bfloat16 numbers
    truth = batch.logits.bfloat16().double().flatten(0, 1).T @ expected.gradient.flatten(0, 1)
    torch.testing.assert_close(head.grad.double(), truth, rtol=0.05, atol=0.02 * truth.abs().max().item())


# Determinism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_on_every_run(backend, device, packed):
    batch = make_batch(4, 3, 331, packed=packed, device=device).to(torch.float32)
    upstream = upstream_for(batch, "mean")
    first, *others = [
        run_loss(batch, backend, upstream, anchor_logits=batch.anchor_logits, sft_weight=0.3) for _ in range(3)
    ]
    for other in others:
        assert_same(other, first, tolerance=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_on_any_number_of_threads(backend, device, monkeypatch, threads):
    """The CPU path hands blocks of rows to threads: blocks of three rows here, so that there are some to hand out."""
    if backend != "torch":
        pytest.skip("threads are the CPU path's")
    from gapo_kernels import cpu

    batch = make_batch(8, 40, 31).to(torch.float32)
    options = dict(anchor_logits=batch.anchor_logits, sft_weight=0.3)
    whole = run_loss(batch, backend, **options)
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", 3 * 31 * 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        blocks = run_loss(batch, backend, **options)
        again = run_loss(batch, backend, **options)
    finally:
        torch.set_num_threads(before)
    assert_same(again, blocks, tolerance=0)
    assert_same(blocks, whole, tolerance=1e-6)  # another order of adding up
    assert_same(blocks, in_float64(run_loss, batch, **options), tolerance=1e-5)


@pytest.mark.parametrize(
    "sequences, kept, threads, blocks",
    [
        (2, 10, 2, 1),  # as many rows as both threads hold
        (2, 11, 2, 4),
        (8, 11, 2, 10),
        (9, 8, 2, 8),
        (16, 1, 2, 1),
        (3, 32, 3, 12),
    ],
)
def test_the_blocks_are_the_kept_rows_in_order_and_as_many_for_each_thread(
    backend, monkeypatch, sequences, kept, threads, blocks
):
    if backend != "torch":
        pytest.skip("blocks are the CPU path's")
    from gapo_kernels import cpu

    length, vocabulary, rows_at_once = 40, 16, 10
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", rows_at_once * vocabulary * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    labels = torch.full((sequences, length), -100)
    labels[:, length - kept :] = 1
    logits = torch.arange(sequences * length).view(sequences, length, 1).expand(-1, -1, vocabulary).float()
    rows = cpu.find_rows(labels, vocabulary, None, True, -100)
    found = cpu.cut_blocks(logits, rows)
    assert len(found) == blocks
    assert blocks == 1 or max(block.at.stop - block.at.start for block in found) <= rows_at_once
    seen = torch.cat([logits[run.rows][:, 0] for block in found for run in block.runs])
    assert seen.tolist() == rows.index.tolist()
    ends = [(block.at.start, block.at.stop) for block in found]
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
    assert all(block.runs[-1].block.stop == block.at.stop - block.at.start for block in found)


@pytest.mark.parametrize("rows, split", [(3, False), (8 * 40, True)])
def test_between_the_blocks_no_operation_is_split(backend, device, monkeypatch, rows, split):
    """Of a logarithm that MKL has split its threads wait busily, on the cores that the next blocks need: a third more
    time. Nor is the memory of a gradient zeroed by torch's own threads. Where all is one block, torch splits it."""
    if backend != "torch":
        pytest.skip("threads are the CPU path's")
    from gapo_kernels import cpu, host_memory

    seen = {}

    def watched(module, name):
        work = getattr(module, name)

        def watching(*args, **options):
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return work(*args, **options)

        monkeypatch.setattr(module, name, watching)

    for module, name in ((cpu, "_token_logps"), (cpu, "pair_results"), (host_memory, "_zero")):
        watched(module, name)
    vocabulary = 2**14
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", rows * vocabulary * 4)
    batch = make_batch(8, 40, vocabulary).to(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(2):  # the first gradient's memory is new: nothing to zero
            run_loss(batch, backend, anchor_logits=batch.anchor_logits)
    finally:
        torch.set_num_threads(before)
    threads = {2} if split else {1}
    zeroed = {"_zero": {1}} if hasattr(mmap, "MADV_HUGEPAGE") else {}  # memory is kept on Linux only
    assert seen == {"_token_logps": threads, "pair_results": threads, **zeroed}


def test_calls_from_several_threads(backend, device):
    """Two losses at once, as two models in one process compute them: neither sees the other's scratch."""
    if backend != "torch":
        pytest.skip("scratch memory is the CPU path's")
    batches = [make_batch(8, 64, 999, seed=seed) for seed in range(2)]
    expected = [run_loss(batch, backend) for batch in batches]
    found = [[], []]
    workers = [
        threading.Thread(target=lambda i=i: found[i].extend(run_loss(batches[i], backend) for _ in range(5)))
        for i in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, want in zip(found, expected):
        assert len(results) == 5
        for result in results:
            assert_same(result, want, tolerance=0)


# Strides and shapes ---------------------------------------------------------------------------------------------------


def embed(values, shape, select):
    """The values inside a larger tensor of NaN, as the view that `select` takes of it: reading outside would show."""
    base = torch.full(shape, torch.nan, dtype=values.dtype, device=values.device)
    view = select(base)
    view.copy_(values)
    return view


STRIDED = {
    "every second position": lambda x: embed(x, (4, 10, 67), lambda base: base[:, ::2]),
    "every second sequence": lambda x: embed(x, (8, 5, 67), lambda base: base[::2]),
    "a slice of a wider vocabulary": lambda x: embed(x, (4, 5, 80), lambda base: base[..., :67]),
    "an unaligned slice": lambda x: embed(x, (4, 5, 80), lambda base: base[..., 3:70]),
    "sequence and position transposed": lambda x: embed(x, (5, 4, 67), lambda base: base.transpose(0, 1)),
    "an offset into storage": lambda x: embed(x.flatten(), (4 * 5 * 67 + 5,), lambda base: base[5:]).view(x.shape),
}


# Policy and anchor each with strides of their own: the anchor contiguous, or the policy, or both strided differently.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRIDED)
def test_strides(backend, device, name, dtype):
    batch = make_batch(vocabulary=67, device=device).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    anchor = STRIDED["a slice of a wider vocabulary"](batch.anchor_logits)
    view = batch._replace(logits=STRIDED[name](batch.logits))
    assert view.logits.stride() != batch.logits.stride() or view.logits.storage_offset()
    version = view.logits._version
    assert_equals_reference(run_loss, view, backend, tolerance=tolerance, anchor_logits=anchor)
    assert_equals_reference(
        run_loss, batch, backend, tolerance=tolerance, anchor_logits=STRIDED[name](batch.anchor_logits)
    )
    assert view.logits._version == version


@pytest.mark.parametrize("name", STRIDED)
def test_inplace_backward_keeps_to_its_view(backend, device, name):
    """The gradient lands in the view's elements and nowhere else in the tensor that it is a view of."""
    batch = make_batch(vocabulary=67, device=device)
    expected = run_loss(batch, backend).gradient
    view = STRIDED[name](batch.logits)
    logits = view.detach().requires_grad_()
    out = fused_gapo_loss(logits, batch.labels, inplace_backward=True, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    # another alignment adds up in another order
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert gradient.data_ptr() == view.data_ptr() and gradient.stride() == view.stride()
    everything = torch.empty(0, dtype=view.dtype, device=device).set_(view.untyped_storage())
    assert everything.isnan().sum() == everything.numel() - view.numel()


def test_expanded_logits(backend, device):
    """One row for all sequences (stride 0): its gradient is what each copy would get."""
    batch = make_batch(vocabulary=67, device=device)
    expanded = batch._replace(logits=batch.logits[:1].expand(4, -1, -1))
    found = assert_equals_reference(run_loss, expanded, backend, anchor_logits=batch.anchor_logits)
    assert found.gradient.abs().max() > 1e-3


def test_packed_rows_of_a_wider_tensor(backend, device):
    batch = make_batch(packed=True, vocabulary=67, device=device)
    rows = batch.labels.shape[0]
    wide = embed(batch.logits, (2 * rows, 80), lambda base: base[::2, 3:70])
    assert_equals_reference(run_loss, batch._replace(logits=wide), backend, anchor_logits=batch.anchor_logits)


def test_strided_labels(backend, device):
    batch = make_batch(device=device)
    labels = batch.labels.repeat_interleave(2, 1)[:, ::2]
    found = run_loss(batch._replace(labels=labels), backend)
    assert not labels.is_contiguous()
    assert_same(found, run_loss(batch, backend), tolerance=0)
