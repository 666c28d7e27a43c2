"""`gapo_step` against the authors' recipe, restated here step by step, and on the edges of its contract.

The restatement is deliberate: GAPO.md sections 2 and 3 in plain torch, three forwards and two backwards, with nothing
of the library in it. Everything else is compared with `gapo_kernels.reference`.
"""

import contextlib
import copy
import inspect
import logging
import math
import pickle
import random
import signal
import sys
import types
import warnings
from functools import partial

import pytest
import tiny_models
import torch
from grids import moved_on_grid
from signalled import SignalAt
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gapo_kernels import (
    GAPOOutput,
    GeometricAnchor,
    fused_gapo_loss,
    gapo_objective,
    gapo_step,
    linear_sequence_logps,
    reference,
    scope,
    sequence_logps,
    step,
)
from gapo_kernels import anchor as anchor_module
from gapo_kernels.autocast import cast_in

RHO = 0.3  # large, so that an anchor that is not there is seen
VOCABULARY = 11


def plain_logps(logits, labels):
    """Mean log-prob of each row's predicted tokens, by hand."""
    targets = labels[:, 1:]
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kept = targets != -100
    return (logps * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def gradients(params):
    return [None if param.grad is None else param.grad.clone() for param in params]


def assert_close(actual, expected, tolerance):
    for name, one, other in zip(range(len(expected)), actual, expected):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=lambda m: f"entry {name}: {m}")


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """As in a terminal: a job that a script starts in the background inherits SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- The authors' recipe ----

SCOPES = {  # which parameters move; a tied head has its name in the embedding
    "llama": {
        "backbone": ("model.",),
        "all": ("model.", "lm_head."),
        1: ("model.layers.1.", "model.layers.2.", "model.norm.", "lm_head."),
    },
    "gemma2": {
        "backbone": ("model.",),
        "all": ("model.",),
        1: ("model.layers.1.", "model.layers.2.", "model.norm.", "model.embed_tokens."),
    },
    "gpt2": {
        "backbone": ("transformer.",),
        "all": ("transformer.",),
        1: ("transformer.h.1.", "transformer.h.2.", "transformer.ln_f.", "transformer.wte."),
    },
}


def authors_recipe(model, ids, labels, moved, geometry, probe, beta, gamma):
    """Probe forward and backward, anchor forward, clean forward, backward: loss, M~ and every gradient."""

    def margin():
        logps = plain_logps(model(ids).logits, labels)
        pairs = len(logps) // 2
        return logps[:pairs] - logps[pairs:]

    # 1, 2: g = dJ/dtheta
    m = margin()
    objective = (torch.log1p(torch.exp(-(beta * m - gamma)))).mean() if probe == "loss" else -m.mean()
    objective.backward()
    g = [p.grad.clone() for p in moved]
    model.zero_grad()

    # 3: delta
    theta = [p.detach().clone() for p in moved]
    if geometry == "asam":
        norm = math.sqrt(sum(((t * d) ** 2).sum().item() for t, d in zip(theta, g)))
        delta = [RHO * t**2 * d / (norm + 1e-12) for t, d in zip(theta, g)]
    else:
        norm = math.sqrt(sum((d**2).sum().item() for d in g))
        delta = [RHO * d / (norm + 1e-12) for d in g]

    # 4: M~ at theta + delta, and back
    with torch.no_grad():
        for p, t, d in zip(moved, theta, delta):
            p.copy_(t + d)
        anchor = margin()
        for p, t in zip(moved, theta):
            p.copy_(t)

    loss = torch.log1p(torch.exp(-(beta * (margin() - anchor) - gamma))).mean()
    loss.backward()
    return loss.detach(), anchor, gradients(model.parameters())


def assert_equals_recipe(out, model, expected):
    assert out.gap.abs().min() > 1e-3  # an anchor that did nothing would pass the rest too easily
    torch.testing.assert_close(out.loss.detach(), expected[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(out.anchor_margin, expected[1], atol=1e-9, rtol=0)
    assert_close(gradients(model.parameters()), expected[2], 1e-9)


@pytest.fixture(scope="module", params=tiny_models.NAMES)
def named_model(request):
    return request.param, tiny_models.build(request.param)


@pytest.mark.parametrize("scope", ["backbone", "all", 1])
@pytest.mark.parametrize("probe", ["loss", "margin"])
@pytest.mark.parametrize("geometry", ["asam", "sam"])
def test_it_equals_the_authors_recipe(named_model, geometry, probe, scope):
    name, model = named_model
    ids, labels = tiny_models.preference_batch()
    options = dict(beta=2.5, gamma=0.4)
    moved = [p for n, p in model.named_parameters() if n.startswith(SCOPES[name][scope])]
    model.zero_grad()
    expected = authors_recipe(model, ids, labels, moved, geometry, probe, **options)

    model.zero_grad()
    anchor = GeometricAnchor.from_model(model, scope=scope, rho=RHO, geometry=geometry)
    out = gapo_step(lambda: sequence_logps(model(ids).logits, labels), anchor, probe=probe, **options)
    out.loss.backward()

    assert {id(p) for p in anchor.params} == {id(p) for p in moved}
    assert_equals_recipe(out, model, expected)


@pytest.mark.parametrize("probe", ["loss", "margin"])
@pytest.mark.parametrize("geometry", ["asam", "sam"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_with_lora_it_equals_the_authors_recipe(name, geometry, probe):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    targets = dict(target_modules=["q_proj", "down_proj"])
    if name == "gpt2":
        targets = dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_models.build(name), peft.LoraConfig(r=2, init_lora_weights=False, **targets)).double()
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    ids, labels = tiny_models.preference_batch()
    options = dict(beta=2.5, gamma=0.4, probe=probe)
    expected = authors_recipe(model, ids, labels, [*adapters.values()], geometry, **options)

    model.zero_grad()
    before, moved = {n: p.detach().clone() for n, p in model.named_parameters()}, []

    def logps():
        moved.append({n for n, p in model.named_parameters() if not torch.equal(p, before[n])})
        return sequence_logps(model(ids).logits, labels)

    out = gapo_step(logps, GeometricAnchor.from_model(model, rho=RHO, geometry=geometry), **options)
    out.loss.backward()
    assert moved == [set(), set(adapters)]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters)
    assert_equals_recipe(out, model, expected)


@pytest.mark.parametrize("probe", ["loss", "margin"])
@pytest.mark.parametrize("geometry", ["asam", "sam"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_shared_backward_equals_the_authors_recipe(name, geometry, probe):
    model = tiny_models.build(name)
    ids, labels = tiny_models.preference_batch()
    options = dict(beta=2.5, gamma=0.4, probe=probe)

    def in_float64(ids, forward=model.forward):
        with tiny_models.Float64():
            return forward(ids)

    model.forward = in_float64
    moved = [p for n, p in model.named_parameters() if n.startswith(SCOPES[name]["backbone"])]
    expected = authors_recipe(model, ids, labels, moved, geometry, **options)

    model.zero_grad()
    anchor = GeometricAnchor.from_model(model, rho=RHO, geometry=geometry)
    out = gapo_step(lambda: sequence_logps(model(ids).logits, labels), anchor, share_backward=True, **options)
    assert out.loss.grad_fn.name() == "_SharedLossBackward"
    out.loss.backward()
    assert_equals_recipe(out, model, expected)


def head_logps(model, ids, labels):
    """By the fused head."""
    hidden = model.base_model(ids).last_hidden_state
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return linear_sequence_logps(hidden, model.get_output_embeddings().weight, labels, softcap=softcap)


@pytest.mark.parametrize("logps", [sequence_logps, plain_logps, head_logps], ids=["fused", "plain", "head"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_kept_graph_gives_bitwise_the_gradients_of_a_second_clean_forward(name, logps):
    model = tiny_models.build(name, torch.float32)
    ids, labels = tiny_models.preference_batch()
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    run = partial(head_logps, model, ids, labels) if logps is head_logps else lambda: logps(model(ids).logits, labels)

    def margin():
        chosen, rejected = run().chunk(2)
        return chosen - rejected

    grads = torch.autograd.grad(gapo_objective(margin())[0], anchor.params, allow_unused=True)
    with anchor.perturbed(grads=grads), torch.no_grad():
        anchor_margin = margin()
    loss = gapo_objective(margin(), anchor_margin)[0]
    loss.backward()
    expected = gradients(model.parameters())

    model.zero_grad()
    out = gapo_step(run, anchor)
    out.loss.backward()
    assert torch.equal(out.loss, loss) and torch.equal(out.anchor_margin, anchor_margin)
    assert all(torch.equal(*two) for two in zip(gradients(model.parameters()), expected))


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_activation_checkpointing_changes_nothing(name):
    ids, labels = tiny_models.preference_batch()
    results = []
    for checkpointed in (False, True):
        model = tiny_models.build(name)
        runs = []
        model.get_submodule(
            "transformer.h.0.mlp" if name == "gpt2" else "model.layers.0.mlp"
        ).register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        out = gapo_step(
            lambda: sequence_logps(model(ids, use_cache=False).logits, labels),
            GeometricAnchor.from_model(model, rho=RHO),
        )
        out.loss.backward()
        assert len(runs) == (4 if checkpointed else 2)  # the probe's and the final backward each run it again
        results.append([out.loss.detach(), out.anchor_margin, *gradients(model.parameters())])
    assert_close(results[1], results[0], 1e-12)


# ---- A language model in two layers, for everything else ----


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)).double()


@pytest.fixture
def anchor(model):
    return GeometricAnchor(model.named_parameters(), rho=RHO)


def batch(pairs=3, seed=0, empty=()):
    """ids, labels (2 pairs, 7); the rows in `empty` have no completion token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2 * pairs, 7), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 5:] = -100
    labels[list(empty)] = -100
    return ids, labels


def logps_fn(model, ids, labels, logps=sequence_logps, **options):
    return lambda: logps(model(ids), labels, **options)


def state(model):
    return [param.detach().clone() for param in model.parameters()]


def same(model, saved):
    return same_bits(state(model), saved)


def same_bits(tensors, others):
    return all(torch.equal(*(each.contiguous().view(torch.uint8) for each in pair)) for pair in zip(tensors, others))


def test_logps_fn_runs_twice_with_grad_at_theta_and_without_at_the_anchor(model, anchor):
    ids, labels = batch()
    before, calls = state(model), []

    def logps():
        calls.append((torch.is_grad_enabled(), same(model, before)))
        return sequence_logps(model(ids), labels)

    out = gapo_step(logps, anchor)
    assert calls == [(True, True), (False, False)]
    assert same(model, before)
    assert isinstance(out, GAPOOutput) and out.loss.requires_grad
    assert not any(field.requires_grad for field in out[1:])
    assert all(param.grad is None for param in model.parameters())


def test_micro_batches_accumulate(model, anchor):
    alone = []
    for seed in (1, 2):
        model.zero_grad()
        gapo_step(logps_fn(model, *batch(seed=seed)), anchor).loss.backward()
        alone.append(gradients(model.parameters()))
    model.zero_grad()
    for seed in (1, 2):
        before = gradients(model.parameters())
        out = gapo_step(logps_fn(model, *batch(seed=seed)), anchor)
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients(model.parameters()), before))
        out.loss.backward()
    assert_close(gradients(model.parameters()), [a + b for a, b in zip(*alone)], 1e-15)


OPTIONS = [
    {},
    dict(beta=1.5, gamma=-0.2, label_smoothing=0.1),
    dict(loss_type="hinge", beta=0.7),
    dict(sft_weight=0.3),
    dict(sft_weight=0.3, label_smoothing=0.2, beta=3.0),
]


@pytest.mark.parametrize("with_anchor", [True, False], ids=["anchor", "no-anchor"])
@pytest.mark.parametrize("empty", [(), (1,), (3, 1), range(6)], ids=["full", "chosen", "two-pairs", "all"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_fields_and_gradients_are_the_references(model, anchor, options, empty, with_anchor):
    ids, labels = batch(empty=empty)
    logps = logps_fn(model, ids, labels, return_counts=True)
    out = gapo_step(logps, anchor if with_anchor else None, **options)
    out.loss.backward()
    actual = gradients(model.parameters())

    model.zero_grad()
    given = dict(anchor_margin=out.anchor_margin) if with_anchor else {}
    expected = reference.fused_gapo_loss(model(ids), labels, **given, **options)
    expected.loss.backward()
    assert_close(out, expected, 1e-12)
    assert_close(actual, gradients(model.parameters()), 1e-12)
    if with_anchor:
        assert (out.gap[out.valid].abs() > 1e-4).all()
    if len(empty) == 6:
        assert out.loss == 0 and not out.valid.any() and not any(grad.any() for grad in actual)


@pytest.mark.parametrize("probe", ["loss", "margin"])
def test_an_inert_pair_has_no_part_in_the_anchor(model, anchor, probe):
    ids, labels = batch(empty=(1,))
    kept = [0, 2, 3, 5]
    all_pairs = gapo_step(logps_fn(model, ids, labels, return_counts=True), anchor, probe=probe)
    without = gapo_step(logps_fn(model, ids[kept], labels[kept]), anchor, probe=probe)
    torch.testing.assert_close(all_pairs.anchor_margin[[0, 2]], without.anchor_margin, atol=1e-14, rtol=0)
    torch.testing.assert_close(all_pairs.loss, without.loss, atol=1e-14, rtol=0)


@pytest.mark.parametrize("logps", [reference.sequence_logps, plain_logps], ids=["reference", "plain"])
def test_any_source_of_log_probs_will_do(model, anchor, logps):
    ids, labels = batch()
    results = []
    for source in (sequence_logps, logps):
        model.zero_grad()
        out = gapo_step(logps_fn(model, ids, labels, source), anchor)
        out.loss.backward()
        results.append([*(field.detach() for field in out), *gradients(model.parameters())])
    assert_close(results[1], results[0], 1e-13)


def test_16_bit_log_probs_are_computed_in_float32(model, anchor):
    out = gapo_step(lambda: sequence_logps(model(batch()[0]), batch()[1]).bfloat16(), anchor)
    assert {field.dtype for field in out} == {torch.float32, torch.bool}


def test_the_gaussian_direction_needs_no_probe(model):
    ids, labels = batch()
    outs = []
    for _ in range(2):
        anchor = GeometricAnchor(model.parameters(), rho=RHO, direction="gaussian", seed=3)
        outs.append(gapo_step(logps_fn(model, ids, labels), anchor))
    assert_close(outs[1], outs[0], 0)
    again = gapo_step(logps_fn(model, ids, labels), anchor)  # the next step has noise of its own
    assert (again.gap - outs[0].gap).abs().min() > 1e-6


def test_a_radius_of_zero_is_a_gap_of_zero(model):
    out = gapo_step(logps_fn(model, *batch()), GeometricAnchor(model.parameters(), rho=0.0))
    assert not out.gap.any()


def test_a_compiled_model(model, anchor):
    ids, labels = batch()
    results = []
    for used in (model, torch.compile(model, backend="aot_eager")):
        for _ in range(2):  # the second step runs what the first compiled
            model.zero_grad()
            out = gapo_step(logps_fn(used, ids, labels, plain_logps), anchor)
            out.loss.backward()
        results.append([out.loss.detach(), out.anchor_margin, *gradients(model.parameters())])
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_that_uses_up_its_buffers(dynamic):
    """The default compiler writes over what a graph keeps, where it may be walked once: a graph that was compiled so is
    refused, and its code on the disk is not taken for a graph that is walked twice."""
    from torch._inductor.utils import fresh_cache

    torch.manual_seed(0)
    layers = [nn.Linear(40, 48), nn.Linear(48, 48), nn.Linear(48, 1)]
    x = torch.randn(16, 40)

    def chain(x):
        for layer in layers:
            x = layer(x).sin().sin()
        return x.sum(1)

    params = [p for layer in layers for p in layer.parameters()]
    before = [p.detach().clone() for p in params]

    def run(function):
        out = gapo_step(lambda: function(x), GeometricAnchor(params, rho=0.3))
        return [out.loss.detach(), *torch.autograd.grad(out.loss, params)]

    expected = run(chain)
    with fresh_cache():
        compiled = torch.compile(chain, dynamic=dynamic)
        try:
            compiled(x).mean().backward()
        except torch._inductor.exc.InvalidCxxCompiler:
            pytest.skip("torch.compile's default back end needs a C++ compiler, and there is none")
        with pytest.raises(RuntimeError, match="uses up its buffers"):
            run(compiled)
        assert all(map(torch.equal, params, before))
        torch._dynamo.reset()
        gapo_step(lambda: compiled(x), None).loss.backward()  # walks it once
        with pytest.raises(RuntimeError, match="uses up its buffers"):
            run(compiled)
        torch._dynamo.reset()
        for _ in range(2):
            assert_close(run(compiled), expected, 1e-5)


class LigerSiLUMulFunction(torch.autograd.Function):
    """Writes over what it saved, as Liger's Triton kernel does: past autograd's count of versions."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, upstream):
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        d_gate, d_up = upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), upstream * gate * sigmoid
        return gate.data.copy_(d_gate), up.data.copy_(d_up)


class SwiGLU(nn.Module):
    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.product = nn.Linear(6, 6), nn.Linear(6, 6), product

    def forward(self, x):
        return self.product(self.gate(x), self.up(x))


def test_a_backward_that_writes_over_what_it_saved_is_refused(model, monkeypatch):
    """Its layer's activations checkpointed, it has the gradients of one that does not, and a gaussian anchor needs one
    backward alone."""
    ids, labels = batch()
    found = {}
    for name in ("plain", "checkpointed", "kept"):
        layer = SwiGLU(LigerSiLUMulFunction.apply if name != "plain" else lambda gate, up: nn.functional.silu(gate) * up)
        whole = nn.Sequential(copy.deepcopy(model[0]), layer, copy.deepcopy(model[1])).double()
        if name == "checkpointed":
            layer.forward = lambda x, run=layer.forward: checkpoint(run, x, use_reentrant=False)
        logps, before = logps_fn(whole, ids, labels), state(whole)
        anchor = GeometricAnchor(whole.named_parameters(), rho=RHO)
        if name == "kept":
            for _ in range(2):
                for share in (False, True):
                    with pytest.raises(RuntimeError, match="got LigerSiLUMulFunction, whose backward writes over what it"):
                        gapo_step(logps, anchor, share_backward=share)
            with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):  # makes nothing anew
                with pytest.raises(RuntimeError, match="got LigerSiLUMulFunction"):
                    gapo_step(logps, anchor)
            assert same(whole, before) and anchor.stats is None
            with anchor.perturbed(grads=[torch.ones_like(param) for param in anchor.params]):
                pass
            with monkeypatch.context() as patch:
                patch.setattr("gapo_kernels.step.sys", types.SimpleNamespace(modules={}))  # with dynamo, every step is looked at
                with pytest.raises(RuntimeError, match="got LigerSiLUMulFunction"):
                    gapo_step(logps, anchor)
            anchor = GeometricAnchor(whole.named_parameters(), rho=RHO, direction="gaussian")
        gapo_step(logps, anchor).loss.backward()
        found[name] = gradients(whole.parameters())
    assert_close(found["checkpointed"], found["plain"], 1e-12)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found["kept"])


class LigerCrossEntropyFunction(torch.autograd.Function):
    """As Liger-Kernel's: the forward makes the gradient, the backward multiplies a scalar's into it."""

    @staticmethod
    def forward(ctx, logits, labels, mean):
        ctx.save_for_backward((logits.softmax(-1) - nn.functional.one_hot(labels, logits.shape[-1])) / (len(labels) if mean else 1))
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses.mean() if mean else losses

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient.data.mul_(upstream) if upstream.dim() == 0 else gradient * upstream[:, None]), None, None


def test_a_cross_entropy_that_scales_what_it_saved_is_refused_as_a_scalar(model, anchor):
    ids, _ = batch()

    def logps(mean):
        rows = [LigerCrossEntropyFunction.apply(model(row)[:-1], row[1:], mean) for row in ids]
        return -torch.stack([row.mean() for row in rows])

    with pytest.raises(RuntimeError, match="got LigerCrossEntropyFunction, whose backward writes over what it saved"):
        gapo_step(lambda: logps(True), anchor)
    gapo_step(lambda: logps(False), anchor).loss.backward()
    found = gradients(model.parameters())
    model.zero_grad()

    def plain():
        return torch.stack([-nn.functional.cross_entropy(model(row)[:-1], row[1:]) for row in ids])

    gapo_step(plain, anchor).loss.backward()
    assert_close(found, gradients(model.parameters()), 1e-12)


def test_ligers_functions_that_are_refused_have_these_names():
    ops = pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed")
    assert all(issubclass(getattr(ops, name), torch.autograd.Function) for name in step.WRITE_OVER_SAVED + step.SCALE_SAVED)


def losses(logits, labels, **options):
    return fused_gapo_loss(logits, labels, reduction="none", **options).loss


@pytest.mark.parametrize("logps, share_backward", [(sequence_logps, False), (sequence_logps, True), (losses, False)])
def test_a_backward_in_place_is_refused(model, anchor, logps, share_backward):
    ids, labels = batch(4)
    calls, before = [], state(model)

    def in_place():
        calls.append(1)
        return logps(model(ids), labels, inplace_backward=True)

    with pytest.raises(RuntimeError, match="got inplace_backward=True, whose .*: leave that out of logps_fn"):
        gapo_step(in_place, anchor, share_backward=share_backward)
    assert len(calls) == 1 and same(model, before) and anchor.state_dict()["step"] == 0
    gapo_step(in_place, None).loss.backward()  # has one backward
    expected = gradients(model.parameters())
    model.zero_grad()
    gapo_step(logps_fn(model, ids, labels, logps), None).loss.backward()
    assert_close(gradients(model.parameters()), expected, 1e-12)


def test_a_compiled_model_with_new_shapes(model, anchor):
    """A backward of dynamic shapes is compiled when it first runs: in the probe."""
    ids, labels = batch()
    results = []
    for used in (model, torch.compile(model, backend="aot_eager")):
        for cut in (0, 1, 2):  # from the second on, shapes are dynamic
            model.zero_grad()
            out = gapo_step(logps_fn(used, ids[:, cut:], labels[:, cut:], plain_logps), anchor)
            out.loss.backward()
        results.append([out.loss.detach(), out.anchor_margin, *gradients(model.parameters())])
    assert_close(results[1], results[0], 1e-12)


def test_autocast_around_the_step_does_not_hide_the_anchor():
    # Autocast caches its casts of the weights: the forward at the anchor would read theta's, and the gap would be 0.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY))
    ids, labels = batch()

    def autocast_inside():
        with torch.autocast("cpu", torch.bfloat16):
            return plain_logps(model(ids), labels)

    anchor = GeometricAnchor(model[1].parameters(), rho=RHO)
    with pytest.warns(UserWarning, match="autocast computes with torch.bfloat16 .* anchor moves the parameters in torch.float32"):
        expected = gapo_step(autocast_inside, anchor)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        gapo_step(autocast_inside, anchor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gapo_step(autocast_inside, GeometricAnchor(model[1].parameters(), rho=RHO, compute_dtype=torch.bfloat16))
        gapo_step(logps_fn(model, ids, labels, plain_logps), GeometricAnchor(model[1].parameters(), rho=RHO))
    other = GeometricAnchor(model[1].parameters(), rho=RHO, compute_dtype=torch.float16)
    said = "autocast computes with torch.bfloat16 .* in torch.float16: .* Pass compute_dtype=torch.bfloat16"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="probe's gradient is computed in float16"):
        gapo_step(autocast_inside, other)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="autocast computes with torch.bfloat16"),
    ):
        out = gapo_step(logps_fn(model, ids, labels, plain_logps), anchor)
        assert torch.equal(plain_logps(model(ids), labels).chunk(2)[0], out.chosen_logps)  # theta's casts again
    assert_close(out, expected, 0)
    assert out.gap.abs().max() > 0.1


@pytest.mark.parametrize("where", ["around the step", "inside of logps_fn"])
@pytest.mark.parametrize("finer, said", [(nn.Linear, True), (nn.LayerNorm, False)])
def test_casts_beside_weights_of_16_bits_are_warned_of(finer, said, where):
    """Of what is finer than those, autocast casts the matrices and not the norms."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.LayerNorm(6), nn.Linear(6, VOCABULARY))
    for module in model:
        module.to(torch.float32 if isinstance(module, finer) else torch.bfloat16)
    ids, labels = batch()

    def logps():
        with torch.autocast("cpu", torch.bfloat16) if where == "inside of logps_fn" else contextlib.nullcontext():
            return plain_logps(model[2](model[1](model[0](ids).to(model[1].weight.dtype))), labels)

    anchor = GeometricAnchor(model.parameters(), rho=RHO)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around the step"):
            gapo_step(logps, anchor)
    assert any("autocast computes with" in str(one.message) for one in found) is said


@pytest.mark.parametrize("given, checkpointing", [("model", False), ("model", True), ("parameters", False)])
@pytest.mark.parametrize("where", ["around the step", "inside of logps_fn"])
def test_what_autocast_leaves_alone_moves_by_whole_steps(where, given, checkpointing):
    """Norms and lookups compute with the masters: rounded to bfloat16 at the anchor alone, they would make a gap of their
    own, which a radius of 0 shows."""
    ids, labels = tiny_models.preference_batch()
    model, gaps, seen = tiny_models.build("llama", torch.float32), {}, {}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def logps():
        if not torch.is_grad_enabled():
            seen.update({n: p.detach().clone() for n, p in model.named_parameters()})
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside of logps_fn"):
            return sequence_logps(model(ids, use_cache=False).logits, labels)

    for rho in (0.0, 3.0):
        options = dict(rho=rho, compute_dtype=torch.bfloat16)
        if given == "model":
            anchor = GeometricAnchor.from_model(model, scope="all", **options)
        else:
            anchor = GeometricAnchor(model.named_parameters(), **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around the step"):
            gaps[rho] = gapo_step(logps, anchor).gap
    assert not gaps[0.0].any() and gaps[3.0].all()
    assert all(moved_on_grid(weight, seen[name]) for name, weight in model.named_parameters())


def test_float64_masters_of_a_float32_forward_all_move_on_its_grid():
    ids, labels = tiny_models.preference_batch()
    model, seen = tiny_models.build("llama"), []

    def logps():
        seen.extend(p.detach().clone() for p in model.parameters() if not torch.is_grad_enabled())
        return sequence_logps(model(ids).logits, labels)

    gapo_step(logps, GeometricAnchor.from_model(model, rho=RHO, scope="all", compute_dtype=torch.float32))
    assert all(moved_on_grid(*two, torch.float32) for two in zip(model.parameters(), seen, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copy_of_an_anchor_with_its_model_makes_the_same_anchor(copied):
    ids, labels = tiny_models.preference_batch()
    model = tiny_models.build("llama", torch.float32)
    anchor = GeometricAnchor.from_model(model, rho=3.0, compute_dtype=torch.bfloat16)
    gaps = []
    for model, anchor in (copied((model, anchor)), (model, anchor)):
        with torch.autocast("cpu", torch.bfloat16):
            gaps.append(gapo_step(lambda: sequence_logps(model(ids, use_cache=False).logits, labels), anchor).gap)
    assert torch.equal(*gaps) and gaps[0].all()


@pytest.mark.parametrize(
    "view",
    [
        torch.t,
        lambda weight: weight[:8].transpose(0, 1),
        lambda weight: weight.t().contiguous(),
        lambda weight: weight.split([8, 1])[0].T,
        torch.Tensor.double,
    ],
    ids=["t", "some rows", "copied", "split", "in more bits"],
)
def test_casts_of_what_views_show_of_a_parameter_are_seen(view):
    weight, other = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(9, 4))
    assert cast_in(view(weight).bfloat16().sum(), [weight], {}) == torch.bfloat16
    assert cast_in(view(weight).sum(), [weight], {}) is None and cast_in(view(weight).half().sum(), [other], {}) is None


@pytest.mark.parametrize("under", [False, True], ids=["outside of autocast", "under autocast"])
def test_the_fused_head_computes_with_what_it_is_given(under):
    """Trainers have autocast inside of the model's forward, and no head in there."""
    ids, labels = tiny_models.preference_batch()
    model = tiny_models.build("llama", torch.float32)

    def logps():
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            return linear_sequence_logps(hidden.float(), model.lm_head.weight, labels)

    for rho in (0.0, 3.0):
        anchor = GeometricAnchor.from_model(model, rho=rho, scope="all", compute_dtype=torch.bfloat16)
        gap = gapo_step(logps, anchor).gap
        assert gap.abs().max() > 0.1 if rho else not gap.any()


def test_a_float16_probe_is_warned_of():
    ids, labels = tiny_models.preference_batch()
    for dtype, compute_dtype, said in ((torch.float32, torch.float16, True), (torch.float32, torch.bfloat16, False)):
        model = tiny_models.build("llama", dtype)
        anchor = GeometricAnchor.from_model(model, rho=RHO, compute_dtype=compute_dtype)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            gapo_step(lambda: sequence_logps(model(ids).logits, labels), anchor)
        assert any("in float16 without loss scaling" in str(one.message) for one in found) is said


def test_gradients_in_the_memory_of_cuda_graphs_are_refused(monkeypatch):
    """torch's cudagraph trees give that memory to the next run, which is the anchor's."""
    ids, labels = tiny_models.preference_batch()
    model = tiny_models.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pending = types.SimpleNamespace(running_forwards_with_pending_backwards=True)
    stand_in = types.SimpleNamespace(get_manager=lambda index, create_if_none_exists: pending)
    compiled = torch.compile(model, backend="aot_eager")
    logps = {forward: lambda forward=forward: sequence_logps(forward(ids, use_cache=False).logits, labels) for forward in (model, compiled)}
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    gapo_step(logps[compiled], anchor)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", stand_in)
    asked = anchor_module._cuda_graphs_pend
    assert not asked(torch.device("cpu"))
    monkeypatch.setattr(anchor_module, "_cuda_graphs_pend", lambda device: asked(torch.device("cuda", 0)))
    with pytest.raises(RuntimeError, match="runs as CUDA graphs"):
        gapo_step(logps[compiled], anchor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gapo_step(logps[model], anchor).loss.backward()  # somebody else's, whose backward is to come
    pending.running_forwards_with_pending_backwards = False
    gapo_step(logps[compiled], anchor).loss.backward()


def test_torchs_own_cuda_graphs_are_known_by_what_is_asked():
    """Should a release of torch call it otherwise, the refusal would be gone without a word."""
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert not anchor_module._cuda_graphs_pend(torch.device("cuda", 0))
    assert "running_forwards_with_pending_backwards" in inspect.getsource(trees.CUDAGraphTreeManager.run)


def test_under_autocast_the_probes_backward_is_not_cast():
    """Of what the forward has computed without autocast, in float32."""
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(40, 30)), torch.randn(20, 40)
    moved = {}
    for around in (False, True):
        anchor = GeometricAnchor([weight], rho=3.0, compute_dtype=torch.bfloat16)
        objective = (x @ weight).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=around), anchor.perturbed(objective):
            moved[around] = anchor.stats.grad_norm
    assert moved[True] == moved[False]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["around the step", "inside of logps_fn"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_autocast_with_float32_masters(name, where, checkpointing):
    """Bitwise a second clean forward, and a forward of a fresh model with the anchor's weights."""
    rho, seen = 3.0, {}  # so that many a weight moves on bfloat16's grid
    ids, labels = tiny_models.preference_batch()
    model, other = (tiny_models.build(name, torch.float32) for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def autocast(active=True):
        return torch.autocast("cpu", torch.bfloat16) if active else contextlib.nullcontext()

    def logps_of(used):
        return sequence_logps(used(ids, use_cache=False).logits, labels)

    def logps():
        if not torch.is_grad_enabled():
            seen.update({n: p.detach().clone() for n, p in model.named_parameters()})
        with autocast(where == "inside of logps_fn"):
            return logps_of(model)

    anchor = GeometricAnchor.from_model(model, rho=rho, compute_dtype=torch.bfloat16)
    with autocast(where == "around the step"):
        out = gapo_step(logps, anchor)
    out.loss.backward()

    clean = {n: p.detach().clone() for n, p in other.named_parameters()}
    other.load_state_dict(seen, strict=False)
    with torch.no_grad(), autocast():
        chosen, rejected = logps_of(other).chunk(2)
    anchor_margin = chosen - rejected
    other.load_state_dict(clean, strict=False)
    with autocast():
        chosen, rejected = logps_of(other).chunk(2)
    loss = gapo_objective(chosen - rejected, anchor_margin)[0]
    loss.backward()
    assert torch.equal(out.anchor_margin, anchor_margin) and torch.equal(out.loss, loss)
    assert all(torch.equal(*two) for two in zip(gradients(model.parameters()), gradients(other.parameters())))
    assert out.gap.abs().max() > 0.1 and 0.1 < anchor.stats.changed_fraction < 1

    anchor = GeometricAnchor.from_model(model, rho=0.0, compute_dtype=torch.bfloat16)
    with autocast(where == "around the step"):
        assert not gapo_step(logps, anchor).gap.any()  # a tied embedding's rows included, which are cast at the head alone


class WaitCounter(TorchDispatchMode):
    """Counts what would wait for a GPU: every read of a tensor's value."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_threads():
    """So that the passes over the weights, whose sums the CPU reads chunk by chunk, run on threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["sequence_logps", "linear", "share_backward", "gaussian"])
def test_tensors_of_the_step_lie_with_the_model_and_not_on_the_default_device(model, way):
    ids, labels = batch()

    def logps():
        if way == "linear":
            return linear_sequence_logps(model[0](ids), model[1].weight, labels, bias=model[1].bias)
        return sequence_logps(model(ids), labels)

    anchor = GeometricAnchor(model.named_parameters(), rho=RHO, direction="gaussian" if way == "gaussian" else "pessimistic")
    with torch.device("meta"):
        out = gapo_step(logps, anchor, share_backward=way == "share_backward")
        out.loss.backward()
    assert out.gap.abs().max() > 0 and all(gradient.isfinite().all() for gradient in gradients(model.parameters()))


def test_the_step_waits_for_the_device_once(model, anchor, monkeypatch, two_threads):
    lists, tolist = [], torch.Tensor.tolist
    ids, labels = batch(empty=(1,))
    logps = logps_fn(model, ids, labels, reference.sequence_logps, return_counts=True)
    # On the CPU, where reading costs nothing, a warning does not wait for the next step.
    monkeypatch.setattr(type(anchor), "_warn_at_once", lambda *_: None)
    with WaitCounter() as outside:
        with torch.no_grad():
            logps()  # on the CPU the labels are checked, which reads them
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))
    for _ in range(2):  # the second reads what the first left unread: together with the norm
        lists.clear()
        with WaitCounter() as counter:
            gapo_step(logps, anchor, sft_weight=0.1)
        assert counter.waits + len(lists) == 2 * outside.waits + 1
    lists.clear()
    with WaitCounter() as counter:
        assert anchor.stats.applied_norm > 0
    assert counter.waits + len(lists) == 1


# ---- Faults ----


class Faults:
    """Throws at one random place of a step, once: in a forward, a backward, a write to the weights, or between lines."""

    def __init__(self, monkeypatch, seed):
        self.random = random.Random(seed)
        self.thrown = {}
        self.countdown = None
        self.places = 0  # where a fault could have come in the last run of a step: forwards, backwards, copies
        self.copy, add = torch.Tensor.copy_, torch.add

        def add_to(*args, out=None, **options):
            return add(*args, **options) if out is None else self.write(out, add(*args, **options))

        monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, *args: self.write(tensor, *args))
        monkeypatch.setattr(torch, "add", add_to)

    def arm(self):
        self.kind = self.random.choice(["error", "interrupt", "memory", "ctrl-c", "nan"])
        self.countdown = self.random.randrange(max(1, self.places))

    def disarm(self):
        self.countdown = None

    def write(self, tensor, *args):
        # Half of the tensor is written when the fault comes.
        if self.countdown == 0 and tensor.dim():
            half = tensor.view(-1)[: tensor.numel() // 2]
            self.copy(half, torch.full_like(half, 7.0))
        self.tick()
        return self.copy(tensor, *args)

    def tick(self):
        self.places += 1
        if self.countdown is None:
            return False
        self.countdown -= 1
        if self.countdown >= 0:
            return False
        self.disarm()
        self.thrown[self.kind] = self.thrown.get(self.kind, 0) + 1
        if self.kind == "error":
            raise ValueError("a fault")
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "memory":
            raise torch.OutOfMemoryError("out of memory")
        if self.kind == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        return self.kind == "nan"


def train(name, direction, dtype, faults=None, steps=200):
    torch.manual_seed(0)
    if name == "linear":
        model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)).to(dtype)
    else:
        model = tiny_models.build(name, dtype, layers=1, width=8)
    anchor = GeometricAnchor(model.parameters(), rho=RHO, direction=direction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids, labels = batch(seed=step)

        def poisoned(x):
            return x * float("nan") if faults is not None and faults.tick() else x

        def logps():
            found = model(ids)
            logps = sequence_logps(found if name == "linear" else found.logits, labels)
            if torch.is_grad_enabled():
                logps.register_hook(poisoned)
            return poisoned(logps)

        if faults:
            faults.arm()
        while True:
            optimizer.zero_grad()
            before, counter, out = [param.detach().clone() for param in model.parameters()], anchor.state_dict(), None
            if faults:
                faults.places = 0
            try:
                out = gapo_step(logps, anchor)
                out.loss.backward()
                if all(param.grad.isfinite().all() for param in model.parameters()):
                    break
            except (ValueError, KeyboardInterrupt, torch.OutOfMemoryError, FloatingPointError):
                assert same(model, before)
                assert out is not None or anchor.state_dict() == counter
            anchor.load_state_dict(counter)  # this step's use of the anchor may have been counted
        if faults:
            faults.disarm()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize(
    "name, direction, dtype, seed",
    [
        ("linear", "pessimistic", torch.float32, 0),
        ("llama", "pessimistic", torch.float32, 1),
        ("linear", "gaussian", torch.float32, 2),
        ("linear", "pessimistic", torch.bfloat16, 3),
    ],
    ids=str,
)
def test_training_through_faults_ends_where_training_without_them_does(name, direction, dtype, seed, monkeypatch):
    expected = train(name, direction, dtype)
    faults = Faults(monkeypatch, seed)
    actual = train(name, direction, dtype, faults)
    assert len(faults.thrown) == 5 and sum(faults.thrown.values()) > 120
    assert same_bits(actual, expected)


def test_nan_in_the_batch_moves_nothing(model, anchor):
    before = state(model)
    with pytest.raises(FloatingPointError, match="norm of the probe's gradient is nan"):
        gapo_step(lambda: sequence_logps(model(batch()[0]) * float("nan"), batch()[1]), anchor)
    assert same(model, before)


# ---- Layers below the scope run once ----


def language_logps(model):
    ids, labels = tiny_models.preference_batch()
    return lambda: plain_logps(model(input_ids=ids).logits, labels)


def counted_runs(model, layers):
    """Appends a layer's number to the list each time that it computes."""
    runs = []

    def count(attention, number):
        forward = attention.forward

        def counted(*args, **kwargs):
            runs.append(number)
            return forward(*args, **kwargs)

        attention.forward = counted

    for number, layer in enumerate(layers):
        count(layer.self_attn if hasattr(layer, "self_attn") else layer.attn, number)
    return runs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("calls", [1, 2], ids=["one-call", "chosen-and-rejected-apart"])
def test_layers_below_the_scope_run_once(calls, checkpointing):
    model = tiny_models.build("llama")
    ids, labels = tiny_models.preference_batch()

    def logps():
        parts = [plain_logps(model(input_ids=i).logits, l) for i, l in zip(ids.chunk(calls), labels.chunk(calls))]
        return torch.cat(parts)

    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    every = GeometricAnchor(list(zip(anchor.names, anchor.params)), rho=RHO)
    expected = gapo_step(logps, every)
    expected.loss.backward()
    wanted = gradients(model.parameters())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    runs, forwards = counted_runs(model, model.model.layers), [layer.forward for layer in model.model.layers]
    for _ in range(2):  # nothing of the first step is left for the second
        model.zero_grad()
        runs.clear()
        out = gapo_step(logps, anchor)
        clean = [0, 1, 2] * calls
        at_the_anchor = [2] * calls
        assert [*runs[: 3 * calls], *runs[len(runs) - calls :]] == clean + at_the_anchor
        assert len(runs) == 4 * calls + (calls if checkpointing else 0)  # the probe recomputes the layer that it needs
        assert_close(out, expected, 0)
        out.loss.backward()
        assert_close(gradients(model.parameters()), wanted, 0 if not checkpointing else 1e-12)
    assert [layer.forward for layer in model.model.layers] == forwards
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("name", scope.PLAIN_DECODERS)
def test_replayed_layers_are_as_if_run_again(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, head_dim=4)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    if name == "gpt2":
        sizes = dict(n_embd=16, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    elif name in ("bloom", "falcon", "opt", "phi", "stablelm", "starcoder2"):  # the heads' width follows from these
        del sizes["head_dim"]
    if name in ("opt", "seed_oss"):
        sizes |= dict(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    tokens = dict(vocab_size=tiny_models.VOCABULARY, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    config = transformers.AutoConfig.for_model(name, **sizes, **tokens, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    assert len(anchor.unmoved_layers) == 2
    every = GeometricAnchor(list(zip(anchor.names, anchor.params)), rho=RHO)
    expected = gapo_step(language_logps(model), every)
    assert_close(gapo_step(language_logps(model), anchor), expected, 0)
    assert expected.gap.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_tied_head_moves_the_embedding_so_all_layers_run_again(name):
    model = tiny_models.build(name)
    layers = model.model.layers if name == "gemma2" else model.transformer.h
    anchor, runs = GeometricAnchor.from_model(model, rho=RHO, scope=1), counted_runs(model, layers)
    gapo_step(language_logps(model), anchor)
    assert runs == [0, 1, 2] * 2


@pytest.mark.parametrize("table", ["its own", "the head's", "the head's, frozen"])
def test_a_table_of_no_layer_moves_with_the_head_alone(table):
    """A parameter of the backbone itself, which the lower layers read: where it moves, they run again."""
    model = tiny_models.build("llama")
    head = model.lm_head.weight
    model.model.table = nn.Parameter(torch.randn_like(head)) if table == "its own" else head
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: output + model.model.table[args[0]])
    if "frozen" in table:
        head.requires_grad_(False)
    moves = table == "the head's"
    anchor, runs = GeometricAnchor.from_model(model, rho=RHO, scope=2), counted_runs(model, model.model.layers)
    assert any(param is model.model.table for param in anchor.params) == moves
    found = gapo_step(language_logps(model), anchor)
    assert runs == [0, 1, 2] + ([0, 1, 2] if moves else [2])
    every = GeometricAnchor(list(zip(anchor.names, anchor.params)), rho=RHO)
    assert_close(found, gapo_step(language_logps(model), every), 0)


def test_a_block_that_a_lower_layer_shares_runs_again():
    model = tiny_models.build("llama")
    model.model.layers[0].mlp = model.model.layers[2].mlp
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    assert anchor.unmoved_layers == []
    every = GeometricAnchor(list(zip(anchor.names, anchor.params)), rho=RHO)
    assert_close(gapo_step(language_logps(model), anchor), gapo_step(language_logps(model), every), 0)


def double(_, args, output=None):
    return None if output is None else output * 2


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: layer.register_forward_hook(double),
        lambda layer: layer.register_forward_pre_hook(double),
        lambda layer: layer.mlp.register_forward_hook(double),
        lambda layer: register_module_forward_hook(lambda module, *others: double(*others) if module is layer else None),
    ],
    ids=["after a layer", "before a layer", "within a layer", "global"],
)
def test_layers_with_somebodys_hooks_run_again(hook):
    """A hook that doubles a layer's output would be applied twice to an output that is replayed; one within it, not at all."""
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    handle = hook(model.model.layers[0])
    try:
        runs = counted_runs(model, model.model.layers)
        found = gapo_step(language_logps(model), anchor)
        assert runs == [0, 1, 2] * 2
        every = GeometricAnchor(list(zip(anchor.names, anchor.params)), rho=RHO)
        assert_close(found, gapo_step(language_logps(model), every), 0)
    finally:
        handle.remove()


def test_decoders_not_known_to_be_plain_run_every_layer_again(caplog):
    """Mixtral's layers also pass their routers' logits on, past what a layer returns."""
    caplog.set_level(logging.INFO, "gapo_kernels")
    transformers = pytest.importorskip("transformers")
    size = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    config = transformers.MixtralConfig(**size, **heads, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert GeometricAnchor.from_model(model, rho=RHO, scope=0).unmoved_layers == [] and not caplog.messages
    assert GeometricAnchor.from_model(model, rho=RHO, scope=2).unmoved_layers == []
    (message,) = caplog.messages
    assert "the layers below 2 run at the anchor, too: model_type 'mixtral' is none of those" in message


def test_layers_of_which_data_parallel_runs_copies_run_again(caplog):
    caplog.set_level(logging.INFO, "gapo_kernels.scope")
    model = nn.DataParallel(tiny_models.build("llama"))
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    assert anchor.unmoved_layers == [] and "run at the anchor, too: DataParallel runs copies" in caplog.messages[0]
    assert gapo_step(language_logps(model), anchor).gap.abs().max() > 0


def test_a_step_that_failed_after_its_use_of_the_anchor_is_repeated_with_the_same_noise(model, monkeypatch):
    logps = logps_fn(model, *batch())

    def new_anchor():
        return GeometricAnchor(model.named_parameters(), rho=RHO, direction="gaussian")

    expected, anchor = gapo_step(logps, new_anchor()).anchor_margin, new_anchor()
    with monkeypatch.context() as patch:
        patch.setattr(step, "_packed", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gapo_step(logps, anchor)
    assert torch.equal(gapo_step(logps, anchor).anchor_margin, expected)


def test_a_ctrl_c_at_any_line_of_a_step_leaves_nothing_behind():
    """No hook on a layer, no layer replaced; and when it is repeated, the step draws the same noise."""
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2, direction="gaussian")
    logps, before = language_logps(model), state(model)

    def counted(frame):
        # Of the step itself no line: the ends of its `with` statements are lines, but no place for a signal.
        file, is_step = frame.f_code.co_filename, frame.f_code is gapo_step.__code__
        own_context = file == contextlib.__file__ and frame.f_back.f_code is gapo_step.__code__
        return own_context or file in (step.__file__, scope.__file__) and not is_step

    def use(at):
        """The number of lines of the step and of its contexts; SIGINT comes just before line number `at`."""
        with SignalAt(at, signal.SIGINT, counted) as lines:
            gapo_step(logps, anchor)
        return lines.lines

    use(at=0)  # what is computed once, and kept
    lines, counter = use(at=0), anchor.state_dict()
    assert lines > 60
    for at in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            use(at)
        torch.set_grad_enabled(True)  # an interrupt inside torch's own no_grad leaves it off
        assert anchor.state_dict() == counter, f"line {at} of {lines}"
        assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers), at
        assert same(model, before), f"line {at} of {lines}"


def test_a_signal_in_any_of_the_steps_contexts_leaves_torch_as_it_was():
    """torch.no_grad that is not left, and the compiler's settings, would last for good. Of a handler that raises."""
    from torch._functorch import config as functorch
    from torch.compiler import config as compiler

    model = nn.Sequential(nn.Embedding(11, 3), nn.Linear(3, 11)).double()
    anchor, ids = GeometricAnchor(model.parameters(), rho=RHO), torch.randint(11, (4, 5))
    managers = (torch.no_grad, torch.inference_mode)
    places = {code for manager in managers for code in (manager.__enter__.__code__, manager.__exit__.__code__)}
    places.add(step._kept_buffers.__wrapped__.__code__)
    settings = functorch.donated_buffer, compiler.cache_key_tag
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else what the log-probs are computed in is another thread's

    def expire(signum, frame):
        raise TimeoutError

    def use(at):
        with SignalAt(at, signal.SIGTERM, lambda frame: frame.f_code in places) as lines:
            gapo_step(lambda: sequence_logps(model(ids), ids), anchor)
        return lines.lines

    before = signal.signal(signal.SIGTERM, expire)
    try:
        use(at=0)
        lines, passed = use(at=0), 0
        assert lines > 15
        for at in range(1, lines + 1):
            try:
                use(at)
            except TimeoutError:
                passed += 1
            assert torch.is_grad_enabled() and (2 * model[1].weight).requires_grad, f"line {at} of {lines}"
            assert (functorch.donated_buffer, compiler.cache_key_tag) == settings, f"line {at} of {lines}"
            torch.set_grad_enabled(True)
            functorch.donated_buffer, compiler.cache_key_tag = settings
        assert passed == lines
    finally:
        signal.signal(signal.SIGTERM, before)
        torch.set_num_threads(threads)


def test_layers_come_back_after_a_failure_at_the_anchor():
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    logps, calls = language_logps(model), []

    def failing():
        calls.append(1)
        result = logps()
        if len(calls) == 2:
            raise ValueError("at the anchor")
        return result

    with pytest.raises(ValueError, match="at the anchor"):
        gapo_step(failing, anchor)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers)


def test_more_runs_at_the_anchor_than_before_are_refused():
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    logps = language_logps(model)

    def uneven():
        return logps() if torch.is_grad_enabled() else logps() + logps()

    with pytest.raises(RuntimeError, match="ran the model more often at the anchor than before"):
        gapo_step(uneven, anchor)


def test_fewer_runs_at_the_anchor_than_before_are_refused():
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    logps = language_logps(model)
    with pytest.raises(RuntimeError, match="ran the model less often at the anchor than before"):
        gapo_step(lambda: logps() + logps() if torch.is_grad_enabled() else logps(), anchor)


@pytest.mark.parametrize("change", ["order", "size"])
def test_other_inputs_at_the_anchor_than_before_are_refused(change, monkeypatch):
    """The lower layers' outputs are replayed: for other inputs they would be wrong, and nothing else would show it."""
    model = tiny_models.build("llama")
    ids, labels = tiny_models.preference_batch()
    before = [p.clone() for p in model.parameters()]

    def of(rows):
        return sequence_logps(model(input_ids=ids[rows]).logits, labels[rows])

    def logps():
        pairs = len(ids) // 2
        halves = [slice(0, pairs), slice(pairs, None)]
        if torch.is_grad_enabled():
            return torch.cat([of(rows) for rows in halves])
        return of(slice(None)) if change == "size" else torch.cat([of(rows) for rows in halves[::-1]][::-1])

    def gap(used, k):
        return gapo_step(used, GeometricAnchor.from_model(model, rho=RHO, scope=k)).gap

    assert gap(logps, 0).isfinite().all()
    for k in (1, 2):
        with pytest.raises(RuntimeError, match="gave the model other inputs at the anchor than before"):
            gap(logps, k)
    monkeypatch.setattr(scope, "_may_wait", lambda device: False)  # a GPU: what is left is NaN
    for k in (1, 2):
        if change == "order":
            assert gap(logps, k).isnan().all()
        assert gap(lambda: of(slice(None)), k).isfinite().all()
    assert all(map(torch.equal, model.parameters(), before))


def test_layers_that_fill_a_cache_run_again():
    """A layer that is replayed would leave the second call without the first one's keys and values."""
    model = tiny_models.build("llama")
    ids, labels = tiny_models.preference_batch()

    def logps():
        prefix = model(input_ids=ids[:, :3], use_cache=True)
        rest = model(input_ids=ids[:, 3:], past_key_values=prefix.past_key_values, use_cache=True)
        return sequence_logps(torch.cat([prefix.logits, rest.logits], 1), labels)

    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    out = gapo_step(logps, anchor)
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    anchor.unmoved_layers.clear()
    assert_close(out, gapo_step(logps, anchor), 1e-12)


@pytest.mark.parametrize("what", ["model", "function"])
def test_compiled_layers_run_again(what):
    model = tiny_models.build("llama")
    anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
    expected = gapo_step(language_logps(model), anchor)
    if what == "model":
        model.compile(backend="aot_eager")
        anchor = GeometricAnchor.from_model(model, rho=RHO, scope=2)
        compiled = language_logps(model)
    else:
        compiled = torch.compile(language_logps(model), backend="aot_eager")
    for _ in range(3):
        out = gapo_step(compiled, anchor)
        out.loss.backward()
        assert_close(out, expected, 1e-12)


# ---- Dropout ----


@pytest.fixture
def dropout_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Dropout(0.5), nn.Linear(6, VOCABULARY)).double()


def test_dropout_is_refused(dropout_model):
    anchor = GeometricAnchor(dropout_model.parameters(), rho=RHO)
    before, logps = state(dropout_model), logps_fn(dropout_model, *batch(), plain_logps)
    with pytest.raises(RuntimeError, match="drew random numbers .is dropout active.*allow_dropout=True"):
        gapo_step(logps, anchor)
    assert same(dropout_model, before)
    dropout_model.eval()
    gapo_step(logps, anchor)


def test_devices_without_weights_may_draw_numbers_too(dropout_model, monkeypatch):
    """Offloaded weights lie elsewhere than what computes with them."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(str(device)) or torch.zeros(len(asked)))
    anchor = GeometricAnchor(dropout_model.eval().parameters(), rho=RHO)
    with pytest.raises(RuntimeError, match="drew random numbers"):  # so says the second state, which is another
        gapo_step(logps_fn(dropout_model, *batch(), plain_logps), anchor)
    assert sorted(set(asked)) == ["cuda:0", "cuda:1"]


def test_allowed_dropout_draws_the_same_masks_again(dropout_model):
    """With rho = 0 nothing moves: then the gap is the difference between the masks."""
    logps = logps_fn(dropout_model, *batch(), plain_logps)
    out = gapo_step(logps, GeometricAnchor(dropout_model.parameters(), rho=0.0), allow_dropout=True)
    assert (out.gap == 0).all()
    torch.manual_seed(1)
    first = gapo_step(logps, GeometricAnchor(dropout_model.parameters(), rho=RHO), allow_dropout=True)
    state_after = torch.get_rng_state()
    torch.manual_seed(1)
    clean = logps()
    assert torch.equal(torch.get_rng_state(), state_after)  # as if the step had run the model once
    assert torch.equal(torch.cat([first.chosen_logps, first.rejected_logps]), clean)
    assert (first.gap != 0).all()


@pytest.mark.parametrize("allow_dropout", [False, True])
def test_dropout_in_the_layers_below_the_scope_is_seen_whatever_the_step_seeds(allow_dropout):
    """From the second step on logps_fn leaves torch's state as it found it."""
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.5))
    logps = language_logps(model.train())

    def seeded():
        torch.manual_seed(3)
        return logps()

    anchor = GeometricAnchor.from_model(model, rho=0.0, scope=2)
    assert anchor.unmoved_layers
    for _ in range(2):
        if allow_dropout:
            assert not gapo_step(seeded, anchor, allow_dropout=True).gap.any()
            continue
        with pytest.raises(RuntimeError, match="drew random numbers"):
            gapo_step(seeded, anchor)


def test_a_shared_backward_that_falls_back_draws_the_same_masks_again(dropout_model):
    """In the second step, which keeps no graph: the first pair's log-probs are so far apart that the probe gives it no
    weight."""
    logps, gradients = logps_fn(dropout_model, *batch(), plain_logps), []
    apart = torch.zeros_like(logps().detach())
    apart[0] = 100.0
    for share_backward in (False, True):
        torch.manual_seed(1)
        anchor = GeometricAnchor(dropout_model.parameters(), rho=RHO)
        options = dict(allow_dropout=True, share_backward=share_backward)
        for offset in (0 * apart, apart):
            dropout_model.zero_grad()
            gapo_step(lambda: logps() + offset, anchor, **options).loss.backward()
        gradients.append([param.grad for param in dropout_model.parameters()])
        dropout_model.zero_grad()
    for shared, real in zip(*gradients[::-1]):
        torch.testing.assert_close(shared, real, atol=1e-12, rtol=0)


class Accelerators:
    """Stands in for torch.cuda: a random state for each device."""

    def __init__(self):
        self.states = {torch.device("cuda", number): torch.zeros(2) for number in range(2)}

    def get_rng_state(self, device):
        return self.states[device].clone()

    def set_rng_state(self, state, device):
        self.states[device] = state.clone()


@pytest.mark.parametrize("number", [0, 1])
def test_dropout_is_seen_on_every_device_of_the_weights(monkeypatch, number):
    accelerators = Accelerators()
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerators)
    randomness = step._Randomness({torch.device("cpu"), *accelerators.states})
    assert not randomness.drawn()
    state = accelerators.states[torch.device("cuda", number)]
    state += 1
    assert randomness.drawn()
    with randomness.repeated():
        assert not any(state.any() for state in accelerators.states.values())
    assert (accelerators.states[torch.device("cuda", number)] == 1).all()


# ---- What is refused ----


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(probe="gap"), ValueError, "probe must be one of 'loss', 'margin', got 'gap'"),
        (dict(loss_type="ipo"), ValueError, "loss_type must be one of 'sigmoid', 'hinge', got 'ipo'"),
        (dict(beta=0.0), ValueError, "beta must be > 0, got 0.0"),
        (dict(gamma=math.inf), ValueError, "gamma must be finite, got inf"),
        (dict(beta="2"), TypeError, "beta must be a number, got str"),
        (dict(label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (dict(sft_weight=-1.0), ValueError, "sft_weight must be >= 0, got -1.0"),
        (dict(sft_weight=0.1), ValueError, "sft_weight needs token counts.*got logps alone"),
    ],
    ids=str,
)
def test_options_out_of_range(model, anchor, options, error, message):
    with pytest.raises(error, match=message):
        gapo_step(logps_fn(model, *batch()), anchor, **options)


@pytest.mark.parametrize(
    "result, error, message",
    [
        (torch.zeros(3), ValueError, r"shape \(2B,\), chosen then rejected, got \(3,\)"),
        (torch.zeros(0), ValueError, r"shape \(2B,\), chosen then rejected, got \(0,\)"),
        (torch.zeros(2, 2), ValueError, r"shape \(2B,\), chosen then rejected, got \(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "floating-point log-probs, got a torch.int64 tensor"),
        ([0.0, 0.0], TypeError, "floating-point log-probs, got list"),
        ((torch.zeros(2), torch.ones(4)), ValueError, r"the log-probs' shape, \(2,\), got \(4,\)"),
        ((torch.zeros(2), [1, 1]), TypeError, "counts as a tensor, got list"),
        ((torch.zeros(2),), TypeError, "log-probs, or log-probs and counts, got a tuple of 1"),
        (torch.zeros(2), ValueError, "objective must have a graph"),
    ],
    ids=str,
)
def test_results_of_logps_fn_that_are_refused(anchor, result, error, message):
    with pytest.raises(error, match=message):
        gapo_step(lambda: result, anchor)


def test_a_step_without_grad_is_refused_and_without_anchor_it_is_an_evaluation(model, anchor):
    ids, labels = batch()
    with torch.no_grad():
        with pytest.raises(ValueError, match="computed under no_grad"):
            gapo_step(logps_fn(model, ids, labels), anchor)
        out = gapo_step(logps_fn(model, ids, labels), None)
    assert_close(out, reference.fused_gapo_loss(model(ids), labels), 1e-13)


def test_plain_steps_warn_of_nothing(model, anchor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gapo_step(logps_fn(model, *batch()), anchor).loss.backward()
