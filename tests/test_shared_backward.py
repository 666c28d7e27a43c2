"""`gapo_step(share_backward=True)`: an ordinary step's gradients, without a second pass through the activations."""

import copy
import signal
import weakref
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from signalled import SignalAt
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gapo_kernels import (
    GeometricAnchor,
    gapo_step,
    interrupts,
    linear_sequence_logps,
    sequence_logps,
    shared_backward,
)

RHO = 0.3


def eager_logps(logits, labels):
    kept = labels[:, 1:] != -100
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    return (logps * kept).sum(1) / kept.sum(1).clamp(min=1), kept.sum(1)


def through(head, model, ids, labels):
    """() -> (logps, counts), by way of each head."""
    if head == "linear":
        softcap = getattr(model.config, "final_logit_softcapping", None)

        def logps():
            hidden = model.base_model(ids).last_hidden_state
            return linear_sequence_logps(hidden, model.lm_head.weight, labels, softcap=softcap, return_counts=True)

        return logps
    if head == "logits":
        return lambda: sequence_logps(model(ids).logits, labels, return_counts=True)
    return lambda: eager_logps(model(ids).logits, labels)


def stepped(model, logps, shared, scope="backbone", upstream=1.0, anchor=None, autocast=False, **options):
    """The step's output, and every parameter's gradient."""
    model.zero_grad()
    anchor = anchor or GeometricAnchor.from_model(model, scope=scope, rho=RHO)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = gapo_step(logps, anchor, share_backward=shared, **options)
    assert all(param.grad is None for param in model.parameters())
    (out.loss * upstream).backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    for one, other in zip(found[0], expected[0]):
        torch.testing.assert_close(one.detach(), other.detach(), atol=0, rtol=0)  # nothing but the gradients differs
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        largest = gradient.abs().max()
        torch.testing.assert_close(found[1][name], gradient, atol=tolerance * largest, rtol=0, msg=name)


# transformers computes the norms of Llama and Gemma-2 in float32: two orders of the same sums differ by its rounding.
TOLERANCE = {"llama": 1e-5, "gemma2": 1e-5, "gpt2": 1e-12}
OPTIONS = [
    {},
    dict(probe="margin", scope="all"),
    dict(sft_weight=0.3, label_smoothing=0.1, upstream=-2.5),
    dict(loss_type="hinge", beta=1.2, gamma=0.2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head", ["linear", "logits", "eager"])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_gradients_are_those_of_an_ordinary_step(name, head, options):
    model = tiny_models.build(name)
    logps = through(head, model, *tiny_models.preference_batch())
    expected = stepped(model, logps, False, **options)
    assert_same(stepped(model, logps, True, **options), expected, TOLERANCE[name])


@pytest.mark.parametrize("probe", ["loss", "margin"])
def test_in_float64_to_the_last_digits(probe):
    """Beside the model's own float32 there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 11)).double()
    ids, labels = (torch.randint(11, (10, 7)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def logps():
        return sequence_logps(model(ids), labels)

    expected = stepped(model, logps, False, anchor=anchor, probe=probe)
    assert_same(stepped(model, logps, True, anchor=anchor, probe=probe), expected, 1e-13)


class Products(TorchDispatchMode):
    """Counts multiplications of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def test_the_final_backward_is_one_product_for_each_weight():
    """A real one has two for each, and attention's."""
    model = tiny_models.build("llama")
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    logps = through("eager", model, *tiny_models.preference_batch())
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    counts = []
    for _ in range(2):  # the first step also compares
        with Products() as whole:
            out = gapo_step(logps, anchor, share_backward=True)
        with Products() as products:
            out.loss.backward()
        counts.append((whole.count, products.count))
    assert counts[1][1] == counts[0][1] == layers
    assert counts[0][0] - counts[1][0] > 2 * layers


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_bfloat16_loses_no_more_than_an_ordinary_step(name):
    exact, model = tiny_models.build(name), tiny_models.build(name, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    batch = tiny_models.preference_batch(pairs=8)
    anchor_margin = torch.linspace(-0.5, 0.5, 8)
    # The anchor's margins given, that the two differ in the gradients alone.
    results = []
    for owner, shared in ((exact, False), (model, False), (model, True)):
        logps = through("eager", owner, *batch)
        runs = []

        def with_margin(logps=logps, runs=runs):
            found, counts = logps()
            runs.append(found)
            return (found, counts) if len(runs) % 2 else (torch.cat([anchor_margin, 0 * anchor_margin]), counts)

        results.append(stepped(owner, with_margin, shared)[1])
    truth, ordinary, shared = ({n: g.double() for n, g in gradients.items()} for gradients in results)
    errors = [sum((g[n] - truth[n]).square().sum() for n in truth).sqrt() for g in (ordinary, shared)]
    assert 0 < errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("around", [False, True])
def test_autocast_with_float32_masters(around):
    model = tiny_models.build("llama", torch.float32)
    batch = tiny_models.preference_batch()

    def logps():
        with torch.autocast("cpu", torch.bfloat16) if not around else nullcontext():
            return through("logits", model, *batch)()

    options = dict(anchor=GeometricAnchor.from_model(model, rho=3.0, compute_dtype=torch.bfloat16), autocast=around)
    expected = stepped(model, logps, False, **options)
    options["anchor"].load_state_dict({"step": 0, "seed": 0})
    assert_same(stepped(model, logps, True, **options), expected, 0.05)


def test_frozen_parts_and_an_inert_pair():
    model = tiny_models.build("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    ids, labels = tiny_models.preference_batch()
    labels[4] = -100
    logps = through("linear", model, ids, labels)
    expected = stepped(model, logps, False)
    found = stepped(model, logps, True)
    assert_same(found, expected, TOLERANCE["llama"])
    assert not found[0].valid[1] and "model.embed_tokens.weight" not in found[1]


def test_adapters_alone():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_models.build("llama"), config).double()
    ids, labels = tiny_models.preference_batch()

    def logps():
        return sequence_logps(model(ids).logits, labels)

    expected = stepped(model, logps, False)
    assert_same(stepped(model, logps, True), expected, TOLERANCE["llama"])


def test_micro_batches_accumulate_and_steps_repeat():
    model = tiny_models.build("llama")
    results = []
    for shared in (False, True, True):
        model.zero_grad()
        anchor = GeometricAnchor.from_model(model, rho=RHO)
        for pairs in (2, 3):
            logps = through("linear", model, *tiny_models.preference_batch(pairs))
            gapo_step(logps, anchor, share_backward=shared).loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*two) for two in zip(*results[1:]))
    for one, other in zip(*results[:2]):
        torch.testing.assert_close(one, other, atol=1e-5 * other.abs().max(), rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_probe_without_weight_is_not_divided_by(name):
    """Margins so large that the probe's loss has no gradient left: then there is a real backward, of a second clean
    forward where the first one's graph was not kept."""
    model = tiny_models.build(name)
    inner = through("linear", model, *tiny_models.preference_batch())
    offset, calls = torch.zeros(6), []

    def logps():
        calls.append(torch.is_grad_enabled())
        found, counts = inner()
        return found + offset, counts

    anchor = GeometricAnchor.from_model(model, rho=RHO)
    stepped(model, logps, True, anchor=anchor)
    offset[1] = 200
    expected = stepped(model, logps, False)
    calls.clear()
    assert_same(stepped(model, logps, True, anchor=anchor), expected, 0)
    assert calls == [True, False, True]


def test_the_graph_is_not_kept():
    """Beside the inputs of layers nothing of it is there between probe and backward."""
    model = tiny_models.build("llama")
    ids, labels = tiny_models.preference_batch()
    kept = []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            big = torch.empty(1000)
            kept.append(weakref.ref(big))
            ctx.save_for_backward(big)
            return hidden.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.saved_tensors
            return gradient

    model.model.layers[1].register_forward_hook(lambda module, args, output: Kept.apply(output))
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    for shared, alive in ((True, False), (True, False), (False, True)):
        out = gapo_step(lambda: sequence_logps(model(ids).logits, labels), anchor, share_backward=shared)
        assert (kept[-2]() is not None) == alive, "of the run with grad; the anchor's came after it"
        out.loss.backward()


def test_nothing_to_share_without_a_probe():
    model = tiny_models.build("gpt2")
    logps = through("linear", model, *tiny_models.preference_batch())
    for make in (lambda: None, lambda: GeometricAnchor.from_model(model, direction="gaussian")):
        gradients = []
        for shared in (False, True):
            model.zero_grad()
            gapo_step(logps, make(), share_backward=shared).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(*two) for two in zip(*gradients))


def test_a_second_backward_is_refused():
    model = tiny_models.build("gpt2")
    logps = through("linear", model, *tiny_models.preference_batch())
    out = gapo_step(logps, GeometricAnchor.from_model(model), share_backward=True)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward"):
        out.loss.backward()


# ---- What cannot be shared ----


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_function_that_stops_the_gradient():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)]).double()
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def logps():
        hidden = model[0](ids)
        return sequence_logps(model[2](hidden + Stopped.apply(model[1](hidden))), labels)

    expected = stepped(model, logps, False, anchor=anchor)
    assert_same(stepped(model, logps, True, anchor=anchor), expected, 1e-13)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum((0, 1))


def refused_logps(what, model, ids, labels):
    if what == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if what == "compiled":
        compiled = torch.compile(model, backend="aot_eager")
        return lambda: sequence_logps(compiled(ids).logits, labels)
    if what == "packed":
        ends = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        return lambda: sequence_logps(model(ids.view(1, -1)).logits[0], labels.flatten(), cu_seqlens=ends)
    if what == "foreign function":
        norm = model.model.norm
        norm.forward = lambda x: Doubled.apply(x, norm.weight)
    return lambda: sequence_logps(model(ids, use_cache=False).logits, labels)


@pytest.mark.parametrize(
    "what, message",
    [
        ("checkpointed", "checkpointed or offloaded"),
        ("compiled", "compiled, reentrantly checkpointed"),
        ("packed", "the 6 sequences as their first dimension"),
        ("foreign function", "another library's own function"),
        ("scope", "the probe's backward stops before it"),
        ("float16", "float16"),
    ],
)
def test_what_is_refused(what, message):
    model = tiny_models.build("llama", torch.float16 if what == "float16" else torch.float64)
    before = copy.deepcopy(model.state_dict())
    anchor = GeometricAnchor.from_model(model, scope=1 if what == "scope" else "backbone")
    logps = refused_logps(what, model, *tiny_models.preference_batch())
    with pytest.raises(NotImplementedError, match=message):
        gapo_step(logps, anchor, share_backward=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert anchor.state_dict()["step"] == 0
    gapo_step(logps, anchor).loss.backward()  # and without it there is nothing wrong


class Mixing(nn.Module):
    """Whose sequences have a part in one another, or change places."""

    def __init__(self, what):
        super().__init__()
        self.what, self.embedding, self.head = what, nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, ids):
        hidden = self.embedding(ids)
        if self.what == "normalised over the batch":
            hidden = hidden / hidden.square().mean(0, keepdim=True).sqrt()
        if self.what == "in another order":
            return self.head(hidden.flip(0)).flip(0)
        return self.head(hidden)


@pytest.mark.parametrize("what", ["normalised over the batch", "in another order", "not at all"])
def test_sequences_that_are_not_apart_are_seen(what):
    torch.manual_seed(0)
    model = Mixing(what).double()
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def step():
        return gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)

    if what == "not at all":
        return step().loss.backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mixes the sequences"):
            step()
    assert anchor.state_dict()["step"] == 0


class Leaking(nn.Module):
    """Each sequence's first row gets something of the last one of the sequence before."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(11, 32), nn.Linear(32, 32), nn.Linear(32, 11)

    def forward(self, ids):
        rows = self.layer(self.embedding(ids)).tanh().flatten(0, 1)
        return self.head((rows + torch.cat([0 * rows[:1], rows[:-1]])).view(*ids.shape, -1).cumsum(1))


@pytest.mark.parametrize("dtype, sequences", [(torch.float32, 128), (torch.bfloat16, 8), (torch.bfloat16, 32)])
def test_neighbours_of_many_are_told_apart(dtype, sequences):
    torch.manual_seed(0)
    model = Leaking().to(dtype)
    ids, labels = (torch.randint(11, (sequences, 12)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=0.05)
    with pytest.raises(RuntimeError, match="mixes the sequences"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


class Swapping(nn.Module):
    """In which two sequences change places."""

    def __init__(self, sequences, one, other):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.order = torch.arange(sequences)
        self.order[[one, other]] = self.order[[other, one]]

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids[self.order])).tanh())[self.order]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sequences, one, other", [(s, 0, o) for s in (2, 4, 6, 16) for o in {1, s // 2, s - 1}])
def test_any_two_that_change_places_are_seen_in_the_first_step(sequences, one, other, dtype):
    torch.manual_seed(0)
    model = Swapping(sequences, one, other).to(dtype)
    ids, labels = (torch.randint(11, (sequences, 9)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)
    with pytest.raises(RuntimeError, match="orders them in another way"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


def test_hooks_on_all_parameters_hide_nothing_and_stay():
    torch.manual_seed(0)
    model = Mixing("normalised over the batch").double()
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    anchor, seen = GeometricAnchor(model.named_parameters(), rho=RHO), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.append(name))
    with pytest.raises(RuntimeError, match="mixes the sequences"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)
    seen.clear()
    model.what = "not at all"
    gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True).loss.backward()
    assert sorted(seen) == sorted(2 * [name for name, _ in model.named_parameters()])  # the probe's, and the final one


def test_a_graph_that_changes_beside_the_parameters_is_compared_again():
    torch.manual_seed(0)
    model = Mixing("not at all").double()
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    for _ in range(2):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True).loss.backward()
    model.what = "normalised over the batch"
    with pytest.raises(RuntimeError, match="mixes the sequences"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


class Averaging(nn.Module):
    """Adds a share of the batch's mean: nothing at first, in a graph that has it nevertheless."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.share = nn.Embedding(11, 6), nn.Linear(6, 11), 0.0

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.head(hidden + self.share * hidden.mean(0, keepdim=True))


@pytest.mark.parametrize("number", [4, 16])
def test_sequences_that_are_mixed_later_are_seen(number):
    """At the latest in the next step that is compared, though the graph's form stays the same."""
    torch.manual_seed(0)
    model = Averaging().double()
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def step():
        return gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)

    for _ in range(number - 1):
        step().loss.backward()
    model.share = 1.0
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mixes the sequences"):
            step()
    assert anchor.state_dict()["step"] == number - 1


class Adapted(nn.Module):
    """Statistics of the batch, seen by nobody while `up` is zeros."""

    def __init__(self):
        super().__init__()
        self.embedding, self.down, self.up, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        nn.init.zeros_(self.up.weight)

    def forward(self, ids):
        hidden = self.embedding(ids)
        inner = self.down(hidden)
        return self.head(hidden + self.up(inner / inner.square().mean(0, keepdim=True).sqrt()))


def test_what_begins_as_zeros_is_compared_again():
    torch.manual_seed(0)
    model = Adapted().double()
    ids, labels = (torch.randint(11, (6, 7)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)
    gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True).loss.backward()
    assert not model.down.weight.grad.any()
    nn.init.normal_(model.up.weight)
    with pytest.raises(RuntimeError, match="mixes the sequences"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)], ids=str)
def test_a_signal_at_any_line_of_the_comparison_leaves_no_hook(signals, monkeypatch):
    """One that stayed would make every later gradient of its parameter zeros. Whoever raises: a second Ctrl-C, a timeout."""
    torch.manual_seed(0)
    model = Mixing("not at all").double()
    next(model.parameters()).register_hook(lambda gradient: None)  # somebody's own, which stays

    def expire(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, expire)
    monkeypatch.setattr(signal, "raise_signal", lambda _, one=signal.raise_signal: [one(signum) for signum in signals])
    ids, labels = (torch.randint(11, (4, 5)) for _ in range(2))

    def use(at):
        """The number of lines of the comparison; SIGINT comes just before line number `at`."""
        anchor, files = GeometricAnchor(model.named_parameters(), rho=RHO), (shared_backward.__file__, interrupts.__file__)
        logps = sequence_logps(model(ids), labels)
        sharing = shared_backward.SharedBackward(logps, anchor, anchor.params)
        with sharing.recorded():
            torch.autograd.grad(logps.sum(), anchor.params, retain_graph=True)
        with SignalAt(at, signal.SIGINT, lambda frame: frame.f_code.co_filename in files) as lines:
            sharing.compare(logps)
        return lines.lines

    try:
        lines = use(at=0)
        assert lines > 40
        for at in range(1, lines + 1):
            try:
                use(at)
            except KeyboardInterrupt:
                pass
            hooks = [dict(param._backward_hooks or {}) for param in model.parameters()]
            assert len(hooks[0]) == 1 and not any(hooks[1:]), f"line {at} of {lines}"
            assert torch.is_grad_enabled(), f"line {at} of {lines}"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sequences_that_one_batch_alone_has_in_another_order_are_seen():
    """Interleaved inside of the model: chosen, rejected, chosen, ... is the order of one pair, not of three."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def step(pairs):
        ids, labels = (torch.randint(11, (2 * pairs, 7)) for _ in range(2))
        order = torch.arange(2 * pairs).view(2, pairs).t().flatten()
        logps = lambda: sequence_logps(model(ids[order])[order.argsort()], labels)  # noqa: E731
        return gapo_step(logps, anchor, share_backward=True)

    step(1).loss.backward()
    with pytest.raises(RuntimeError, match="mixes the sequences"):
        step(3)


def test_rows_of_no_sequence_are_refused():
    """The head on the predicting rows alone: nothing in the graph says whose they are, whatever their number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()
    ids, labels = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    kept = torch.ones(4, 8, dtype=torch.bool)

    def logps():
        logits = model[1](model[0](ids)[kept])
        return logits.log_softmax(-1).gather(-1, labels[kept][:, None]).view(4, 8).mean(1)

    with pytest.raises(NotImplementedError, match="MmBackward0|AddmmBackward0"):
        gapo_step(logps, GeometricAnchor(model.named_parameters()), share_backward=True)


class Tables(nn.Module):
    """Parameters as activations: of each sequence, by their number alone."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(6, 6, 11)) for _ in range(2))
        self.log_scale, self.head, self.what = nn.Parameter(torch.zeros(6)), nn.Linear(6, 11), what

    def forward(self, ids):
        if self.what == "a sum of two":
            return self.a + self.b
        return self.head(nn.functional.one_hot(ids, 11)[..., :6] * self.log_scale.exp()) + self.a


@pytest.mark.parametrize("what", ["a sum of two", "a function of one"])
def test_what_is_made_of_parameters_alone_is_no_activation(what):
    """Here as many heads, or rows, as sequences."""
    torch.manual_seed(0)
    model = Tables(what).double()
    ids, labels = (torch.randint(11, (6, 6)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)
    with pytest.raises(NotImplementedError, match="no activation enters it"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


def test_without_a_graph_there_is_nothing_to_share():
    model = Mixing("not at all")
    ids, labels = (torch.randint(11, (4, 5)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)
    with torch.no_grad(), pytest.raises(ValueError, match="the objective must have a graph"):
        gapo_step(lambda: sequence_logps(model(ids), labels), anchor, share_backward=True)


class Positions(nn.Module):
    """As nanoGPT has them: an embedding (T, C) added to one (S, T, C), here with T = S."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(8, 6), nn.Linear(6, 11)

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))


class Prompted(nn.Module):
    """A prompt that is learnt, a weight in another form, and a sparse embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.prompt = nn.Embedding(11, 6, sparse=True), nn.Parameter(torch.randn(1, 1, 6))
        self.scale, self.head = nn.Parameter(torch.ones(6, 1)), nn.Linear(6, 11)

    def forward(self, ids):
        hidden = torch.cat([self.prompt.expand(len(ids), -1, -1), self.tokens(ids)[:, 1:]], 1)
        return self.head(torch.tanh(hidden * (2.0 * self.scale.squeeze(1))).cumsum(1))


@pytest.mark.parametrize("make", [Positions, Prompted])
def test_parameters_in_other_places(make):
    torch.manual_seed(0)
    model = make().double()
    ids, labels = (torch.randint(11, (6, 6)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def logps():
        return sequence_logps(model(ids), labels)

    results = []
    for shared in (False, True):
        _, gradients = stepped(model, logps, shared, anchor=anchor)
        results.append({name: g.to_dense() for name, g in gradients.items()})
    assert results[0].keys() == results[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-13, rtol=0, msg=name)


# With factors and signs of their own: x (S, T, 6), w (6, 6), b (6,).
FACTORS = {
    "addmm(alpha, beta)": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, alpha=0.3, beta=0.7).view(x.shape),
    "addmm of w.T": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=-0.3, beta=-0.7).view(x.shape),
    "add(x, b, alpha)": lambda x, w, b: torch.add(x @ w, b, alpha=-0.5),
    "add(b, x, alpha)": lambda x, w, b: torch.add(b, x @ w, alpha=-0.5),
    "x - b": lambda x, w, b: x @ w - b,
    "b - x": lambda x, w, b: b - x @ w,
    "sub(x, b, alpha)": lambda x, w, b: torch.sub(x @ w, b, alpha=0.3),
    "x + (-b)": lambda x, w, b: x @ -w + -b,
    "x * (-b)": lambda x, w, b: (x @ w) * -b,
    "x * add(1, b, alpha)": lambda x, w, b: (x @ w) * torch.add(torch.ones(6), b, alpha=-0.5),
    "x * add(b, 1, alpha)": lambda x, w, b: (x @ w) * torch.add(b, torch.ones(6), alpha=-0.5),
}


class Factored(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use, self.embedding, self.head = use, nn.Embedding(11, 6), nn.Linear(6, 11)
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, ids):
        return self.head(torch.tanh(self.use(self.embedding(ids), self.w, self.b)))


@pytest.mark.parametrize("use", FACTORS)
def test_factors_and_signs_of_parameters(use):
    torch.manual_seed(0)
    model = Factored(FACTORS[use]).double()
    ids, labels = (torch.randint(11, (6, 5)) for _ in range(2))
    anchor = GeometricAnchor(model.named_parameters(), rho=RHO)

    def logps():
        return sequence_logps(model(ids), labels)

    expected = stepped(model, logps, False, anchor=anchor)
    assert len(expected[1]) == 5
    for _ in range(2):  # the first step compares
        assert_same(stepped(model, logps, True, anchor=anchor), expected, 1e-13)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_gradients_of_some_parameters(name):
    model = tiny_models.build(name)
    logps = through("logits", model, *tiny_models.preference_batch())
    anchor = GeometricAnchor.from_model(model, rho=RHO)
    _, expected = stepped(model, logps, False, anchor=anchor)
    chosen = {n: p for n, p in model.named_parameters() if ".1." in n or "norm" in n or "ln_f" in n}
    model.zero_grad()
    out = gapo_step(logps, anchor, share_backward=True)
    for n, gradient in zip(chosen, torch.autograd.grad(out.loss, list(chosen.values()))):
        torch.testing.assert_close(gradient, expected[n], atol=1e-5 * expected[n].abs().max(), rtol=0)
    gapo_step(logps, anchor, share_backward=True).loss.backward(inputs=list(chosen.values()))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == chosen.keys()


def test_hooks_on_parameters_act_once():
    model = tiny_models.build("gpt2")
    mask = torch.zeros_like(model.transformer.wte.weight)
    mask[::2] = 1
    model.transformer.wte.weight.register_hook(lambda gradient: gradient * mask)
    logps = through("logits", model, *tiny_models.preference_batch())
    expected = stepped(model, logps, False)
    assert_same(stepped(model, logps, True), expected, 1e-12)
    assert not expected[1]["transformer.wte.weight"][1::2].any()


def test_what_was_modified_since_the_step_is_seen():
    model = tiny_models.build("gpt2")
    ids, labels = tiny_models.preference_batch()
    out = gapo_step(through("logits", model, ids, labels), GeometricAnchor.from_model(model), share_backward=True)
    ids.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place since the step"):
        out.loss.backward()


def test_log_probs_that_are_a_nodes_second_output():
    model = tiny_models.build("gpt2")
    ids, labels = tiny_models.preference_batch()

    def logps():
        found = eager_logps(model(ids).logits, labels)[0]
        return torch.stack([found.detach(), found]).unbind()[1]

    expected = stepped(model, logps, False)
    assert_same(stepped(model, logps, True), expected, 1e-12)


def test_a_flag_is_a_flag():
    with pytest.raises(TypeError, match="share_backward must be True or False, got 'yes'"):
        gapo_step(lambda: None, None, share_backward="yes")
