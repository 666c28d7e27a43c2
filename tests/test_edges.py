"""The edge table of spec/API.md, and what users of other libraries ran into (spec/KERNELS.md, section 6)."""

import math

import pytest
import torch

from batches import assert_equals_reference, assert_same, in_float64, make_batch, run_logps, run_loss
from gapo_kernels import fused_gapo_loss, ops, reference, sequence_logps

NAN, INF = math.nan, math.inf


def replace_labels(batch, labels):
    return batch._replace(labels=torch.as_tensor(labels, device=batch.logits.device))


def everywhere(shape, device):
    """Labels of which none is ignored."""
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(2)).to(device)


# Empty completions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_a_pair_with_an_empty_completion_is_inert(backend, device, empty, reduction):
    """Not only zero: the others' loss and gradient are what they are without that pair."""
    batch = make_batch(4, 3, 7, device=device)
    row = 0 if empty == "chosen" else 2
    batch.labels[row] = -100
    options = dict(reduction=reduction, sft_weight=0.3, beta=0.5)
    found = assert_equals_reference(run_loss, batch, backend, **options, anchor_logits=batch.anchor_logits)
    kept = [1, 3]
    alone = batch._replace(logits=batch.logits[kept], labels=batch.labels[kept])
    expected = in_float64(run_loss, alone, **options, anchor_logits=batch.anchor_logits[kept])

    assert found.fields["valid"].tolist() == [False, True]
    assert found.fields["weight"][0] == 0 and (found.gradient[[0, 2]] == 0).all()
    torch.testing.assert_close(found.gradient[kept], expected.gradient, rtol=1e-12, atol=1e-12)
    assert expected.gradient.abs().max() > 1e-3
    torch.testing.assert_close(found.fields["loss"].flatten()[-1], expected.fields["loss"].flatten()[0])
    torch.testing.assert_close(found.fields["sft_loss"], expected.fields["sft_loss"])
    if reduction == "none":
        assert found.fields["loss"][0] == 0


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
def test_what_has_no_gradient_has_none_whatever_comes_from_above(backend, device, upstream):
    batch = make_batch(4, 3, 7, device=device)
    batch.labels[0] = -100
    logits = batch.logits.float().requires_grad_()
    loss = fused_gapo_loss(logits, batch.labels, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))
    assert not gradient[[0, 2]].any() and not gradient[:, -1].any()  # the inert pair; rows that predict nothing
    assert not gradient[1, 0].isfinite().any()


# No token anywhere: every label ignored; one position, which has nothing to predict; no position at all; and packed
# sequences of one row and of none.
NOTHING = {
    "every label ignored": lambda b: b._replace(labels=torch.full_like(b.labels, -100)),
    "T = 1": lambda b: b._replace(logits=b.logits[:, :1], labels=b.labels[:, :1].clamp(min=0)),
    "T = 0": lambda b: b._replace(logits=b.logits[:, :0], labels=b.labels[:, :0]),
    "packed, one row each": lambda b: b._replace(
        logits=b.logits[:, 0], labels=b.labels[:, 0].clamp(min=0), cu_seqlens=torch.arange(5, dtype=torch.int32)
    ),
    "packed, no row": lambda b: b._replace(
        logits=b.logits[0, :0], labels=b.labels[0, :0], cu_seqlens=torch.zeros(5, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NOTHING)
def test_no_token_at_all(backend, device, name, reduction):
    batch = NOTHING[name](make_batch(4, 3, 7, device=device))
    if batch.cu_seqlens is not None:
        batch = batch._replace(cu_seqlens=batch.cu_seqlens.to(device))
    for function in (run_loss, run_logps):
        options = dict(reduction=reduction, sft_weight=0.3) if function is run_loss else {}
        found = function(batch, backend, **options)
        assert_same(found, in_float64(function, batch, **options))
        assert found.gradient.shape == batch.logits.shape and (found.gradient == 0).all()
        for field in found.fields.values():
            assert not field.any()


def test_packed_sequences_of_no_row(backend, device):
    """Empty sequences first, in the middle and last, beside ones with rows."""
    batch = make_batch(2, 4, 7, device=device)
    packed = batch._replace(
        logits=batch.logits.flatten(0, 1),
        labels=everywhere((8,), device),
        cu_seqlens=torch.tensor([0, 0, 3, 3, 3, 8, 8], dtype=torch.int32, device=device),
    )
    found = assert_equals_reference(run_logps, packed, backend)
    assert found.fields["counts"].tolist() == [0, 2, 0, 0, 4, 0]
    found = assert_equals_reference(run_loss, packed, backend)  # pairs (0, 3), (1, 4), (2, 5)
    assert found.fields["valid"].tolist() == [False, True, False]
    assert found.gradient.abs().max() > 1e-3


def test_one_token_without_shift(backend, device):
    batch = make_batch(4, 1, 7, device=device)
    found = assert_equals_reference(
        run_loss, replace_labels(batch, [[1], [2], [3], [4]]), backend, shift=False, anchor_logits=batch.anchor_logits
    )
    assert found.fields["valid"].all() and found.gradient.abs().max() > 1e-3


def test_one_pair(backend, device):
    batch = make_batch(2, 3, 7, device=device)
    found = assert_equals_reference(run_loss, batch, backend, sft_weight=0.2, anchor_logits=batch.anchor_logits)
    assert found.fields["valid"].tolist() == [True] and found.gradient.abs().max() > 1e-3


# Vocabularies ---------------------------------------------------------------------------------------------------------


# Smaller than a 16-byte vector, odd, and not divisible by any tile; in 16 bits an odd row has every eighth row aligned.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 5, 31, 1003])
def test_odd_vocabulary(backend, device, vocabulary, dtype):
    batch = make_batch(4, 3, vocabulary, device=device).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    found = assert_equals_reference(run_loss, batch, backend, tolerance=tolerance, anchor_logits=batch.anchor_logits)
    assert found.gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_large_vocabulary(backend, device, interpreted, vocabulary, dtype):
    if interpreted and (vocabulary > 100_000 or dtype == torch.float32):
        pytest.skip("seconds a row in the interpreter: one such case is enough there")
    batch = make_batch(2, 2, vocabulary, device=device).to(dtype)
    # labels in the first, the last and the last but one column
    labels = [[0, vocabulary - 1], [0, vocabulary - 2]]
    batch = replace_labels(batch, labels)
    found = run_loss(batch, backend, shift=False, beta=0.2)
    expected = in_float64(run_loss, batch, shift=False, beta=0.2)
    assert_same(found, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-3)
    at_label = found.gradient[[0, 0, 1, 1], [0, 1, 0, 1], [0, vocabulary - 1, 0, vocabulary - 2]]
    assert at_label.abs().min() > 0.01
    for row in found.gradient.double().flatten(0, 1):
        assert abs(row.sum()) < 0.01 * row.abs().sum()  # softmax - onehot adds up to nothing


def test_vocabulary_of_one(backend, device):
    """Every token is certain: log-probs 0, no gradient, and the loss that of a gap of 0."""
    batch = make_batch(4, 3, 1, device=device)
    found = assert_equals_reference(run_loss, batch, backend, anchor_logits=batch.anchor_logits, gamma=0.5)
    assert found.fields["valid"].all() and (found.fields["chosen_logps"] == 0).all()
    torch.testing.assert_close(found.fields["loss"].item(), math.log1p(math.exp(0.5)))
    assert (found.gradient == 0).all()


# A row stride of 45 elements puts eight rows on the eight alignments that 16-bit elements can have, with vocabularies
# that end before the first aligned element, at it, and anywhere after.
@pytest.mark.parametrize("vocabulary", [1, 3, 7, 8, 9, 15, 16, 17, 23, 44])
def test_every_alignment(backend, device, vocabulary):
    wide = torch.full((8, 1, 45), NAN, dtype=torch.float16, device=device)
    batch = make_batch(8, 1, vocabulary, dtype=torch.float16, device=device)
    wide[..., :vocabulary] = batch.logits
    batch = batch._replace(logits=wide[..., :vocabulary], labels=torch.arange(8, device=device)[:, None] % vocabulary)
    upstream = torch.arange(1.0, 9.0, device=device)
    for inplace in (False, True):
        assert_equals_reference(run_logps, batch, backend, upstream, 2e-3, shift=False, inplace_backward=inplace)
        if inplace:
            assert wide[..., vocabulary:].isnan().all()


# Rows that end before their first aligned element are left out: nothing is accessed at the address that they give.
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["gradient", "zeros"])
@pytest.mark.parametrize("vocabulary", [23, 45])
def test_alignment_is_as_said(backend, device, interpreted, vocabulary, scale, inplace, monkeypatch):
    """Compilers believe what they are told of addresses: neither a binary nor a result here shows where it is wrong."""
    if not interpreted:
        pytest.skip("what is said is seen in the interpreter")
    from triton.runtime.interpreter import TensorHandle

    said = []
    monkeypatch.setattr(TensorHandle, "set_attr", lambda handle, name, values: said.append((name, handle.data, values)))
    batch = make_batch(8, 1, 45, dtype=torch.float16, device=device)
    batch = batch._replace(logits=batch.logits[..., :vocabulary], labels=torch.arange(8, device=device)[:, None])
    run_logps(batch, backend, torch.full((8,), scale, device=device), shift=False, inplace_backward=inplace)
    divisible = [(data % values == 0).all() for name, data, values in said if name == "tt.divisibility"]
    assert len(divisible) >= 4 * 8 and all(divisible)


# Values ---------------------------------------------------------------------------------------------------------------


def with_values(dtype, device, change):
    """Two pairs over 331 tokens, every row predicting, after `change(logits, labels)`."""
    batch = make_batch(4, 2, 331, device=device).to(dtype)
    labels = torch.tensor([[3, 330], [200, 4], [5, 129], [0, 64]], device=device)
    change(batch.logits, labels)
    return batch._replace(labels=labels)


def lowest(dtype):
    return torch.finfo(dtype).min


def confident(logits, labels):
    logits.fill_(-1e4)
    logits.scatter_(-1, labels.unsqueeze(-1), 1e4)


def labels_keep(logits, labels, value):
    """Everything but the label's logit and one more becomes `value`."""
    kept = logits.gather(-1, labels.unsqueeze(-1))
    logits[..., 1:] = value
    logits.scatter_(-1, labels.unsqueeze(-1), kept)


VALUES = {
    "far apart, +-1e4": lambda x, y: x.copy_(x.sign() * 1e4),
    "certain, +-1e4": confident,
    "impossible, +-1e4": lambda x, y: (confident(x, y), x.neg_()),
    "all large": lambda x, y: x.add_(1e4),
    "all negative": lambda x, y: x.sub_(1e4),
    "nothing but the lowest number": lambda x, y: x.fill_(lowest(x.dtype)),
    "one row of the lowest number": lambda x, y: x[0, 1].fill_(lowest(x.dtype)),
    "the lowest number beside others": lambda x, y: labels_keep(x, y, lowest(x.dtype)),
    "nothing but the largest number": lambda x, y: x.fill_(torch.finfo(x.dtype).max),
    "-inf away from the labels": lambda x, y: labels_keep(x, y, -INF),
    "-inf in the first tile": lambda x, y: (x[..., :200].fill_(-INF), y.fill_(250)),
    "-inf in the last tile": lambda x, y: (x[..., 100:].fill_(-INF), y.fill_(50)),
    "-inf in every other column": lambda x, y: (x[..., 1::2].fill_(-INF), y.mul_(2).remainder_(330)),
    "-inf at a chosen label": lambda x, y: x[0, 1, 330].fill_(-INF),
    "-inf at a rejected label": lambda x, y: x[3, 0, 0].fill_(-INF),
    "-inf at both labels of a pair": lambda x, y: (x[0, 1, 330].fill_(-INF), x[2, 0, 5].fill_(-INF)),
    "a row of -inf": lambda x, y: x[1, 0].fill_(-INF),
    "+inf at a label": lambda x, y: x[0, 1, 330].fill_(INF),
    "+inf away from the label": lambda x, y: x[0, 1, 7].fill_(INF),
    "+inf and -inf": lambda x, y: (x[0, 1, 7].fill_(INF), x[0, 1, 300].fill_(-INF)),
    "NaN at a label": lambda x, y: x[1, 0, 200].fill_(NAN),
    "NaN away from the label": lambda x, y: x[1, 0, 7].fill_(NAN),
    "NaN in the last column": lambda x, y: x[1, 0, 330].fill_(NAN),
    "NaN in a rejected row": lambda x, y: x[3, 1].fill_(NAN),
}


# IEEE, as the reference: what is finite there is finite and equal here, what is not is the same infinity or NaN, in every
# field and in the gradient.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values_as_the_reference(backend, device, name, dtype):
    batch = with_values(dtype, device, VALUES[name])
    options = dict(shift=False, reduction="none")
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    assert_equals_reference(run_loss, batch, backend, tolerance=tolerance, **options)


# The anchor's logits go through the same kernel, but only its margin shows.
@pytest.mark.parametrize(
    "name", ["-inf in the first tile", "a row of -inf", "+inf at a label", "NaN in a rejected row"]
)
def test_anchor_values_as_the_reference(backend, device, name):
    strange = with_values(torch.float32, device, VALUES[name])
    plain = with_values(torch.float32, device, lambda x, y: None)._replace(labels=strange.labels)
    options = dict(shift=False, reduction="none", anchor_logits=strange.logits)
    assert_equals_reference(run_loss, plain, backend, tolerance=2e-6, **options)


def test_rows_of_the_lowest_number_are_uniform(backend, device):
    """Not against the reference alone: a maximum that starts at -1e30, or at 0, loses such rows."""
    batch = with_values(torch.float32, device, lambda x, y: x.fill_(lowest(x.dtype)))
    found = run_logps(batch, backend, shift=False)
    torch.testing.assert_close(found.fields["logps"], torch.full((4,), -math.log(331), device=device))
    batch = with_values(torch.float32, device, lambda x, y: x.fill_(-1e30))
    found = run_logps(batch, backend, shift=False)
    torch.testing.assert_close(found.fields["logps"], torch.full((4,), -math.log(331), device=device))


def test_minus_infinity_has_no_probability_and_no_gradient(backend, device):
    batch = with_values(torch.float64, device, VALUES["-inf in the first tile"])
    found = assert_equals_reference(run_logps, batch, backend, shift=False)
    assert (found.gradient[..., :200] == 0).all() and found.gradient[..., 200:].abs().min() > 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize("where", ["policy", "anchor"])
def test_nan_stays_in_its_pair(backend, device, where, loss_type):
    batch = make_batch(6, 3, 67, device=device)
    clean = run_loss(batch, backend, reduction="none", loss_type=loss_type, anchor_logits=batch.anchor_logits, beta=0.5)
    anchor, logits = batch.anchor_logits.clone(), batch.logits.clone()
    (logits if where == "policy" else anchor)[1] = NAN  # the chosen completion of the second pair of three
    dirty = run_loss(
        batch._replace(logits=logits), backend, reduction="none", loss_type=loss_type, anchor_logits=anchor, beta=0.5
    )
    others = torch.tensor([0, 2], device=device)
    assert dirty.fields["loss"].isnan().tolist() == [False, True, False]
    assert dirty.fields["weight"].isnan().tolist() == [False, True, False]
    for name, field in dirty.fields.items():
        if field.dim():
            assert torch.equal(field[others], clean.fields[name][others]), name
    rows = torch.tensor([0, 2, 3, 5], device=device)
    assert torch.equal(dirty.gradient[rows], clean.gradient[rows])
    assert clean.gradient[rows].abs().max() > 1e-3
    assert dirty.gradient[[1, 4]].isnan().any((1, 2)).all()  # and the pair's own rows show it, both of them
    # the mean is NaN, and still the other pairs' gradient is not
    mean = run_loss(batch._replace(logits=logits), backend, loss_type=loss_type, anchor_logits=anchor, beta=0.5)
    assert mean.fields["loss"].isnan()
    torch.testing.assert_close(mean.gradient[rows], clean.gradient[rows] / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_predict_nothing_are_never_read(backend, device, packed, inplace):
    """NaN in them, in policy and anchor, reaches no field, and their gradient is exactly zero, not NaN * 0."""
    batch = make_batch(4, 4, 67, packed=packed, device=device)
    _, predicted = reference_rows(batch)
    assert 0 < predicted.sum() < predicted.numel()
    logits, anchor = batch.logits.clone(), batch.anchor_logits.clone()
    logits[~predicted] = anchor[~predicted] = NAN
    expected = in_float64(run_loss, batch, anchor_logits=batch.anchor_logits)
    found = run_loss(batch._replace(logits=logits), backend, anchor_logits=anchor, inplace_backward=inplace)
    assert_same(found, expected)
    assert (found.gradient[~predicted] == 0).all()
    assert found.gradient[predicted].abs().max() > 1e-3


def reference_rows(batch):
    """The rows that predict a token: those that the float64 reference gives a gradient."""
    gradient = in_float64(run_logps, batch).gradient
    return gradient, gradient.abs().amax(-1) > 0


# A token of probability 1 - 1e-3 ... 1 - 1e-8: the gradient at the label is -(1 - p), which 16 bits hold to three
# digits if it is subtracted before it is rounded, and which is 0 if p is rounded first.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [8.0, 12.0, 16.0])
def test_confident_tokens_keep_their_gradient(backend, device, dtype, lead):
    logits = torch.zeros(2, 1, 9, dtype=dtype, device=device)
    logits[:, :, 4] = lead
    batch = make_batch(2, 1, 9, device=device)._replace(logits=logits, labels=torch.full((2, 1), 4, device=device))
    upstream = torch.tensor([1e3, -1e3], device=device)  # above float16's smallest numbers
    found = run_logps(batch, backend, upstream, shift=False)
    truth = in_float64(run_logps, batch, upstream, shift=False)
    assert truth.gradient[0, 0, 4] > 0
    # one rounding of float32, whose own difference p - 1 is good to 6e-8, to 16 bits
    torch.testing.assert_close(found.gradient.double(), truth.gradient, rtol=2**-7, atol=1.5e-7 * 1e3)
    assert (found.gradient[:, :, 4] != 0).all()


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_labels_of_other_integers(backend, device, dtype):
    batch = make_batch(4, 3, 67, device=device)
    found = run_loss(batch._replace(labels=batch.labels.to(dtype)), backend)
    assert_same(found, run_loss(batch, backend), tolerance=0)


def test_cu_seqlens_of_int64(backend, device):
    batch = make_batch(4, 3, 67, packed=True, device=device)
    found = run_loss(batch._replace(cu_seqlens=batch.cu_seqlens.long()), backend)
    assert_same(found, run_loss(batch, backend), tolerance=0)


# Another negative number, one beyond any vocabulary, and a token of the vocabulary (a padding token's id).
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ignore_index", [-1, 10_000, 2])
def test_ignore_index(backend, device, packed, ignore_index):
    batch = make_batch(4, 4, 7, packed=packed, device=device)
    labels = batch.labels.clone()
    labels[labels == -100] = ignore_index
    found = assert_equals_reference(
        run_loss, batch._replace(labels=labels), backend, ignore_index=ignore_index, beta=0.5
    )
    assert found.gradient.abs().max() > 1e-3
    if ignore_index != 2:
        assert_same(found, run_loss(batch, backend, beta=0.5), tolerance=0)


# (labels, shift, where) of a label that no vocabulary of 7 has, at the row and position where it stands in `labels`.
WRONG_LABELS = [
    ([[1, 2, 3], [1, 2, 7], [1, 2, 3], [1, 2, 3]], True, "got 7 at row 1, position 2"),
    ([[1, 2, 3], [1, 2, 3], [1, 2, 3], [-1, -5, 3]], True, "got -5 at row 3, position 1"),
    ([[99, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]], False, "got 99 at row 0, position 0"),
    ([[1, 2, 3], [1, 2, 3], [1, -101, 3], [1, 2, 3]], False, "got -101 at row 2, position 1"),
]


@pytest.mark.parametrize("labels, shift, where", WRONG_LABELS)
def test_label_out_of_range_on_the_cpu(backend, device, labels, shift, where):
    if device.type != "cpu":
        pytest.skip("a GPU does not stop for it: the tests below, and test_gpu.py")
    batch = replace_labels(make_batch(4, 3, 7), labels)
    message = rf"labels must be in \[0, 7\) or ignore_index \(-100\), {where}"
    for chosen in (backend, "reference"):
        for run in (run_loss, run_logps):
            with pytest.raises(ValueError, match=message):
                run(batch, chosen, shift=shift)
    # packed, the row is that of the flat labels
    row, position = _place(where)
    packed = batch._replace(
        logits=batch.logits.flatten(0, 1),
        labels=batch.labels.flatten(),
        cu_seqlens=torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=rf"at row {3 * row + position}$"):
        run_loss(packed, backend, shift=shift)


def _place(where):
    *_, row, _, position = where.replace(",", "").split()
    return int(row), int(position)


def test_first_label_is_never_predicted(backend, device):
    """With shift, position 0 is a prompt's first token: whatever stands there is no label."""
    batch = make_batch(4, 3, 7, device=device)
    labels = batch.labels.clone()
    labels[:, 0] = 12345
    assert_same(run_loss(batch._replace(labels=labels), backend), run_loss(batch, backend), tolerance=0)


# What a GPU does, and every back end where nobody looks first: the pair is NaN, and no memory is read for it.
@pytest.mark.parametrize("label", [67, -1, 2**31 + 3, -(2**40)])
def test_unchecked_label_out_of_range_is_nan_in_its_pair(backend, device, monkeypatch, label):
    monkeypatch.setattr(ops.validation, "check_values", lambda *_: None)
    batch = make_batch(6, 3, 67, device=device)
    clean = run_loss(batch, backend, reduction="none", beta=0.5)
    labels = batch.labels.clone()
    labels[1, 1] = label
    dirty = run_loss(batch._replace(labels=labels), backend, reduction="none", beta=0.5)
    assert dirty.fields["loss"].isnan().tolist() == [False, True, False]
    assert dirty.fields["chosen_logps"].isnan().tolist() == [False, True, False]
    rows = torch.tensor([0, 2, 3, 5], device=device)
    assert torch.equal(dirty.gradient[rows], clean.gradient[rows])
    assert dirty.gradient[1].isnan().any()


# Sizes ----------------------------------------------------------------------------------------------------------------


def far_apart(tmp_path, stride_sequence, stride_row):
    """Float16 logits (2, 3, 5) in a sparse file of 8 GiB, with strides of 2^30 elements and more.

    They begin 2^31 elements into it, so that an offset that wrapped to a negative int32 would land in the file, on
    zeros, and show as wrong numbers.
    """
    elements = 2**32 + 64
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=elements, dtype=torch.float16)
    return storage.as_strided((2, 3, 5), (stride_sequence, stride_row, 1), 2**31)


# A sequence beyond 2^31 elements, and a row of a sequence.
@pytest.mark.parametrize("strides", [(2**31 - 3, 8), (32, 2**30 + 4)])
def test_offsets_past_2_to_the_31(backend, device, tmp_path, strides):
    if device.type != "cpu":
        pytest.skip("test_gpu.py has real memory for it")
    batch = make_batch(2, 3, 5, dtype=torch.float16)
    labels = torch.tensor([[1, 2, 3], [4, 0, 1]])
    logits = far_apart(tmp_path, *strides)
    logits.copy_(batch.logits)
    batch = batch._replace(labels=labels)
    options = dict(shift=False, anchor_margin=torch.tensor([0.3]))
    near = run_loss(batch, backend, **options)
    assert near.gradient.abs().min() > 1e-4
    far = batch._replace(logits=logits)
    tolerance = 1e-3  # 16-bit rows of another alignment add up in another order
    assert_same(run_loss(far, backend, **options), near, tolerance)
    anchored = [run_loss(batch, backend, shift=False, anchor_logits=x) for x in (logits, batch.logits)]
    assert_same(*anchored, tolerance)
    assert_same(run_loss(far, backend, inplace_backward=True, **options), near, tolerance)
    torch.testing.assert_close(logits, near.gradient, rtol=tolerance, atol=tolerance)  # written where they lie


def test_packed_offsets_past_2_to_the_31(backend, device, tmp_path):
    if device.type != "cpu":
        pytest.skip("test_gpu.py has real memory for it")
    batch = make_batch(2, 3, 5, dtype=torch.float16)
    packed = batch._replace(
        logits=batch.logits[0],
        labels=torch.tensor([1, 2, 3]),
        cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
    )
    near = run_loss(packed, backend, shift=False)
    assert near.gradient.abs().min() > 1e-4
    logits = far_apart(tmp_path, 0, 2**30 + 4)[0]
    logits.copy_(packed.logits)
    far = packed._replace(logits=logits)
    assert_same(run_loss(far, backend, shift=False), near, 1e-3)
    assert_same(run_loss(far, backend, shift=False, inplace_backward=True), near, 1e-3)


# Hyperparameters at their bounds --------------------------------------------------------------------------------------


# The largest label smoothing below one half, a beta near nothing, a logistic saturated at either end, an integer.
@pytest.mark.parametrize(
    "options",
    [dict(label_smoothing=0.499999), dict(beta=1e-6, gamma=0.0), dict(gamma=-50.0), dict(gamma=50.0), dict(beta=2)],
)
def test_extreme_hyperparameters(backend, device, options):
    batch = make_batch(4, 3, 7, device=device)
    found = assert_equals_reference(run_loss, batch, backend, reduction="none", **options)
    assert (found.fields["loss"] > 0).all()


# Wrong arguments ------------------------------------------------------------------------------------------------------

LOGITS, LABELS = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64)
PACKED, ROWS = torch.zeros(12, 7), torch.zeros(12, dtype=torch.int64)
BOUNDS = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)

# (logits, labels, keywords, error, what the message says), for both functions
WRONG_TENSORS = [
    ("logits", LABELS, {}, TypeError, "logits must be a floating-point tensor, got str"),
    (LOGITS.long(), LABELS, {}, TypeError, "logits must be a floating-point tensor, got a torch.int64 tensor"),
    (LOGITS.to(torch.float8_e4m3fn), LABELS, {}, TypeError, "logits must be float16, .* or float64, got torch.float8"),
    (LOGITS, LABELS.float(), {}, TypeError, r"labels must be an integer tensor \(int64\), got a torch.float32 tensor"),
    (LOGITS, LABELS.bool(), {}, TypeError, r"labels must be an integer tensor \(int64\), got a torch.bool tensor"),
    (LOGITS, [[0]], {}, TypeError, "labels must be an integer tensor.*got list"),
    (LOGITS.to_sparse(), LABELS, {}, TypeError, "logits must be a dense tensor"),
    (LOGITS, LABELS.to_sparse(), {}, TypeError, "labels must be a dense tensor"),
    (LOGITS[0], LABELS[0], {}, ValueError, r"logits must have shape \(S, T, V\), or \(N, V\) with cu_seqlens, got \(3, 7\)"),
    (LOGITS, LABELS, {"cu_seqlens": BOUNDS}, ValueError, r"shape \(N, V\) when cu_seqlens is given, got \(4, 3, 7\)"),
    (LOGITS, LABELS[:2], {}, ValueError, r"labels must have the logits' shape.*\(4, 3\), got \(2, 3\)"),
    (LOGITS, LABELS[:, :2], {}, ValueError, r"\(4, 3\), got \(4, 2\)"),
    (LOGITS, LABELS[0], {}, ValueError, r"\(4, 3\), got \(3,\)"),
    (LOGITS[..., :0], LABELS, {}, ValueError, r"vocabulary of at least one token, got shape \(4, 3, 0\)"),
    (LOGITS[..., ::2], LABELS, {}, ValueError, r"contiguous in their last dimension \(stride 1\), got strides \(21, 7, 2\).*logits.contiguous"),
    (LOGITS.transpose(0, 2).contiguous().transpose(0, 2), LABELS, {}, ValueError, "contiguous in their last dimension"),
    (LOGITS, LABELS.to("meta"), {}, ValueError, "labels must be on the device of logits, cpu, got meta"),
    (LOGITS, LABELS, {"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got float"),
    (LOGITS, LABELS, {"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    (PACKED, ROWS, {"cu_seqlens": [0, 12]}, TypeError, "cu_seqlens must be an int32 tensor, got list"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS.float()}, TypeError, "cu_seqlens must be an int32 tensor, got a torch.float32"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS[:1]}, ValueError, r"cu_seqlens must have shape \(S \+ 1,\) with S >= 1, got \(1,\)"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS[None]}, ValueError, r"cu_seqlens must have shape.*got \(1, 5\)"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS.to("meta")}, ValueError, "cu_seqlens must be on the device of logits, cpu, got meta"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS - 1}, ValueError, r"rise from 0 to the number of rows, 12, got \[-1, 2, 5, 8, 11\]"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS + 1}, ValueError, r"rise from 0 to the number of rows, 12, got \[1, 4,"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS * 2}, ValueError, r"the number of rows, 12, got \[0, 6, 12, 18, 24\]"),
    (PACKED, ROWS, {"cu_seqlens": BOUNDS[[0, 2, 1, 3, 4]]}, ValueError, r"cu_seqlens must rise.*got \[0, 6, 3, 9, 12\]"),
    (LOGITS, LABELS, {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG_TENSORS)))
@pytest.mark.parametrize(
    "function", [fused_gapo_loss, sequence_logps, reference.fused_gapo_loss, reference.sequence_logps]
)
def test_wrong_tensors(function, case):
    logits, labels, keywords, error, message = WRONG_TENSORS[case]
    if "backend" in keywords and function.__module__.endswith("reference"):
        pytest.skip("the reference takes any backend and is what it is")
    with pytest.raises(error, match=message):
        function(logits, labels, **keywords)


WRONG_OPTIONS = [
    (dict(beta=0.0), ValueError, "beta must be > 0, got 0.0"),
    (dict(beta=-1), ValueError, "beta must be > 0, got -1"),
    (dict(beta=NAN), ValueError, "beta must be finite, got nan"),
    (dict(beta=True), TypeError, "beta must be a number, got bool"),
    (dict(beta="2"), TypeError, "beta must be a number, got str"),
    (dict(beta=torch.tensor(2.0)), TypeError, "beta must be a number, got Tensor"),
    (dict(gamma=INF), ValueError, "gamma must be finite, got inf"),
    (dict(gamma=None), TypeError, "gamma must be a number, got NoneType"),
    (dict(label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    (dict(label_smoothing=-0.1), ValueError, r"label_smoothing must be in \[0, 0.5\), got -0.1"),
    (dict(label_smoothing=NAN), ValueError, "label_smoothing must be finite, got nan"),
    (dict(sft_weight=-0.1), ValueError, "sft_weight must be >= 0, got -0.1"),
    (dict(sft_weight=INF), ValueError, "sft_weight must be finite, got inf"),
    (dict(loss_type="dpo"), ValueError, "loss_type must be one of 'sigmoid', 'hinge', got 'dpo'"),
    (dict(reduction="sum"), ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
    (dict(anchor_logits=LOGITS, anchor_margin=torch.zeros(2)), ValueError, "anchor_logits and anchor_margin were both given; expected at most one"),
    (dict(anchor_logits=LOGITS.double()), TypeError, "anchor_logits must have the logits' dtype, torch.float32, got a torch.float64"),
    (dict(anchor_logits=0), TypeError, "anchor_logits must have the logits' dtype, torch.float32, got int"),
    (dict(anchor_logits=LOGITS[:2]), ValueError, r"anchor_logits must have the logits' shape, \(4, 3, 7\), got \(2, 3, 7\)"),
    (dict(anchor_logits=torch.zeros(4, 3, 14)[..., ::2]), ValueError, "anchor_logits must be contiguous in their last dimension"),
    (dict(anchor_logits=LOGITS.to("meta")), ValueError, "anchor_logits must be on the device of logits, cpu, got meta"),
    (dict(anchor_margin=torch.zeros(4)), ValueError, r"anchor_margin must have shape \(2,\), one value a pair, got \(4,\)"),
    (dict(anchor_margin=torch.zeros(2, 1)), ValueError, r"anchor_margin must have shape \(B,\) with B >= 1, got \(2, 1\)"),
    (dict(anchor_margin=torch.zeros(2).long()), TypeError, "anchor_margin must be a floating-point tensor, got a torch.int64"),
    (dict(anchor_margin=0.0), TypeError, "anchor_margin must be a floating-point tensor, got float"),
    (dict(anchor_margin=torch.zeros(2, device="meta")), ValueError, "anchor_margin must be on the device of logits, cpu, got meta"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG_OPTIONS)))
@pytest.mark.parametrize("function", [fused_gapo_loss, reference.fused_gapo_loss])
def test_wrong_options(function, case):
    keywords, error, message = WRONG_OPTIONS[case]
    with pytest.raises(error, match=message):
        function(LOGITS, LABELS, **keywords)


@pytest.mark.parametrize("function", [fused_gapo_loss, reference.fused_gapo_loss])
def test_odd_number_of_sequences(function):
    for logits, labels, keywords, count in [
        (LOGITS[:3], LABELS[:3], {}, 3),
        (LOGITS[:0], LABELS[:0], {}, 0),
        (PACKED, ROWS, {"cu_seqlens": BOUNDS[[0, 2, 3, 4]]}, 3),
    ]:
        with pytest.raises(ValueError, match=f"expected 2B sequences.*got {count}"):
            function(logits, labels, **keywords)


@pytest.mark.parametrize("function", [fused_gapo_loss, sequence_logps])
def test_unknown_arguments_are_refused(function):
    """Nothing is swallowed: a keyword that is not supported here is an error, and keywords are keywords."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'average_log_prob'"):
        function(LOGITS, LABELS, average_log_prob=True)
    with pytest.raises(TypeError, match="positional argument"):
        function(LOGITS, LABELS, None)


# Back ends ------------------------------------------------------------------------------------------------------------


def test_triton_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton", reason="without Triton the message is another one: test_import.py")
    for function in (fused_gapo_loss, sequence_logps):
        with pytest.raises(RuntimeError, match="needs a GPU tensor, got one on cpu.*pass backend='auto' or 'torch'"):
            function(LOGITS, LABELS, backend="triton")


def test_auto_is_torch_on_the_cpu(monkeypatch):
    batch = make_batch(4, 3, 67)
    expected = run_loss(batch, "torch", anchor_logits=batch.anchor_logits)
    assert_same(run_loss(batch, "auto", anchor_logits=batch.anchor_logits), expected, tolerance=0)


def test_reference_backend_is_the_reference():
    batch = make_batch(4, 3, 67)
    keywords = dict(
        anchor_logits=batch.anchor_logits,
        beta=0.7,
        gamma=0.2,
        label_smoothing=0.1,
        length_normalized=False,
        sft_weight=0.3,
        shift=False,
        reduction="none",
    )
    assert_same(run_loss(batch, "reference", **keywords), run_loss(batch, "eager", **keywords), tolerance=0)
    packed = make_batch(4, 3, 67, packed=True)
    hinge = dict(loss_type="hinge", ignore_index=3, anchor_margin=torch.tensor([0.3, -0.2]))
    packed.labels[packed.labels == -100] = 3
    assert_same(run_loss(packed, "reference", **hinge), run_loss(packed, "eager", **hinge), tolerance=0)
    for keywords in (dict(length_normalized=False), dict(shift=False)):
        assert_same(run_logps(batch, "reference", **keywords), run_logps(batch, "eager", **keywords), tolerance=0)
