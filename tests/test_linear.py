"""`fused_linear_gapo_loss` and `linear_sequence_logps` against the reference, for every budget and part of a head."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.distributed import GroupMember

from gapo_kernels import (
    GeometricAnchor,
    cpu,
    fused_linear_gapo_loss,
    gapo_step,
    linear_engine,
    linear_sequence_logps,
    reference,
)
from gapo_kernels import head as lm_head

VOCABULARY, WIDTH, LENGTH, PAIRS = 37, 5, 6, 3
ROW = VOCABULARY * 8  # bytes of a row of float64 logits
BUDGETS = {
    "a third of a row": ROW // 3,
    "one row": ROW,
    "a few rows": 3 * ROW,
    "one pair": 2 * LENGTH * ROW,
    "all": 2**30,
}
HEADS = {
    "plain": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=1.5),
    "scale": dict(logit_scale=0.7),
    "everything": dict(bias=True, softcap=2.0, logit_scale=-1.3),
}
GRID_PAIRS, SFT_WEIGHTS = PAIRS, dict.fromkeys(BUDGETS.values(), (0.0, 0.3))
ONE_LOGIT = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
GRID = [(head, budget) for head in HEADS for budget in BUDGETS]
if os.environ.get("TRITON_INTERPRET") == "1":  # slow: what "everything" has is not run once more by itself
    GRID = [(h, b) for h, b in GRID if h in ("plain", "softcap", "everything") and (h == "everything" or "third" not in b)]
    GRID_PAIRS, SFT_WEIGHTS = 2, {budget: (0.3 if name == "a few rows" else 0.0,) for name, budget in BUDGETS.items()}
    ONE_LOGIT = ONE_LOGIT[:1]
GRID = [pytest.param(HEADS[head], BUDGETS[budget], id=f"{head}-{budget}") for head, budget in GRID]
FIELDS = reference.GAPOOutput._fields


def problem(pairs=PAIRS, dtype=torch.float64, bias=False, empty=(), packed=False, seed=0, device="cpu"):
    """hidden, weight, bias, labels, the anchor's hidden states, cu_seqlens"""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    hidden, weight, b = normal(2 * pairs, LENGTH, WIDTH), normal(VOCABULARY, WIDTH), normal(VOCABULARY)
    labels = torch.randint(VOCABULARY, (2 * pairs, LENGTH), generator=generator)
    for row in range(2 * pairs):
        labels[row, : row % 3] = -100
    labels[1 % (2 * pairs), 4] = -100
    labels[list(empty)] = -100
    labels = labels.to(device)
    anchor = (hidden + 0.1 * normal(*hidden.shape)).detach()
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.arange(2 * pairs + 1, dtype=torch.int32, device=device) * LENGTH
        hidden = hidden.detach().flatten(0, 1).requires_grad_()
        labels, anchor = labels.flatten(), anchor.flatten(0, 1)
    return hidden, weight, b if bias else None, labels, anchor, cu_seqlens


def run(function, hidden, weight, bias, labels, frozen=(), upstream=1.0, **options):
    """Output, and d hidden, d weight, d bias times `upstream`."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    for name, leaf in zip(("hidden", "weight", "bias"), leaves):
        if leaf is not None and name in frozen:
            leaf.requires_grad_(False)
    out = function(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    value = out.loss.sum() if isinstance(out, tuple) else (out * torch.linspace(-1, 2, len(out)).to(out)).sum()
    if value.requires_grad:
        (value * upstream).backward()
    return out, [None if leaf is None else leaf.grad for leaf in leaves]


def assert_equal(found, expected, tolerance=1e-10):
    for name, one, other in zip(FIELDS, found[0], expected[0]):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")
    for name, one, other in zip(("d hidden", "d weight", "d bias"), found[1], expected[1]):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")


# ---- Equal to the reference ----


@pytest.mark.kernels
@pytest.mark.parametrize("head, budget", GRID)
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")], ids=str)
def test_loss_fields_and_gradients(head, budget, frozen, backend, device):
    head = dict(head)
    hidden, weight, bias, labels, anchor, _ = problem(GRID_PAIRS, bias=head.pop("bias", False), device=device)
    for sft_weight in SFT_WEIGHTS[budget]:  # without it a first pair's factor can wait
        options = dict(head, anchor_hidden=anchor, frozen=frozen, sft_weight=sft_weight, label_smoothing=0.1)
        expected = run(reference.fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
        options |= dict(max_logits_bytes=budget, backend=backend)
        assert_equal(run(fused_linear_gapo_loss, hidden, weight, bias, labels, **options), expected)


@pytest.mark.parametrize("dtype, tolerance", ONE_LOGIT)
@pytest.mark.parametrize("name", ["fused_linear_gapo_loss", "linear_sequence_logps"])
def test_one_logit_at_a_time(name, dtype, tolerance, backend, device):
    hidden, weight, bias, labels, _, _ = problem(pairs=1, dtype=dtype, bias=True, device=device)
    expected = run(getattr(reference, name), hidden, weight, bias, labels, **HEADS["softcap"])
    options = dict(HEADS["softcap"], max_logits_bytes=max(4, dtype.itemsize), backend=backend)
    found = run(globals()[name], hidden, weight, bias, labels, **options)
    assert_equal(*((r if isinstance(r[0], tuple) else ((r[0],), r[1])) for r in (found, expected)), tolerance)


@pytest.mark.parametrize("function", [fused_linear_gapo_loss, linear_sequence_logps])
@pytest.mark.parametrize("budget", [8, *BUDGETS.values()], ids=["one logit", *BUDGETS])
def test_no_more_logits_than_the_budget_are_in_memory(function, budget, monkeypatch):
    hidden, weight, _, labels, _, _ = problem()
    written, project = {}, linear_engine.Head.project

    def measured(head, hidden, out):
        storage = out.untyped_storage()
        written[storage.data_ptr()] = storage.nbytes()
        return project(head, hidden, out)

    monkeypatch.setattr(linear_engine.Head, "project", measured)
    run(function, hidden, weight, None, labels, max_logits_bytes=budget)
    assert 0 < max(written.values()) <= budget


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_kept_for_a_backward_leave_room_for_those_of_the_anchor(softcap, monkeypatch):
    """The two calls of gapo_step, the first with its graph alive, within one budget."""
    hidden, weight = torch.randn(4, 200, 8), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (4, 200))
    kept, written = [], []
    logps, project = linear_engine.logps, linear_engine.Head.project

    def watched(*args):
        results = logps(*args)
        kept.append(0 if results.logits is None else results.logits.nbytes)
        return results

    def measured(head, hidden, out):
        written.append(out.untyped_storage().nbytes())
        return project(head, hidden, out)

    monkeypatch.setattr(linear_engine, "logps", watched)
    monkeypatch.setattr(linear_engine.Head, "project", measured)
    rows, row = 4 * 199, 11 * 4
    for more in (-1, 0, 100, 255, 256, 300, rows):
        options = dict(max_logits_bytes=(rows + more) * row, softcap=softcap)
        found = linear_sequence_logps(hidden, weight, labels, **options)
        written.clear()
        with torch.no_grad():
            linear_sequence_logps(hidden, weight, labels, **options)
        assert kept[-2] + max(written) <= options["max_logits_bytes"]
        assert kept[-2] == (rows * row if more >= 256 else 0)
        found.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("empty", [(), (1,), (0, 4), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("budget", [3 * ROW, 2**30])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(loss_type="hinge", gamma=0.2),
        dict(length_normalized=False, beta=0.1),
        dict(shift=False, sft_weight=0.5),
    ],
    ids=str,
)
def test_every_keyword(budget, reduction, packed, empty, options):
    hidden, weight, _, labels, anchor, cu_seqlens = problem(empty=empty, packed=packed)
    options = dict(options, anchor_hidden=anchor, reduction=reduction, cu_seqlens=cu_seqlens)
    expected = run(reference.fused_linear_gapo_loss, hidden, weight, None, labels, **options)
    assert_equal(
        run(fused_linear_gapo_loss, hidden, weight, None, labels, max_logits_bytes=budget, **options), expected
    )


@pytest.mark.parametrize("anchors", ["none", "margin", "weight"])
def test_other_anchors(anchors):
    hidden, weight, _, labels, anchor, _ = problem()
    options = {
        "none": {},
        "margin": dict(anchor_margin=torch.tensor([0.3, -1.0, 2.0])),
        "weight": dict(anchor_hidden=anchor, anchor_weight=weight.detach() * 1.1),
    }[anchors]
    expected = run(reference.fused_linear_gapo_loss, hidden, weight, None, labels, **options)
    for budget in BUDGETS.values():
        assert_equal(
            run(fused_linear_gapo_loss, hidden, weight, None, labels, max_logits_bytes=budget, **options), expected
        )


@pytest.mark.parametrize("bias", [False, True])
def test_length_normalised_dpo_is_ligers(bias):
    """At gamma = 0, with the anchor as the frozen reference."""
    peer = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, weight, bias, labels, anchor, _ = problem(dtype=torch.float32, bias=bias)
    dpo = peer.LigerFusedLinearDPOLoss(beta=0.7, average_log_prob=True, compiled=False)

    def liger(hidden, weight, labels, bias, anchor_hidden):
        constant = dict(ref_weight=weight.detach(), ref_bias=None if bias is None else bias.detach())
        loss, _ = dpo(weight, hidden[:, :-1], labels[:, 1:], bias, anchor_hidden[:, :-1], **constant)
        return reference.GAPOOutput(loss, *[None] * (len(FIELDS) - 1))

    expected = run(liger, hidden, weight, bias, labels, anchor_hidden=anchor)
    for budget in BUDGETS.values():
        options = dict(anchor_hidden=anchor, max_logits_bytes=budget, beta=0.7, gamma=0.0)
        found = run(fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
        assert_equal((found[0][:1], found[1]), (expected[0][:1], expected[1]), tolerance=1e-6)
        assert found[0].gap.abs().max() > 1e-2


@pytest.mark.kernels
@pytest.mark.parametrize("head, budget", [case for case in GRID if "one pair" not in case.id])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)], ids=str)
def test_logps_with_arbitrary_upstream_gradients(head, budget, frozen, backend, device):
    head = dict(head)
    hidden, weight, bias, labels, _, _ = problem(bias=head.pop("bias", False), empty=(2,), device=device)
    hidden, labels = hidden[:5], labels[:5]  # any number of sequences
    expected, wanted = run(reference.linear_sequence_logps, hidden, weight, bias, labels, frozen=frozen, **head)
    found, got = run(
        linear_sequence_logps,
        hidden,
        weight,
        bias,
        labels,
        frozen=frozen,
        max_logits_bytes=budget,
        backend=backend,
        **head,
    )
    assert_equal(((found,), got), ((expected,), wanted))
    assert found[2] == 0


def test_counts():
    hidden, weight, _, labels, _, _ = problem(empty=(2,))
    found, counts = linear_sequence_logps(hidden, weight, labels, return_counts=True)
    expected, wanted = reference.linear_sequence_logps(hidden, weight, labels, return_counts=True)
    assert torch.equal(counts, wanted) and counts[2] == 0
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    generator, vocabulary = torch.Generator().manual_seed(0), 7
    shapes = ((2, 4, 3), (vocabulary, 3), (vocabulary,))
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    labels = torch.randint(vocabulary, (2, 4), generator=generator)
    labels[0, 1], margin, row = -100, torch.tensor([0.3], dtype=torch.float64), vocabulary * 8
    for budget, sft_weight in ((row // 3, 0.2), (row, 0.2), (row, 0.0), (2**30, 0.2)):

        def loss(hidden, weight, bias):
            options = dict(bias=bias, softcap=softcap, logit_scale=0.5, anchor_margin=margin, sft_weight=sft_weight)
            return fused_linear_gapo_loss(hidden, weight, labels, max_logits_bytes=budget, **options).loss

        def logps(hidden, weight, bias):
            return linear_sequence_logps(hidden, weight, labels, bias=bias, softcap=softcap, max_logits_bytes=budget)

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
        assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=str)
def test_a_wide_heads_rows_go_through_the_gemms_a_few_at_a_time(frozen, monkeypatch):
    monkeypatch.setattr(linear_engine, "PART_BYTES", 2 * 4 * WIDTH)
    hidden, weight, _, labels, anchor, _ = problem()
    for name, options in (("fused_linear_gapo_loss", dict(anchor_hidden=anchor)), ("linear_sequence_logps", {})):
        expected = run(getattr(reference, name), hidden, weight, None, labels, frozen=frozen, **options)
        for budget in (5 * ROW, 2**30):
            options.update(frozen=frozen, max_logits_bytes=budget)
            found = run(globals()[name], hidden, weight, None, labels, **options)
            assert_equal(*((r if isinstance(r[0], tuple) else ((r[0],), r[1])) for r in (found, expected)))


# ---- What is computed, and how often ----


@pytest.fixture
def gemms(monkeypatch):
    """Appends the rows of every GEMM of logits."""
    rows, project = [], linear_engine.Head.project

    def counted(head, hidden, out):
        rows.append(hidden.shape[0])
        return project(head, hidden, out)

    monkeypatch.setattr(linear_engine.Head, "project", counted)
    return rows


def test_nothing_is_computed_twice_while_a_pair_fits(gemms):
    hidden, weight, _, labels, anchor, _ = problem()
    kept = (labels[:, 1:] != -100).sum().item()
    run(fused_linear_gapo_loss, hidden, weight, None, labels, anchor_hidden=anchor)
    assert gemms == [kept, kept]  # anchor, policy: rows that predict nothing take no part
    gemms.clear()
    run(
        fused_linear_gapo_loss, hidden, weight, None, labels, anchor_hidden=anchor, max_logits_bytes=BUDGETS["one pair"]
    )
    assert sum(gemms) == 2 * kept and len(gemms) == 2 * PAIRS


def test_of_a_pair_beyond_the_budget_what_goes_beyond_is_computed_twice(gemms):
    """But for the first pair, and with a frozen head."""
    hidden, weight, _, labels, anchor, _ = problem()
    rows = (labels[:, 1:] != -100).view(2, PAIRS, -1).sum((0, 2)).tolist()  # of each pair
    limit = min(rows) - 1
    options = dict(max_logits_bytes=limit * ROW)
    again = [count - limit for count in rows]
    assert max(again) < limit  # no even split of a pair would leave as much in the buffer
    run(fused_linear_gapo_loss, hidden, weight, None, labels, **options)
    assert sum(gemms) == sum(rows) + sum(again[1:]) and max(gemms) <= limit
    gemms.clear()
    run(fused_linear_gapo_loss, hidden, weight, None, labels, **options, sft_weight=0.1)
    assert sum(gemms) == sum(rows) + sum(again)
    gemms.clear()
    run(fused_linear_gapo_loss, hidden, weight, None, labels, **options, frozen=("weight",))
    assert sum(gemms) == sum(rows)
    gemms.clear()
    everything = dict(options, anchor_hidden=anchor, frozen=("hidden", "weight"))
    run(fused_linear_gapo_loss, hidden, weight, None, labels, **everything)
    assert sum(gemms) == 2 * sum(rows)
    assert len(gemms) == -(-sum(rows) // limit) + 2 * PAIRS  # the anchor's tiles span pairs


@pytest.mark.parametrize("function", [fused_linear_gapo_loss, linear_sequence_logps])
@pytest.mark.parametrize("budget", [8, 5 * 8, ROW - 8, ROW, 3 * ROW])
def test_a_frozen_head_computes_every_logit_once(function, budget, monkeypatch):
    hidden, weight, bias, labels, _, _ = problem(bias=True)
    computed, project = [], linear_engine.Head.project

    def counted(head, hidden, out):
        computed.append(out.numel())
        return project(head, hidden, out)

    monkeypatch.setattr(linear_engine.Head, "project", counted)
    options = dict(max_logits_bytes=budget, frozen=("weight", "bias"), softcap=2.0)
    run(function, hidden, weight, bias, labels, **options)
    assert sum(computed) == (labels[:, 1:] != -100).sum() * VOCABULARY


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=str)
@pytest.mark.parametrize("budget", [8, 5 * 8, ROW, 2**30])
def test_tokens_that_are_ruled_out(budget, frozen):
    """By a bias of -inf, whole slices of the vocabulary among them, from the first and the last one on."""
    hidden, weight, bias, labels, anchor, _ = problem(bias=True)
    with torch.no_grad():
        bias[:11] = bias[17:24] = bias[30:] = -torch.inf
    labels = labels.where(labels < 0, 11 + labels % 6)
    labels[4, 3] = 2  # one has no probability at all
    options = dict(anchor_hidden=anchor, frozen=frozen)
    expected = run(reference.fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
    found = run(fused_linear_gapo_loss, hidden, weight, bias, labels, max_logits_bytes=budget, **options)
    assert expected[0].loss.isnan() or expected[0].loss.isinf() or expected[0].loss > 1
    for name, one, other in zip(FIELDS, found[0], expected[0]):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    for one, other in zip(found[1], expected[1]):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "function, confidence, frozen",
    [
        ("fused_linear_gapo_loss", 15, ()),
        ("fused_linear_gapo_loss", 20, ()),
        ("fused_linear_gapo_loss", 15, ("weight",)),
        ("fused_linear_gapo_loss", 20, ("weight",)),
        ("linear_sequence_logps", 15, ("weight",)),
        ("linear_sequence_logps", 20, ()),
    ],
    ids=str,
)
def test_a_confident_token_keeps_its_digits_below_a_row_of_budget(function, confidence, frozen):
    """In float32, against eager's own error: the label's p - 1 is not a difference of large vectors."""
    width, vocabulary = 32, 128
    errors = {}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(vocabulary, width, generator=generator)
        labels = torch.randint(vocabulary, (2, 5), generator=generator)
        towards = weight[labels.roll(-1, 1)]
        hidden = confidence * towards / towards.square().sum(-1, keepdim=True)
        hidden += 0.1 * torch.randn(hidden.shape, generator=generator)
        truth = run(getattr(reference, function), hidden.double(), weight.double(), None, labels)[1][0]

        def error(call, **options):
            return ((run(call, hidden, weight, None, labels, **options)[1][0] - truth).norm() / truth.norm()).item()

        errors.setdefault("eager", []).append(error(getattr(reference, function)))
        for name, budget in {"row / 8": vocabulary // 2, "row / 32": vocabulary // 8}.items():
            errors.setdefault(name, []).append(error(globals()[function], frozen=frozen, max_logits_bytes=budget))
    eager = sum(errors.pop("eager"))
    assert eager > 1e-6 and all(sum(found) <= 1.5 * eager for found in errors.values()), (eager, errors)


@pytest.mark.parametrize("function", ["fused_linear_gapo_loss", "linear_sequence_logps"])
@pytest.mark.parametrize("tile", [16, 64, 2048])
def test_thousands_of_rows_add_up_as_eager_adds_them(function, tile):
    """In float32, a few rows at a time or all of them: every gradient at most 1.5 times as far from float64's."""
    width, vocabulary, ours, eager = 16, 100, torch.zeros(3), torch.zeros(3)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        operands = [torch.randn(*shape, generator=generator) for shape in ((4, 512, width), (vocabulary, width), (vocabulary,))]
        labels = torch.randint(vocabulary, (4, 512), generator=generator)
        operands[0] *= 0.3
        truth = run(getattr(reference, function), *(t.double() for t in operands), labels)[1]
        for total, call, options in [
            (ours, globals()[function], dict(max_logits_bytes=4 * tile * vocabulary)),
            (eager, getattr(reference, function), {}),
        ]:
            found = run(call, *operands, labels, **options)[1]
            total += torch.tensor([((f - t).norm() / t.norm()).item() for f, t in zip(found, truth)])
    assert (ours <= 1.5 * eager).all(), (ours, eager)


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf])
@pytest.mark.parametrize("budget", [ROW, 2**30])
def test_what_has_no_gradient_has_none_whatever_comes_from_above(budget, upstream):
    hidden, weight, _, labels, _, _ = problem(empty=(1,))
    upstream = torch.tensor(upstream, dtype=torch.float64)
    out = fused_linear_gapo_loss(hidden, weight, labels, max_logits_bytes=budget)
    for last in (False, True):
        (gradient,) = torch.autograd.grad(out.loss, hidden, upstream, retain_graph=not last)
        assert not gradient[[1, 4]].any() and not gradient[:, -1].any()  # the pair of an empty completion; the last rows
        assert not gradient[2, 0].isfinite().any() or not gradient[0, 0].isfinite().any()


def test_the_logits_that_d_weight_needs_are_kept_if_they_fit(gemms):
    hidden, weight, _, labels, _, _ = problem()
    kept = (labels[:, 1:] != -100).sum().item()
    run(linear_sequence_logps, hidden, weight, None, labels)
    assert sum(gemms) == kept
    # There must be room beside: for the anchor's, and for a copy where softcap's derivative consumes them.
    for budget, softcap, times in [(2 * kept, None, 1), (2 * kept - 1, None, 2), (2 * kept - 1, 2.0, 2), (2 * kept, 2.0, 1)]:
        gemms.clear()
        run(linear_sequence_logps, hidden, weight, None, labels, max_logits_bytes=budget * ROW, softcap=softcap)
        assert sum(gemms) == times * kept, (budget, softcap)
    gemms.clear()
    run(linear_sequence_logps, hidden, weight, None, labels, max_logits_bytes=ROW, frozen=("weight",))
    assert sum(gemms) == kept


@pytest.mark.parametrize("budget", ["one pair", "all"])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)], ids=str)
def test_one_exponential_a_logit(budget, frozen, monkeypatch):
    """Forward and backward; and of the anchor."""
    hidden, weight, _, labels, anchor, _ = problem()
    kept, taken = (labels[:, 1:] != -100).sum().item() * VOCABULARY, []
    for module, name in [(cpu, "_powers"), (torch, "softmax")]:

        def counted(x, *others, before=getattr(module, name), **options):
            taken.append(x.numel() if x.dim() == 2 else 0)  # not those of the labels alone
            return before(x, *others, **options)

        monkeypatch.setattr(module, name, counted)
    options = dict(max_logits_bytes=BUDGETS[budget], frozen=frozen)
    for function, own, times in [
        (fused_linear_gapo_loss, {}, 1),
        (fused_linear_gapo_loss, dict(anchor_hidden=anchor), 2),
        (fused_linear_gapo_loss, dict(softcap=2.0), 2),
        (linear_sequence_logps, {}, 1 if budget == "all" or frozen == ("weight",) else 2),
    ]:
        taken.clear()
        run(function, hidden, weight, None, labels, **options, **own)
        assert sum(taken) == times * kept, (function, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_of_any_row(dtype):
    """Where the label's probability is lost to underflow, nearly 1 or 0, and where the row is broken."""
    logits = 5 * torch.randn(8, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 3, 3, 3, 3, 3, 40, 3])
    logits[0, 3], logits[1, 3], logits[2, 3], logits[3, 7] = -2000.0, 60.0, -torch.inf, -torch.inf
    logits[4], logits[5, 9] = -torch.inf, torch.nan
    exact = logits.to(dtype).double()
    terms = exact.to(dtype, copy=True)
    shift, total, logps = cpu.terms_(terms, labels)
    expected = exact.log_softmax(1)[torch.arange(8), labels.clamp(max=36)]
    rest = (exact[1] - exact[1, 3]).exp().index_fill_(0, torch.tensor(3), 0).sum()
    expected[1] = -torch.log1p(rest)  # 1e-20, of which log_softmax keeps nothing
    expected[[4, 5, 6]] = torch.nan
    precise = 1e-12 if dtype == torch.float64 else 5e-6  # of an exponent of 50
    torch.testing.assert_close(logps.double(), expected, rtol=precise, atol=1e-30, equal_nan=True)
    assert (total.isnan() == expected.isnan()).all() and not terms[[4, 5]].any()
    good = [0, 1, 2, 3, 7]
    softmax = exact[good].softmax(1)
    others = torch.ones(len(good), 37, dtype=torch.bool).index_fill_(1, torch.tensor([3]), False)
    torch.testing.assert_close(terms[good].double()[others], softmax[others], rtol=10 * precise, atol=1e-37)
    torch.testing.assert_close(terms[good, 3].double(), -(softmax * others).sum(1), rtol=10 * precise, atol=1e-37)
    rebuilt = (exact[good] - shift[good, None].double()).exp() / total[good, None].double()
    torch.testing.assert_close(rebuilt, softmax, rtol=10 * precise, atol=1e-37)


def test_without_gradients_there_are_statistics_only(gemms, monkeypatch):
    hidden, weight, _, labels, _, _ = problem()
    monkeypatch.setattr(linear_engine.Head, "differentiate_", None)
    monkeypatch.setattr(linear_engine.Gradients, "add", None)
    with torch.no_grad():
        fused_linear_gapo_loss(hidden, weight, labels)
        linear_sequence_logps(hidden, weight, labels)
    assert len(gemms) == 2


def test_a_probe_makes_no_gradient_of_a_head_that_it_does_not_ask_for(monkeypatch):
    hidden, weight, _, labels, _, _ = problem()
    logps, added = linear_sequence_logps(hidden, weight, labels), []
    add = linear_engine.WeightGradient.add
    monkeypatch.setattr(linear_engine.WeightGradient, "add", lambda *args: (added.append(1), add(*args)))
    (first,) = torch.autograd.grad(logps.sum(), [hidden], retain_graph=True)
    assert not added
    second = torch.autograd.grad(2 * logps.sum(), [hidden, weight], retain_graph=True)
    assert added
    torch.testing.assert_close(second[0], 2 * first)
    (third,) = torch.autograd.grad(logps.sum(), [weight])
    torch.testing.assert_close(second[1], 2 * third)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_several_backwards_on_one_graph(budget):
    hidden, weight, bias, labels, anchor, _ = problem(bias=True)
    options = dict(bias=bias, max_logits_bytes=budget, softcap=2.0)
    out = fused_linear_gapo_loss(hidden, weight, labels, anchor_hidden=anchor, **options)
    logps = linear_sequence_logps(hidden, weight, labels, **options)
    for value in (out.loss, logps.square().sum()):
        runs = [torch.autograd.grad(value * f, [hidden, weight, bias], retain_graph=True) for f in (1.0, 3.0, 1.0)]
        for one, tripled, again in zip(*runs):
            torch.testing.assert_close(3 * one, tripled, atol=1e-12, rtol=0)
            torch.testing.assert_close(one, again, atol=1e-12, rtol=0)


def test_the_same_bits_on_every_run():
    hidden, weight, bias, labels, anchor, _ = problem(bias=True, dtype=torch.float32)
    options = dict(anchor_hidden=anchor, sft_weight=0.1)
    for budget in (3 * ROW, 2**30):
        options["max_logits_bytes"] = budget
        runs = [run(fused_linear_gapo_loss, hidden, weight, bias, labels, **options) for _ in range(2)]
        for one, other in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1])):
            assert one is not other and torch.equal(one, other)


# ---- Precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [8 * VOCABULARY * 4, 2**30])
@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=str)
# A third, as a mean over three micro-batches has it: it is folded in before the one rounding, too.
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_is_as_close_as_a_float32_accumulated_eager_path(dtype, budget, frozen, upstream, compiled):
    pairs = 24
    hidden, weight, bias, labels, anchor, _ = problem(pairs=pairs, dtype=dtype, bias=True)
    options = dict(frozen=(*frozen, *("bias" for _ in frozen)), upstream=upstream)
    exact = (hidden.double(), weight.double(), bias.double(), labels)
    truth = run(reference.fused_linear_gapo_loss, *exact, anchor_hidden=anchor.double(), **options)
    options.update(anchor_hidden=anchor)
    torch._dynamo.reset()
    function = torch.compile(fused_linear_gapo_loss, backend="aot_eager") if compiled else fused_linear_gapo_loss
    found = run(function, hidden, weight, bias, labels, max_logits_bytes=budget, **options)
    # the reference computes 16-bit operands in float32 and rounds their gradients once
    eager = run(reference.fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
    for ours, theirs, true in zip(found[1], eager[1], truth[1]):
        if true is None:
            continue
        assert ours.dtype == dtype
        error, allowed = ((g.double() - true).norm() / true.norm() for g in (ours, theirs))
        assert error <= 1.2 * allowed, (error, allowed)
    torch.testing.assert_close(found[0].gap, eager[0].gap, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [VOCABULARY * 2 // 3, 8 * VOCABULARY * 2, 2**30])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_d_weight_of_16_bit_logits_is_as_close_as_an_eager_path(budget, upstream, monkeypatch):
    """The buffer as it is on a GPU, with the CPU's GEMMs."""
    monkeypatch.setattr(lm_head.Head, "_casts", False)
    exact = [t if t is None else t.double() for t in problem(pairs=24, dtype=torch.bfloat16, bias=True)[:3]]
    hidden, weight, bias, labels, anchor, _ = problem(pairs=24, dtype=torch.bfloat16, bias=True)

    def eager(hidden, weight, labels, bias, anchor_hidden):
        logits, anchor_logits = (nn.functional.linear(h, weight, bias).float() for h in (hidden, anchor_hidden))
        return reference.fused_gapo_loss(logits, labels, anchor_logits=anchor_logits.detach())

    truth = run(reference.fused_linear_gapo_loss, *exact, labels, anchor_hidden=anchor.double(), upstream=upstream)
    head, options = (hidden, weight, bias, labels), dict(anchor_hidden=anchor, upstream=upstream)
    found = run(fused_linear_gapo_loss, *head, max_logits_bytes=budget, **options)
    error, allowed = ((r[1][1].double() - truth[1][1]).norm() for r in (found, run(eager, *head, **options)))
    assert 0 < error <= 1.2 * allowed, (error, allowed)


@pytest.mark.parametrize("tile", [4, 30, 1000])
def test_d_weight_of_16_bit_logits_of_a_pair_beyond_the_budget(tile, monkeypatch):
    """The first pair's, whose tiles come before its coefficients are known: what a tile rounds, no factor takes back."""
    monkeypatch.setattr(lm_head.Head, "_casts", False)
    width, vocabulary, ours, eagers = 64, 1000, 0.0, 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 31, width), (vocabulary, width)))
        hidden, weight = hidden.bfloat16(), (weight / 8).bfloat16()
        labels = torch.randint(vocabulary, (2, 31), generator=generator)

        def eager(hidden, weight, labels, bias):
            return reference.fused_gapo_loss(nn.functional.linear(hidden, weight).float(), labels)

        truth = run(reference.fused_linear_gapo_loss, hidden.double(), weight.double(), None, labels)[1][1]
        for again in (False, True):  # by a second backward on the graph, too
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            loss = fused_linear_gapo_loss(*leaves, labels, max_logits_bytes=tile * vocabulary * 2).loss
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            found = torch.autograd.grad(loss, leaves) if again else found
            ours += (found[1].double() - truth).norm()
            eagers += (run(eager, hidden, weight, None, labels)[1][1].double() - truth).norm()
    assert 0 < ours <= 1.2 * eagers, (ours, eagers)


@pytest.mark.parametrize("available", ["neither", "mm", "addmm"])
def test_d_weight_accumulates_in_float32_whatever_torchs_gemms_can(available, monkeypatch):
    """GEMMs of 16-bit operands into float32: torch 2.9 has mm for CUDA, 2.10 addmm to a float32 total, too, CPUs none."""
    mm, addmm = torch.mm, torch.addmm

    def mm_to_float32(one, other, *, out_dtype=None):
        if out_dtype is not None and available == "neither":
            raise NotImplementedError
        return mm(one, other) if out_dtype is None else mm(one.to(out_dtype), other.to(out_dtype))

    def addmm_to_float32(total, one, other, *, out_dtype=None, out=None):
        if out_dtype is not None and available != "addmm":
            raise RuntimeError("self and mat2 must have the same dtype")
        return addmm(total, one.to(total.dtype), other.to(total.dtype), **({} if out is None else {"out": out}))

    monkeypatch.setattr(torch, "mm", mm_to_float32)
    monkeypatch.setattr(torch, "addmm", addmm_to_float32)
    monkeypatch.setattr(lm_head, "_gives_float32", lm_head._gives_float32.__wrapped__)
    monkeypatch.setattr(lm_head.Head, "_casts", False)  # as on a GPU
    monkeypatch.setattr(lm_head, "CAST_BYTES", 20 * 4 * 4)  # two slices of the vocabulary
    generator = torch.Generator().manual_seed(0)
    tiles = [[torch.randn(4, n, generator=generator).bfloat16() for n in (VOCABULARY, WIDTH)] for _ in range(20)]
    weight = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    head = lm_head.Head(weight, None, None, 1.0, cpu)
    gradient = lm_head.WeightGradient(head, weight=True, bias=False, one_tile=False)
    for tile in tiles:
        gradient.add(*tile)
    found, _ = gradient.results()
    exact = sum(one.double().t() @ other.double() for one, other in tiles)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * exact.abs().max().item())


def test_a_float16_loss_scale_reaches_the_gradients_before_they_are_rounded():
    hidden, weight, _, labels, _, _ = problem(dtype=torch.float16)
    with torch.no_grad():
        weight.mul_(1e-3)
    scale = 2.0**14
    exact = torch.autograd.grad(
        reference.fused_linear_gapo_loss(hidden.double(), weight.double(), labels, beta=1e-4).loss * scale, [hidden]
    )[0]
    found = torch.autograd.grad(fused_linear_gapo_loss(hidden, weight, labels, beta=1e-4).loss * scale, [hidden])[0]
    assert ((found.double() - exact.double()).norm() / exact.double().norm()) < 5e-3


def test_autocast_computes_in_its_dtype_and_gives_float32_gradients():
    hidden, weight, _, labels, _, _ = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_linear_gapo_loss(hidden, weight, labels)
        logps = linear_sequence_logps(hidden, weight, labels)
    cast = [t.detach().bfloat16() for t in (hidden, weight)]
    assert torch.equal(out.loss, fused_linear_gapo_loss(*cast, labels).loss)
    assert torch.equal(logps, linear_sequence_logps(*cast, labels))
    out.loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


# ---- In a step ----


class Tied(nn.Module):
    """The head's weight is the embedding, too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def hidden(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


@pytest.mark.parametrize("budget", [3 * ROW, 2**30])
@pytest.mark.parametrize("scope", ["all", "layer"])
def test_a_step_with_a_tied_head(budget, scope):
    torch.manual_seed(0)
    model = Tied().double()
    ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH))
    moved = model.parameters() if scope == "all" else model.layer.parameters()
    anchor = GeometricAnchor(list(moved), rho=0.3)
    results = []
    for function in (reference.linear_sequence_logps, linear_sequence_logps):
        model.zero_grad()

        def logps():
            return function(model.hidden(ids), model.embedding.weight, ids, max_logits_bytes=budget)

        out = gapo_step(logps, anchor)
        out.loss.backward()
        results.append((out, [p.grad.clone() for p in model.parameters()]))
    assert results[0][0].gap.abs().max() > 1e-3
    for one, other in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    for one, other in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


# ---- Edges ----


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by", ["torch", "reference"])
def test_nan_stays_in_its_own_pair_and_rows_without_part_hurt_nobody(reduction, softcap, by):
    hidden, weight, bias, labels, _, _ = problem(empty=(PAIRS,), bias=True)  # the first pair's rejected one is empty
    with torch.no_grad():
        hidden[0] = torch.nan
        hidden[2, 0] = torch.nan  # as an attention without any key leaves it on padding
    assert labels[2, 1] == -100
    for budget in BUDGETS.values():
        options = dict(max_logits_bytes=budget, reduction=reduction, softcap=softcap, backend=by)
        out, (d_hidden, d_weight, d_bias) = run(fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
        assert out.loss.isfinite().all() and d_weight.isfinite().all() and d_bias.isfinite().all()
        assert (d_hidden[0] == 0).all() and d_hidden.isfinite().all() and d_hidden.any()
        options.update(frozen=("weight", "bias"))
        _, (d_hidden, _, _) = run(fused_linear_gapo_loss, hidden, weight, bias, labels, **options)
        assert (d_hidden[0] == 0).all() and d_hidden.isfinite().all()


def test_all_rows_ignored():
    hidden, weight, _, labels, anchor, _ = problem(bias=False)
    labels.fill_(-100)
    out, (d_hidden, d_weight, _) = run(
        fused_linear_gapo_loss, hidden, weight, None, labels, anchor_hidden=anchor, sft_weight=0.5
    )
    assert out.loss == 0 and not out.valid.any() and not d_hidden.any() and not d_weight.any()
    logps, (d_hidden, d_weight, _) = run(linear_sequence_logps, hidden, weight, None, labels)
    assert not logps.any() and not d_hidden.any() and not d_weight.any()


def test_one_token_and_one_word():
    hidden, weight = torch.randn(2, 1, WIDTH).requires_grad_(), torch.randn(1, WIDTH).requires_grad_()
    out = fused_linear_gapo_loss(hidden, weight, torch.zeros(2, 1, dtype=torch.long), shift=False, gamma=0.0)
    out.loss.backward()
    torch.testing.assert_close(out.loss, torch.tensor(2.0).log())
    assert not weight.grad.any()


def test_hidden_states_that_are_not_contiguous():
    hidden, weight, _, labels, anchor, _ = problem()
    wide = torch.zeros(2 * PAIRS, LENGTH, 2 * WIDTH, dtype=torch.float64)
    wide[..., :WIDTH] = hidden.detach()
    expected = run(reference.fused_linear_gapo_loss, hidden, weight, None, labels, anchor_hidden=anchor)
    view = wide[..., :WIDTH].requires_grad_()
    out = fused_linear_gapo_loss(view, weight, labels, anchor_hidden=anchor)
    assert_equal((out, [torch.autograd.grad(out.loss, view)[0]]), (expected[0], expected[1][:1]))


class OfMesh(torch.Tensor):
    device_mesh, placements = "a mesh", "(Shard(0),)"

    class DeviceMesh:
        get_group = None


class Quantised(torch.Tensor):
    """As torchao's: a floating-point tensor to all appearances, around integers and a scale."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    def __repr__(self):
        return "Quantised"

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(weight=nn.Linear(WIDTH, VOCABULARY)), TypeError, r"got the module Linear; pass its .weight.* adapter"),
        (dict(weight=torch.zeros(VOCABULARY, WIDTH, dtype=torch.int8)), TypeError, "dequantise a quantised head"),
        (
            dict(weight=Quantised(torch.zeros(VOCABULARY, WIDTH, dtype=torch.int8), torch.ones((), dtype=torch.double))),
            TypeError,
            "must be a floating-point tensor, got Quantised: dequantise a quantised head",
        ),
        (dict(weight=torch.zeros(VOCABULARY, WIDTH).as_subclass(OfMesh)), TypeError, r"full_tensor\(\)"),
        (dict(weight=torch.zeros(VOCABULARY, WIDTH)), TypeError, "weight must have hidden's dtype, torch.float64, got"),
        (dict(weight=torch.zeros(VOCABULARY, 4).double()), ValueError, r"\(V, H\) with H = 5, got \(37, 4\)"),
        (dict(hidden=torch.zeros(3, WIDTH).double()), ValueError, r"hidden must have shape \(S, T, H\)"),
        (dict(hidden=torch.zeros(6, LENGTH, WIDTH).long()), TypeError, "hidden must be a floating-point tensor"),
        (dict(labels=torch.zeros(6, 2).long()), ValueError, r"labels must have hidden's shape without its width"),
        (dict(labels=torch.full((6, LENGTH), VOCABULARY)), ValueError, r"labels must be in \[0, 37\)"),
        (dict(bias=torch.zeros(3).double()), ValueError, r"bias must have shape \(37,\), got \(3,\)"),
        (dict(bias=torch.zeros(VOCABULARY)), TypeError, "bias must have hidden's dtype"),
        (dict(softcap=0.0), ValueError, "softcap must be > 0 or None, got 0.0"),
        (dict(logit_scale=0.0), ValueError, "logit_scale must not be 0"),
        (dict(max_logits_bytes=7), ValueError, "max_logits_bytes must be at least one logit's, 8, got 7"),
        (dict(labels=torch.zeros(6, LENGTH).as_subclass(OfMesh)), TypeError, r"DTensor; pass labels.full_tensor\(\)"),
        (dict(vocab_parallel_group=OfMesh.DeviceMesh()), TypeError, r"group, got DeviceMesh; pass mesh.get_group"),
        (dict(vocab_parallel_group="tp"), TypeError, "must be a torch.distributed process group, got str$"),
        (dict(vocab_parallel_group=0), TypeError, "must be a torch.distributed process group, got int$"),
        (dict(vocab_parallel_group=GroupMember.NON_GROUP_MEMBER), TypeError, "this rank is none of the group's"),
        (dict(max_logits_bytes=1e9), TypeError, "max_logits_bytes must be an int, got float"),
        (dict(hidden=torch.zeros(6, LENGTH, WIDTH).double().to_sparse()), TypeError, "hidden must be a dense tensor, got tor"),
        (dict(weight=torch.eye(VOCABULARY, WIDTH).double().to_sparse_csr()), TypeError, "weight must be a dense .*sparse_csr"),
        (dict(bias=torch.ones(VOCABULARY).double().to_sparse()), TypeError, "bias must be a dense tensor"),
        (dict(labels=torch.ones(6, LENGTH).long().to_sparse()), TypeError, "labels must be a dense tensor"),
        (dict(hidden=torch.nested.nested_tensor([torch.ones(LENGTH, WIDTH).double()] * 6)), TypeError, "got a nested one"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [fused_linear_gapo_loss, linear_sequence_logps])
def test_what_is_refused(function, change, error, message):
    hidden, weight, _, labels, _, _ = problem()
    arguments = dict(hidden=hidden, weight=weight, labels=labels) | change
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(anchor_weight=True), ValueError, "anchor_weight was given without anchor_hidden"),
        (
            dict(anchor_hidden=True, anchor_margin=torch.zeros(3)),
            ValueError,
            "anchor_hidden and anchor_margin were both",
        ),
        (dict(anchor_hidden=torch.zeros(1, 2, 3).double()), ValueError, "anchor_hidden must have hidden's shape"),
        (dict(anchor_hidden=torch.zeros(6, LENGTH, WIDTH).as_subclass(OfMesh)), TypeError, "anchor_hidden.full_tensor"),
        (dict(anchor_hidden=torch.zeros(6, LENGTH, WIDTH).double().to_sparse()), TypeError, "anchor_hidden must be a dense"),
        (dict(anchor_margin=torch.zeros(2)), ValueError, r"anchor_margin must have shape \(3,\)"),
        (dict(beta=0.0), ValueError, "beta must be > 0"),
        (dict(reduction="sum"), ValueError, "reduction must be one of"),
    ],
    ids=str,
)
def test_losses_that_are_refused(change, error, message):
    hidden, weight, _, labels, anchor, _ = problem()
    change = {k: {"anchor_weight": weight, "anchor_hidden": anchor}[k] if v is True else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        fused_linear_gapo_loss(hidden, weight, labels, **change)


def test_double_backward_is_refused():
    hidden, weight, _, labels, _, _ = problem()
    for value in (
        fused_linear_gapo_loss(hidden, weight, labels).loss,
        linear_sequence_logps(hidden, weight, labels)[0],
    ):
        with pytest.raises(RuntimeError, match="differentiable once"):
            (first,) = torch.autograd.grad(value, [hidden], create_graph=True)
            first.sum().backward()


def test_a_weight_written_before_the_backward_is_noticed():
    hidden, weight, _, labels, _, _ = problem()
    logps = linear_sequence_logps(hidden, weight, labels)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


# ---- torch.compile and the operators ----


def test_compiled_in_one_graph_and_once_more_for_all_other_lengths():
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)

    def both(hidden, weight, labels):
        out = fused_linear_gapo_loss(hidden, weight, labels, anchor_hidden=hidden * 0.9)
        return out.loss + linear_sequence_logps(hidden, weight, labels).sum(), out.gap

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for length in (4, 7, 9, 11):
        hidden = torch.randn(2 * PAIRS, length, WIDTH, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(VOCABULARY, (2 * PAIRS, length))
        labels[:, 0] = -100
        found, gap = compiled(hidden, weight, labels)
        gradients = torch.autograd.grad(2 * found, [hidden, weight])
        expected, wanted_gap = both(hidden, weight, labels)
        torch.testing.assert_close(gap, wanted_gap, atol=1e-12, rtol=0)
        for one, other in zip(gradients, torch.autograd.grad(2 * expected, [hidden, weight])):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert counter.frame_count == 2  # one length, then any


def test_a_compiled_backward_of_nothing_with_a_transposed_weight():
    compiled = torch.compile(lambda h, w, y: fused_linear_gapo_loss(h, w.t(), y).loss, fullgraph=True)
    hidden, weight = torch.randn(2, 4, 5, requires_grad=True), torch.randn(5, 37, requires_grad=True)
    compiled(hidden, weight, torch.full((2, 4), -100)).backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("budget", [ROW // 3, ROW, 3 * ROW])
def test_a_second_backward_makes_the_same_gradients(budget):
    hidden, weight, _, labels, _, _ = problem()
    loss = fused_linear_gapo_loss(hidden, weight, labels, max_logits_bytes=budget).loss
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, [hidden, weight])))


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]], ids=str)
def test_the_operators_hold_torchs_contract(needs):
    hidden, weight, bias, labels, anchor, _ = (t.detach() if t is not None else t for t in problem(bias=True))
    head, layout = (2.0, 0.5, 3 * ROW, None), (True, -100)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    loss = (2.0, 0.5, 0.1, "sigmoid", True, 0.2)
    arguments = (hidden, weight, labels, anchor, None, None, bias, None, *head, *loss, *layout, needs, "torch")
    torch.library.opcheck(torch.ops.gapo_kernels.linear_loss_forward, arguments, test_utils=checks)
    for anchors in ((None, None), (anchor, 2 * weight)):
        arguments = (hidden, weight, labels, bias, None, *anchors, *head, True, *layout, needs, False, "torch")
        torch.library.opcheck(torch.ops.gapo_kernels.linear_logps_forward, arguments, test_utils=checks)
    _, _, _, row_shift, row_total, unit, logits = torch.ops.gapo_kernels.linear_logps_forward(*arguments)
    scale = torch.randn(2 * PAIRS, dtype=torch.float64)
    saved = (row_shift, row_total, unit, logits)
    arguments = (scale, hidden, weight, labels, bias, None, *saved, *head, *layout, needs, False, None, "torch")
    torch.library.opcheck(torch.ops.gapo_kernels.linear_logps_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_policy_and_anchor_share_one_search_for_rows(dtype, reduction, monkeypatch):
    hidden, weight, _, labels, anchor, _ = problem(dtype=dtype)
    found, search = [], linear_engine.find_rows
    monkeypatch.setattr(linear_engine, "find_rows", lambda *args, **kw: found.append(1) or search(*args, **kw))
    fused_linear_gapo_loss(hidden, weight, labels, anchor_hidden=anchor, reduction=reduction)
    assert len(found) == 1


def test_the_operators_stay_out_of_cuda_graphs():
    for name in ("linear_loss_forward", "linear_logps_forward", "linear_logps_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.gapo_kernels, name).default.tags


# ---- Memory ----

PEAKS = """
import json, os, sys
from pathlib import Path
import torch
import torch._dynamo  # as the first call of an operator would, in each child anew
from gapo_kernels import fused_linear_gapo_loss, linear_sequence_logps
def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
def loss(*head, **options):
    fused_linear_gapo_loss(*head, anchor_hidden=head[0], **options).loss.sum().backward()
def loss_of_each_pair(*head, **options):
    loss(*head, reduction="none", **options)
def loss_of_labels_that_underflow(*head, **options):
    loss(*head, logit_scale=40.0, **options)
def logps(*head, **options):
    linear_sequence_logps(*head, **options).sum().backward()
def logps_as_in_a_step(*head, **options):
    kept = linear_sequence_logps(*head, **options)
    torch.autograd.grad(kept.sum(), head[0], retain_graph=True)
    with torch.no_grad():
        linear_sequence_logps(*head, **options)
    kept.sum().backward()
def logps_with_softcap(*head, **options):
    logps_as_in_a_step(*head, softcap=30.0, **options)
def run(call, mib, length, width, vocabulary):
    hidden = torch.randn(8, length, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (8, length))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    globals()[call](hidden, weight, labels, max_logits_bytes=mib * 2**20)
    gradients = 4 * (hidden.numel() + weight.numel()) / 2**20
    return (status("VmHWM") - before) / 1024 - gradients
for call, *case in json.loads(sys.argv[1]):
    if os.fork() == 0:  # of a process that has imported torch, and computed nothing
        torch.set_num_threads(2)
        run(call, 8, 4, 64, 2048)
        print(json.dumps(run(call, *case)), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
# MiB of the budget, length, width, vocabulary. All logits of the narrow head are 1 MiB a position. In the last row they
# fit, with softcap's buffer beside them, and are kept for the backward. The wide head's hidden states are four times its logits:
# one more of that size may be kept, and no other.
PEAK_CASES = [
    (8, 160, 64, 32768),
    (32, 160, 64, 32768),
    (64, 160, 64, 32768),
    (8, 512, 2048, 512),
    (160, 128, 64, 32768),
]
PEAK_CALLS = ["loss", "loss_of_each_pair", "logps", "logps_as_in_a_step"]
LAST_CALLS = ["logps_with_softcap", "loss_of_labels_that_underflow"]  # of the last case alone
PEAKS_ASKED = [(call, *case) for call in PEAK_CALLS for case in PEAK_CASES] + [(c, *PEAK_CASES[-1]) for c in LAST_CALLS]


@pytest.fixture(scope="module")
def peaks():
    """Of each call and case, in a process of its own: MiB beyond operands and gradients."""
    command = [sys.executable, "-c", PEAKS, json.dumps(PEAKS_ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if "PermissionError" in done.stderr:
        pytest.skip("the kernel does not let the peak be reset")
    assert done.returncode == 0, done.stderr
    return dict(zip(PEAKS_ASKED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("call, case", [(call, case) for call, *case in PEAKS_ASKED], ids=str)
def test_peak_memory_is_the_budget_and_at_most_64_mib(peaks, call, case):
    """Eager holds all logits several times."""
    mib, length, width, _ = case
    beyond, kept = peaks[call, *case], 0 if call.startswith("loss") and call != "loss_of_each_pair" else 4 * 8 * length * width / 2**20
    assert 0 < beyond <= mib + kept + 64
