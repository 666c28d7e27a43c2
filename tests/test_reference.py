"""The eager reference against spec/GAPO.md written out in plain Python; all else is tested against the reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from batches import make_batch
from gapo_kernels import reference

IGNORE = -100


def log_softmax(row):
    peak = max(row)
    return [x - peak - math.log(sum(math.exp(y - peak) for y in row)) for x in row]


def sequences_of(tensor, cu_seqlens):
    """Padded or packed rows as one list per sequence."""
    if cu_seqlens is None:
        return tensor.tolist()
    bounds = cu_seqlens.tolist()
    return [tensor[a:b].tolist() for a, b in zip(bounds, bounds[1:])]


def predictions(labels, shift):
    """(position, token) of every predicted token of one sequence."""
    if shift:
        return [(t, labels[t + 1]) for t in range(len(labels) - 1) if labels[t + 1] != IGNORE]
    return [(t, token) for t, token in enumerate(labels) if token != IGNORE]


def log_probability(logits, labels, shift, normalized):
    tokens = [log_softmax(logits[t])[token] for t, token in predictions(labels, shift)]
    if not tokens:
        return 0.0
    return sum(tokens) / (len(tokens) if normalized else 1)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def gapo(batch, anchor, *, beta, gamma, eps, hinge, normalized, sft, shift, mean):
    """Every field of section 2, and d loss / d logits as one list of rows per sequence."""
    labels = sequences_of(batch.labels, batch.cu_seqlens)
    policy_logits = sequences_of(batch.logits, batch.cu_seqlens)
    s = [log_probability(x, y, shift, normalized) for x, y in zip(policy_logits, labels)]
    count = [len(predictions(y, shift)) for y in labels]
    pairs = range(len(s) // 2)
    B = len(pairs)
    margin = [s[i] - s[B + i] for i in pairs]
    anchor_margin = [0.0] * B
    if anchor:
        anchor_logits = sequences_of(batch.anchor_logits, batch.cu_seqlens)
        t = [log_probability(x, y, shift, normalized) for x, y in zip(anchor_logits, labels)]
        anchor_margin = [t[i] - t[B + i] for i in pairs]
    gap = [margin[i] - anchor_margin[i] for i in pairs]
    valid = [count[i] > 0 and count[B + i] > 0 for i in pairs]

    loss, weight = [], []
    for i in pairs:
        z = beta * gap[i] - gamma
        if not valid[i]:
            loss.append(0.0)
            weight.append(0.0)
        elif hinge:
            loss.append(max(0.0, 1 - z))
            weight.append(beta if z < 1 else 0.0)
        else:
            loss.append(-(1 - eps) * math.log(sigmoid(z)) - eps * math.log(sigmoid(-z)))
            weight.append(beta * (sigmoid(-z) - eps))

    chosen_tokens = sum(count[i] for i in pairs if valid[i])
    nll = 0.0
    for i in pairs:
        if valid[i]:
            nll -= log_probability(policy_logits[i], labels[i], shift, False) / chosen_tokens
    denominator = max(1, sum(valid)) if mean else 1

    gradient = []
    for row, (logits, sequence) in enumerate(zip(policy_logits, labels)):
        i, sign = (row, 1) if row < B else (row - B, -1)
        c = sign * weight[i] / denominator / (max(count[row], 1) if normalized else 1)
        if sign == 1 and valid[i] and sft:
            # with one loss a pair, each pair carries its share of the NLL, so that the losses' mean is the mean loss
            c += sft / chosen_tokens * (1 if mean else sum(valid))
        rows = [[0.0] * len(x) for x in logits]
        for t, token in predictions(sequence, shift):
            rows[t] = [c * (math.exp(lp) - (j == token)) for j, lp in enumerate(log_softmax(logits[t]))]
        gradient.append(rows)

    if mean:
        total = sum(loss) / denominator + sft * nll
    else:
        total = loss
        if sft:
            shares = [-log_probability(policy_logits[i], labels[i], shift, False) / chosen_tokens for i in pairs]
            total = [loss[i] + sft * shares[i] * sum(valid) * valid[i] for i in pairs]
    return {
        "loss": total,
        "chosen_logps": s[:B],
        "rejected_logps": s[B:],
        "margin": margin,
        "anchor_margin": anchor_margin,
        "gap": gap,
        "weight": weight,
        "sft_loss": nll if sft else 0.0,
        "valid": valid,
        "gradient": gradient,
    }


def with_empty_completion(batch, row):
    """The batch with every label of one sequence ignored."""
    labels = batch.labels.clone()
    if batch.cu_seqlens is None:
        labels[row] = IGNORE
    else:
        labels[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]] = IGNORE
    return batch._replace(labels=labels)


# Both layouts, with and without an empty completion (of a chosen and of a rejected row), both alignments of the labels;
# within each, every loss, normalisation, sft term, anchor and reduction.
@pytest.mark.parametrize("empty", [None, 1, 4])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_plain_python(packed, shift, empty):
    batch = make_batch(sequences=6, length=4, vocabulary=7, packed=packed, seed=2)
    if empty is not None:
        batch = with_empty_completion(batch, empty)
    for (hinge, eps), normalized, sft, anchor, mean in itertools.product(
        [(False, 0.0), (False, 0.1), (True, 0.0)], [True, False], [0.0, 0.3], [True, False], [True, False]
    ):
        options = dict(hinge=hinge, eps=eps, normalized=normalized, sft=sft, anchor=anchor, mean=mean)
        expected = gapo(batch, beta=0.3, gamma=1.0, shift=shift, **options)
        logits = batch.logits.clone().requires_grad_()
        out = reference.fused_gapo_loss(
            logits,
            batch.labels,
            anchor_logits=batch.anchor_logits if anchor else None,
            beta=0.3,
            gamma=1.0,
            label_smoothing=eps,
            loss_type="hinge" if hinge else "sigmoid",
            length_normalized=normalized,
            sft_weight=sft,
            shift=shift,
            cu_seqlens=batch.cu_seqlens,
            reduction="mean" if mean else "none",
        )
        (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
        for name, field in out._asdict().items():
            want = torch.tensor(expected[name], dtype=field.dtype)
            torch.testing.assert_close(field.detach(), want, rtol=1e-12, atol=1e-12, msg=f"{name} {options}")
        want = torch.cat([torch.tensor(rows, dtype=torch.float64) for rows in expected["gradient"]])
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(gradient.view_as(want), want, rtol=1e-12, atol=1e-12, msg=f"gradient {options}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_sequence_logps_equals_plain_python(packed, normalized, shift):
    # Three sequences, one of them empty: S need not be even.
    batch = with_empty_completion(make_batch(sequences=3, length=5, vocabulary=7, packed=packed), 1)
    labels = sequences_of(batch.labels, batch.cu_seqlens)
    expected = [
        log_probability(x, y, shift, normalized) for x, y in zip(sequences_of(batch.logits, batch.cu_seqlens), labels)
    ]
    logps, counts = reference.sequence_logps(
        batch.logits,
        batch.labels,
        length_normalized=normalized,
        shift=shift,
        cu_seqlens=batch.cu_seqlens,
        return_counts=True,
    )
    torch.testing.assert_close(logps, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert counts.tolist() == [len(predictions(y, shift)) for y in labels]
    assert counts.dtype == torch.int64
    assert logps[1] == 0 and logps[0] < -0.1


def test_gradient_equals_finite_differences():
    """The closed form above and autograd could share a mistake about what is differentiated; differences cannot."""
    batch = make_batch(sequences=4, length=3, vocabulary=5, seed=1)

    def loss(logits):
        out = reference.fused_gapo_loss(
            logits, batch.labels, anchor_logits=batch.anchor_logits, label_smoothing=0.1, sft_weight=0.2
        )
        return out.loss

    logits = batch.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-6
    differences = torch.zeros_like(gradient)
    for place in itertools.product(*map(range, gradient.shape)):
        nudge = torch.zeros_like(gradient)
        nudge[place] = step
        differences[place] = (loss(batch.logits + nudge) - loss(batch.logits - nudge)) / (2 * step)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, differences, rtol=0, atol=1e-8)


def token_logps(logits, labels):
    """Summed log-probs and counts through F.cross_entropy, torch's own path."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORE)
    return -losses.sum(1), (labels[:, 1:] != IGNORE).sum(1)


def test_without_anchor_it_is_simpo():
    batch = make_batch()
    sums, counts = token_logps(batch.logits, batch.labels)
    chosen, rejected = (sums / counts).chunk(2)
    simpo = -F.logsigmoid(2.5 * (chosen - rejected) - 1.3).mean()
    out = reference.fused_gapo_loss(batch.logits, batch.labels, beta=2.5, gamma=1.3)
    torch.testing.assert_close(out.loss, simpo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalized", [True, False])
def test_with_a_frozen_anchor_it_is_dpo(normalized):
    """With the reference model as anchor and gamma = 0: DPO, length-normalised or not, by way of its log ratios."""
    batch = make_batch()
    sums, counts = token_logps(batch.logits, batch.labels)
    frozen, _ = token_logps(batch.anchor_logits, batch.labels)
    ratios = (sums - frozen) / (counts if normalized else 1)
    chosen, rejected = ratios.chunk(2)
    dpo = -F.logsigmoid(0.7 * (chosen - rejected)).mean()
    out = reference.fused_gapo_loss(
        batch.logits,
        batch.labels,
        anchor_logits=batch.anchor_logits,
        beta=0.7,
        gamma=0.0,
        length_normalized=normalized,
    )
    torch.testing.assert_close(out.loss, dpo, rtol=1e-12, atol=0)


def test_given_margin_equals_anchor_logits():
    batch = make_batch()
    from_logits = reference.fused_gapo_loss(batch.logits, batch.labels, anchor_logits=batch.anchor_logits)
    assert from_logits.anchor_margin.abs().min() > 1e-3
    given = reference.fused_gapo_loss(batch.logits, batch.labels, anchor_margin=from_logits.anchor_margin)
    for name, field in from_logits._asdict().items():
        assert torch.equal(getattr(given, name), field), name


def test_sft_loss_is_cross_entropy_of_the_chosen_rows():
    batch = make_batch()
    half = batch.labels.shape[0] // 2
    nll = F.cross_entropy(
        batch.logits[:half, :-1].flatten(0, 1), batch.labels[:half, 1:].flatten(), ignore_index=IGNORE
    )
    plain = reference.fused_gapo_loss(batch.logits, batch.labels)
    out = reference.fused_gapo_loss(batch.logits, batch.labels, sft_weight=0.4)
    torch.testing.assert_close(out.sft_loss, nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss, plain.loss + 0.4 * nll, rtol=1e-12, atol=0)


def test_packed_equals_padded():
    """The same completions without their padding: what the last row of each would predict is its neighbour's token."""
    batch = make_batch(sequences=4, length=5)
    lengths = [5, 3, 2, 4]
    padded_labels = batch.labels.clone()
    for row, length in enumerate(lengths):
        padded_labels[row, length:] = IGNORE
    padded = reference.fused_gapo_loss(batch.logits, padded_labels, anchor_logits=batch.anchor_logits)

    def pack(rows):
        return torch.cat([row[:length] for row, length in zip(rows, lengths)])

    packed = reference.fused_gapo_loss(
        pack(batch.logits),
        pack(padded_labels),
        anchor_logits=pack(batch.anchor_logits),
        cu_seqlens=torch.tensor([0, 5, 8, 10, 14], dtype=torch.int32),
    )
    for name, field in padded._asdict().items():
        torch.testing.assert_close(getattr(packed, name), field, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_and_returns_the_gradient_in_the_input_dtype(dtype):
    batch = make_batch(dtype=dtype)
    logits = batch.logits.requires_grad_()
    out = reference.fused_gapo_loss(logits, batch.labels)
    out.loss.backward()
    assert {field.dtype for field in out[:-1]} == {torch.float32}
    assert out.valid.dtype == torch.bool
    assert logits.grad.dtype == dtype
