"""`GeometricAnchor`: where the weights go, that they come back bit for bit, what is counted and what is refused."""

import gc
import itertools
import math
import os
import random
import signal
import threading
import weakref

import pytest
import tiny_models
import torch
from signalled import SignalAt
from torch import nn

from gapo_kernels import GeometricAnchor, dense, displacement, gapo_step, interrupts, perturbation

AWKWARD = [-0.0, 0.0, 5e-324, 1e-38, -1e-30, 1.0]  # what arithmetic on the way back would not reproduce


def bits(params):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [param.detach().clone().view(integers[param.element_size()]) for param in params]


def same(params, saved):
    return all(torch.equal(one, other) for one, other in zip(bits(params), saved))


def make_params(dtype=torch.float64, shapes=((3, 4), (6,), (2, 5))):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    params[1].data.copy_(torch.tensor(AWKWARD, dtype=torch.float64))
    return params


def make_grads(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


@pytest.fixture
def params():
    return make_params()


@pytest.fixture
def anchor(params):
    return GeometricAnchor(params, rho=0.1)


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """As in a terminal: a job that a script starts in the background inherits SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    torch.set_grad_enabled(True)  # an interrupt inside torch's own no_grad would leave it off for the tests that follow


# ---- Where the weights go ----


def deltas(params, grads, rho, geometry):
    """GAPO.md, section 3, in float64."""
    theta, grads = [p.detach().double() for p in params], [g.double() for g in grads]
    scaled = [t * g for t, g in zip(theta, grads)] if geometry == "asam" else grads
    norm = torch.cat([s.flatten() for s in scaled]).norm()
    step = rho / (norm + 1e-12)
    return norm, [(t**2 * g if geometry == "asam" else g) * step for t, g in zip(theta, grads)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("geometry", ["asam", "sam"])
def test_the_weights_are_at_theta_plus_delta_and_the_stats_say_so(geometry, dtype, tolerance):
    params = make_params(dtype)
    grads, before = make_grads(params), bits(params)
    given = [grad.clone() for grad in grads]
    anchor = GeometricAnchor(params, rho=0.1, geometry=geometry)
    norm, expected = deltas(params, grads, 0.1, geometry)
    theta = [p.detach().double().clone() for p in params]
    with anchor.perturbed(grads=grads) as entered:
        assert entered is anchor
        moved = [p.detach().double().clone() for p in params]
    assert same(params, before)
    assert all(torch.equal(*two) for two in zip(grads, given))
    for at, t, delta in zip(moved, theta, expected):
        torch.testing.assert_close(at, t + delta, atol=tolerance, rtol=tolerance)
    applied = torch.cat([(at - t).flatten() for at, t in zip(moved, theta)])
    assert anchor.stats.grad_norm == pytest.approx(norm.item(), rel=tolerance)
    intended = torch.cat([delta.flatten() for delta in expected]).norm().item()
    assert anchor.stats.intended_norm == pytest.approx(intended, rel=tolerance)
    assert anchor.stats.applied_norm == pytest.approx(applied.norm().item(), rel=tolerance)
    assert anchor.stats.changed_fraction == applied.count_nonzero().item() / applied.numel()
    assert f"grad_norm={norm:.6g}" in repr(anchor.stats)
    if geometry == "sam":
        assert anchor.stats.intended_norm == pytest.approx(0.1, rel=tolerance)


def test_an_objective_gives_the_gradients_and_keeps_its_graph(params, anchor):
    objective = sum((p**3).sum() for p in params)
    before = bits(params)
    expected = deltas(params, [3 * p.detach() ** 2 for p in params], 0.1, "asam")[1]
    theta = [p.detach().clone() for p in params]
    with anchor.perturbed(objective):
        for p, t, delta in zip(params, theta, expected):
            torch.testing.assert_close(p.detach(), t + delta, atol=1e-14, rtol=0)
    assert same(params, before) and all(p.grad is None for p in params)
    objective.backward()  # saved theta itself; the move has gone unseen
    assert all(torch.equal(p.grad, 3 * p.detach() ** 2) for p in params)


def test_without_retain_graph_the_graph_is_freed(params, anchor):
    objective = sum((p**3).sum() for p in params)
    with anchor.perturbed(objective, retain_graph=False):
        pass
    with pytest.raises(RuntimeError, match="second time"):
        objective.backward()


def test_the_norm_of_a_large_float32_matrix_is_right():
    # One float32 sum over this many elements is off by 2e-3 on CPUs, and delta with it.
    param = nn.Parameter(torch.randn(49152, 576, generator=torch.Generator().manual_seed(0)))
    anchor = GeometricAnchor([param], rho=0.05, geometry="sam")
    with anchor.perturbed(grads=[param.detach()]):
        pass
    assert anchor.stats.grad_norm == pytest.approx(param.detach().double().square().sum().sqrt().item(), rel=1e-7)
    assert anchor.stats.intended_norm == pytest.approx(0.05, rel=1e-6)


def test_given_gradients_may_be_other_weights():
    """Which move first."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(20, generator=generator, dtype=torch.float64)
    params = [nn.Parameter(memory[:8]), nn.Parameter(memory[8:16])]
    grads = [memory[8:16], torch.from_numpy(memory.numpy()[4:12])]
    theta, given = ([tensor.detach().clone() for tensor in tensors] for tensors in (params, grads))
    norm = torch.stack([one * other for one, other in zip(theta, given)]).norm()
    with GeometricAnchor(params, rho=0.5).perturbed(grads=grads):
        for param, one, other in zip(params, theta, given):
            torch.testing.assert_close(param.detach(), one + 0.5 * one**2 * other / norm, atol=1e-12, rtol=0)
    assert all(torch.equal(param, one) for param, one in zip(params, theta))


def test_bfloat16_to_nearest_hardly_moves():
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(200, 300, generator=generator).bfloat16())
    grad = torch.randn(200, 300, generator=generator).bfloat16()
    anchor = GeometricAnchor([param], rho=0.05, rounding="nearest")
    before, theta = bits([param]), param.detach().float()
    norm, (delta,) = deltas([param], [grad], 0.05, "asam")
    with anchor.perturbed(grads=[grad]):
        assert torch.equal(param.detach(), (theta + delta.float()).bfloat16())
        applied = param.detach().double() - theta.double()
    assert same([param], before)
    assert anchor.stats.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert anchor.stats.intended_norm == pytest.approx(delta.norm().item(), rel=1e-6)
    assert anchor.stats.applied_norm == pytest.approx(applied.norm().item(), rel=1e-6)
    assert anchor.stats.changed_fraction == (applied != 0).double().mean().item() < 0.01
    assert anchor.stats.applied_norm < anchor.stats.intended_norm / 2


@pytest.mark.parametrize("geometry", ["asam", "sam"])
def test_a_radius_of_zero_moves_nothing(params, geometry):
    anchor = GeometricAnchor(params, rho=0.0, geometry=geometry)
    with anchor.perturbed(grads=make_grads(params)):
        assert all(torch.equal(p.detach(), q) for p, q in zip(params, make_params()))
    assert anchor.stats.applied_norm == anchor.stats.changed_fraction == 0 < anchor.stats.grad_norm


def test_gradients_of_zero_move_nothing(params, anchor):
    before = bits(params)
    with anchor.perturbed(grads=[torch.zeros_like(p) for p in params]):
        pass
    assert anchor.stats.grad_norm == anchor.stats.intended_norm == 0 and same(params, before)


def test_views_and_transposed_parameters():
    storage = torch.randn(8, 6, dtype=torch.float64)
    params = [nn.Parameter(storage[::2, 1:].t()), nn.Parameter(storage[1::2, :3])]
    assert not any(p.is_contiguous() for p in params)
    grads, whole = make_grads(params), storage.clone()
    theta = [p.detach().clone() for p in params]
    _, expected = deltas(params, grads, 0.5, "asam")
    with GeometricAnchor(params, rho=0.5).perturbed(grads=grads):
        for p, t, delta in zip(params, theta, expected):
            torch.testing.assert_close(p.detach(), t + delta, atol=1e-15, rtol=0)
    assert torch.equal(storage, whole)


@pytest.mark.parametrize("at_once", [1, 200, 2**24])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_gradient_in_another_order_of_memory_is_put_in_the_parameters_where_it_lies(order, at_once, monkeypatch):
    monkeypatch.setattr(dense, "REORDERED_AT_ONCE", at_once)
    found, start, clone, cloned = [], perturbation.Perturbation.__init__, torch.Tensor.clone, [0]

    def recording(self, moves, *arguments):
        found.extend(moves)
        start(self, moves, *arguments)

    param = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))
    back = [order.index(dim) for dim in range(3)]
    factor = torch.randn([param.shape[dim] for dim in order], dtype=torch.float64).permute(back)
    (gradient,) = torch.autograd.grad((param * factor).sum(), [param])
    assert gradient.stride() == factor.stride() and torch.equal(gradient, factor)
    theta, before = param.detach().clone(), bits([param])
    _, (expected,) = deltas([param], [factor], 0.5, "asam")
    anchor, objective = GeometricAnchor([param], rho=0.5), (param * factor).sum()
    monkeypatch.setattr(perturbation.Perturbation, "__init__", recording)
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: cloned.append(tensor.numel()) or clone(tensor))
    with anchor.perturbed(objective):
        torch.testing.assert_close(param.detach(), theta + expected, atol=1e-15, rtol=0)
    largest = max(cloned)
    assert same([param], before)
    assert [move.original.data_ptr() for move in found] == [move.direction.data_ptr() for move in found]
    if order == (0, 2, 1):  # three matrices, of 160 bytes each
        assert largest == (60 if at_once == 2**24 else 20)


@pytest.mark.parametrize("at_once", [8, 96, 200, 1000])
@pytest.mark.parametrize(
    "shape, turned", [((6, 10), 1), ((12, 35), 1), ((35, 12), 1), ((4, 3, 10), 1), ((4, 3, 10), 2), ((1, 8, 9), 2)]
)
def test_a_matrix_is_transposed_in_its_own_memory(shape, turned, at_once, monkeypatch):
    monkeypatch.setattr(dense, "REORDERED_AT_ONCE", at_once)
    count = math.prod(shape)
    order = [*range(turned, len(shape)), *range(turned)]  # of the dimensions, from the outermost on
    back = [order.index(dim) for dim in range(len(shape))]
    held = torch.arange(3.0 + count)[3:].view([shape[dim] for dim in order]).permute(back)
    before, wanted = held.clone(memory_format=torch.contiguous_format), torch.empty(shape).stride()
    cloned, make = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: cloned.append(tensor) or make(tensor))
    found, exclusive = dense.ordered_as(wanted, held, exclusive=True)
    assert found.stride() == wanted and torch.equal(found, before) and exclusive and found.data_ptr() == held.data_ptr()
    shorter = 4 * min(math.prod(shape[:turned]), math.prod(shape[turned:]))  # side, in bytes
    assert len(cloned) == (at_once < shorter or at_once >= 4 * count)


def test_a_parameter_whose_elements_share_memory_is_refused():
    row = torch.randn(6, dtype=torch.float64)
    before, params = row.clone(), [nn.Parameter(torch.randn(2)), nn.Parameter(row.expand(4, 6))]
    with pytest.raises(ValueError, match=r"parameter 1 of the anchor, of shape \(4, 6\), was expanded"):
        with GeometricAnchor(params, rho=0.5).perturbed(grads=[torch.ones_like(p) for p in params]):
            pytest.fail("entered")
    assert torch.equal(row, before)


def test_two_parameters_in_the_same_memory_are_refused():
    storage = torch.randn(6, dtype=torch.float64)
    before = storage.clone()
    for shared in ([storage, storage], [storage[:4], storage[3:]], [storage[4:], storage]):
        params = [nn.Parameter(part) for part in shared]
        with pytest.raises(ValueError, match="parameters . and . of the anchor, of shapes .* share memory"):
            with GeometricAnchor(params, rho=0.5).perturbed(grads=[torch.ones_like(p) for p in params]):
                pytest.fail("entered")
        assert torch.equal(storage, before)
    matrix = torch.randn(3, 8, dtype=torch.float64)
    for shared in (
        [matrix[:, ::2], matrix[:, ::2]],
        [matrix, matrix[:, :4]],
        [matrix[:, :5], matrix[:, 3:]],
        [matrix[:, :3], matrix[:, 3:6], matrix[2, 5:]],
    ):
        with pytest.raises(ValueError, match="share memory"):
            params = [nn.Parameter(part) for part in shared]
            with GeometricAnchor(params, rho=0.5).perturbed(grads=[torch.ones_like(p) for p in params]):
                pytest.fail("entered")
    apart = [nn.Parameter(part) for part in (matrix[:, :3], matrix[:, 3:6], matrix[1, 6:], matrix[2, 6:7])]
    with GeometricAnchor(apart, rho=0.5).perturbed(grads=[torch.ones_like(p) for p in apart]):
        pass
    wide = torch.randn(5, 4, 16, dtype=torch.float64)
    told_apart = 0
    for seed in range(200):  # against every byte's own
        choose = random.Random(seed)
        one, other = (
            wide[choose.randrange(3) :, slice(*sorted(choose.sample(range(5), 2))), slice(*sorted(choose.sample(range(17), 2)))]
            for _ in range(2)
        )
        if choose.random() < 0.5:
            one, other = one[:, 0], other[:, -1]
        if displacement._columns_apart(one, other):
            told_apart += 1
            mark = torch.zeros_like(wide)
            mark.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(1)
            assert not mark.as_strided(other.shape, other.stride(), other.storage_offset()).any()
    assert told_apart > 10
    assert displacement._columns_apart(matrix[:, :3], matrix[:2, 3:])
    assert displacement._columns_apart(matrix[1:, 6:], matrix[:, 1:6])
    apart = [nn.Parameter(storage[:3]), nn.Parameter(storage[3:])]
    with GeometricAnchor(apart, rho=0.5).perturbed(grads=[torch.ones_like(p) for p in apart]):
        assert (storage != before).all()
    assert torch.equal(storage, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parameters_on_several_devices(params):
    grads = make_grads(params)
    _, expected = deltas(params, grads, 0.1, "asam")
    theta = [p.detach().clone() for p in params]
    spread = [nn.Parameter(p.detach().to(d)) for p, d in zip(params, ("cuda", "cpu", "cuda"))]
    before = bits(spread)
    anchor = GeometricAnchor(spread, rho=0.1)
    with anchor.perturbed(grads=[grad.to(p.device) for grad, p in zip(grads, spread)]):
        for p, t, delta in zip(spread, theta, expected):
            torch.testing.assert_close(p.detach().cpu(), t + delta, atol=1e-14, rtol=0)
    assert same(spread, before)
    assert anchor.stats.changed_fraction > 0.5


# ---- Which weights move ----


def moved_names(anchor, **perturbed):
    theta = [p.detach().clone() for p in anchor.params]
    with anchor.perturbed(**perturbed):
        return [n for n, p, t in zip(anchor.names, anchor.params, theta) if not torch.equal(p, t)]


def test_frozen_parameters_are_left_out_and_unused_ones_stay(params):
    params[0].requires_grad_(False)
    anchor = GeometricAnchor([("a", params[0]), ("b", params[1]), ("c", params[2])], rho=0.1)
    assert anchor.names == ["b", "c"] and anchor.params[0] is params[1] and anchor.params[1] is params[2]
    assert moved_names(anchor, objective=(params[0].sum() * params[2]).sum()) == ["c"]
    assert moved_names(anchor, grads=[torch.ones(6), None]) == ["b"]
    assert anchor.stats.changed_fraction < 6 / 16  # of all weights in scope


def test_a_tied_parameter_is_moved_once(params):
    anchor = GeometricAnchor([params[0], params[2], params[0]], rho=0.1)
    assert len(anchor.params) == 2
    theta, grads = params[0].detach().clone(), make_grads([params[0], params[2]])
    with anchor.perturbed(grads=grads):
        _, (delta, _) = deltas([nn.Parameter(theta), make_params()[2]], grads, 0.1, "asam")
        torch.testing.assert_close(params[0].detach(), theta + delta, atol=1e-15, rtol=0)


def layer_names(prefix, names, layers):
    return {f"{prefix}.{i}.{name}" for i in layers for name in names}


LLAMA_LAYER = ["input_layernorm.weight", "post_attention_layernorm.weight"]
LLAMA_LAYER += [f"self_attn.{n}_proj.weight" for n in "qkvo"] + [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
GEMMA2_LAYER = LLAMA_LAYER + ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]
GPT2_LAYER = [
    f"{name}.{kind}"
    for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]
GPT2_NORM = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
EMBEDDING, HEAD, NORM = {"model.embed_tokens.weight"}, {"lm_head.weight"}, {"model.norm.weight"}
SCOPES = {
    ("llama", "backbone"): EMBEDDING | NORM | layer_names("model.layers", LLAMA_LAYER, range(3)),
    ("llama", "all"): EMBEDDING | NORM | HEAD | layer_names("model.layers", LLAMA_LAYER, range(3)),
    ("llama", 0): NORM | HEAD | layer_names("model.layers", LLAMA_LAYER, range(3)),
    ("llama", 2): NORM | HEAD | layer_names("model.layers", LLAMA_LAYER, [2]),
    ("gemma2", "backbone"): EMBEDDING | NORM | layer_names("model.layers", GEMMA2_LAYER, range(3)),
    ("gemma2", "all"): EMBEDDING | NORM | layer_names("model.layers", GEMMA2_LAYER, range(3)),
    ("gemma2", 1): EMBEDDING | NORM | layer_names("model.layers", GEMMA2_LAYER, [1, 2]),
    ("gpt2", "backbone"): {"transformer.wte.weight", "transformer.wpe.weight"}
    | GPT2_NORM
    | layer_names("transformer.h", GPT2_LAYER, range(3)),
    ("gpt2", 1): {"transformer.wte.weight"} | GPT2_NORM | layer_names("transformer.h", GPT2_LAYER, [1, 2]),
}


@pytest.mark.parametrize("name, scope", SCOPES, ids=str)
def test_scopes_of_transformers_models(name, scope):
    model = tiny_models.build(name)
    anchor = GeometricAnchor.from_model(model, scope=scope, rho=0.2, geometry="sam")
    names = {id(param): n for n, param in model.named_parameters()}
    assert {names[id(param)] for param in anchor.params} == SCOPES[name, scope]
    assert len(anchor.params) == len(SCOPES[name, scope])
    assert (anchor.rho, anchor.geometry) == (0.2, "sam")


def test_a_compiled_models_scopes_are_the_models():
    model = tiny_models.build("llama")
    for scope in ("backbone", "all", 1):
        compiled = GeometricAnchor.from_model(torch.compile(model), scope=scope)
        assert [id(p) for p in compiled.params] == [
            id(p) for p in GeometricAnchor.from_model(model, scope=scope).params
        ]


@pytest.mark.parametrize("scope, adapters", [("backbone", 6), ("all", 6), (1, 4)])
def test_with_lora_only_the_adapters_move(scope, adapters):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    anchor = GeometricAnchor.from_model(model, scope=scope, rho=0.1)
    assert len(anchor.params) == adapters and all("lora_" in name for name in anchor.names)
    ids, labels = tiny_models.preference_batch()
    before = bits(model.parameters())
    moved = moved_names(anchor, objective=model(ids, labels=labels).loss)
    assert moved == anchor.names and same(model.parameters(), before)


@pytest.mark.parametrize("name", ["OPT", "Mpt"])
def test_upper_layers_of_other_decoders(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        OPT=dict(hidden_size=8, ffn_dim=8, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=8),
        Mpt=dict(d_model=8, n_heads=2, n_layers=3, expansion_ratio=1),
    )
    config = getattr(transformers, f"{name}Config")(vocab_size=11, **sizes[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    anchor = GeometricAnchor.from_model(model, scope=1)
    layers = model.model.decoder.layers if name == "OPT" else model.transformer.blocks
    norm = model.model.decoder.final_layer_norm if name == "OPT" else model.transformer.norm_f
    expected = [layers[1], layers[2], norm, model.lm_head]
    assert {id(p) for p in anchor.params} == {id(p) for module in expected for p in module.parameters()}


def test_models_without_a_backbone_are_refused():
    with pytest.raises(ValueError, match="expected a model with a backbone .* got Linear; pass scope='all'"):
        GeometricAnchor.from_model(nn.Linear(2, 2))
    assert GeometricAnchor.from_model(nn.Linear(2, 2), scope="all").names == ["weight", "bias"]
    bare = nn.Module()
    bare.model = nn.Linear(2, 2)
    assert GeometricAnchor.from_model(bare).names == ["weight", "bias"]
    with pytest.raises(ValueError, match="a decoder with a list of layers, a final norm and a head, got Module"):
        GeometricAnchor.from_model(bare, scope=0)


@pytest.mark.parametrize(
    "scope, message",
    [
        ("head", "scope must be 'backbone', 'all' or the first layer's number, got 'head'"),
        (True, "scope must be 'backbone', 'all' or the first layer's number, got True"),
        (1.0, "scope must be 'backbone', 'all' or the first layer's number, got 1.0"),
        (3, r"scope as a layer's number must be in \[0, 3\), got 3"),
        (-1, r"scope as a layer's number must be in \[0, 3\), got -1"),
    ],
)
def test_scopes_that_are_refused(scope, message):
    with pytest.raises(ValueError, match=message):
        GeometricAnchor.from_model(tiny_models.build("llama"), scope=scope)


# ---- The gaussian direction ----


def noise_of(anchor):
    theta = [p.detach().clone() for p in anchor.params]
    with anchor.perturbed():
        return torch.cat([(p.detach() - t).flatten() for p, t in zip(anchor.params, theta)])


def gaussian(params, seed=0):
    return GeometricAnchor(params, rho=0.5, geometry="sam", direction="gaussian", seed=seed)


def test_noise_is_a_function_of_seed_and_step(params):
    first, second = gaussian(params), gaussian(params)
    noises = [noise_of(first) for _ in range(3)]
    assert all(torch.equal(noise_of(second), noise) for noise in noises)
    assert not torch.equal(noises[0], noises[1]) and not torch.equal(noises[1], noises[2])
    assert not torch.equal(noise_of(gaussian(params, seed=1)), noises[0])
    assert noises[0].norm() == pytest.approx(0.5)


def test_noise_is_standard_normal():
    param = nn.Parameter(torch.ones(400, 500))
    noise = noise_of(gaussian([param], seed=-5)) * math.sqrt(200_000) / 0.5
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs(noise.pow(4).mean() - 3) < 0.1


def test_a_resumed_anchor_continues(params):
    anchor = gaussian(params, seed=7)
    noise_of(anchor)
    saved = anchor.state_dict()
    expected = noise_of(anchor)
    resumed = gaussian(params)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved == {"step": 1, "seed": 7}
    assert torch.equal(noise_of(resumed), expected)


def test_a_use_that_failed_is_repeated_with_the_same_noise(params):
    expected = noise_of(gaussian(params))
    anchor = gaussian(params)
    with pytest.raises(ZeroDivisionError), anchor.perturbed():
        1 / 0
    assert torch.equal(noise_of(anchor), expected)


def test_the_global_random_state_is_left_alone(params):
    before = torch.get_rng_state()
    noise_of(gaussian(params))
    assert torch.equal(torch.get_rng_state(), before)


# ---- Back to theta, whatever happens ----

THROWN = [RuntimeError("CUDA error"), torch.OutOfMemoryError("out of memory"), KeyboardInterrupt(), SystemExit(1)]


def assert_usable(anchor):
    theta = bits(anchor.params)
    with anchor.perturbed(grads=make_grads(anchor.params)):
        assert not same(anchor.params, theta)
    assert same(anchor.params, theta)


@pytest.mark.parametrize("thrown", THROWN, ids=lambda e: type(e).__name__)
def test_an_exception_inside_finds_the_weights_back(params, anchor, thrown):
    before = bits(params)
    try:
        with anchor.perturbed(grads=make_grads(params)):
            params[0].data.fill_(math.nan)  # nor does it matter what the body did to them
            raise thrown
    except BaseException as error:
        assert error is thrown and same(params, before)
    assert_usable(anchor)


def test_new_memory_that_the_body_gave_parameters_is_taken_from_them_again():
    """As model.to() does; nothing is written to it, which may be somebody's average of the weights. Nor does another view of
    the same memory stay."""
    more = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5, 6))]
    anchor = GeometricAnchor([*make_params(), more[0], nn.Parameter(more[1].detach().t())], rho=0.1)
    params, before = anchor.params, bits(anchor.params)
    memory = [param.data_ptr() for param in params]
    with anchor.perturbed(grads=make_grads(params)):
        params[0].data = params[-1].data = average = torch.zeros(5, 6, dtype=torch.float64)
        params[1].data = torch.empty(0, dtype=params[1].dtype)
        params[-2].data = params[-2].data.t()
    assert same(params, before) and memory == [param.data_ptr() for param in params] and not average.any()
    assert_usable(anchor)


class FailingWrites:
    """Breaks some of the writes to the parameters, or of all writes, after half of the tensor has been written."""

    def __init__(self, monkeypatch, thrown, calls, params=None):
        self.calls, self.count, self.thrown = set(calls), 0, thrown
        self.memory = None if params is None else {p.untyped_storage().data_ptr() for p in params}
        self.copy, add = torch.Tensor.copy_, torch.add
        monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, *args: self.write(tensor, *args))
        monkeypatch.setattr(torch, "add", lambda *args, out: self.write(out, add(*args)))

    def write(self, tensor, source):
        if self.memory is not None and tensor.untyped_storage().data_ptr() not in self.memory:
            return self.copy(tensor, source)
        self.count += 1
        if self.count - 1 in self.calls:
            half = tensor.shape[0] // 2
            broken = math.nan if tensor.is_floating_point() else 7
            self.copy(tensor[:half], torch.full_like(tensor[:half], broken))
            raise self.thrown
        return self.copy(tensor, source)


@pytest.fixture
def one_thread():
    """So that the order of the writes is known."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("thrown", THROWN, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(
    "calls",
    [[0], [1], [2], [3], [4], [5], [3, 5], [3, 4], [0, 1], [2, 4]],  # 0-2 are the moves, then they are put back
    ids=str,
)
def test_writes_that_fail_half_way(params, anchor, thrown, calls, monkeypatch, one_thread):
    before, entered = bits(params), False
    writes = FailingWrites(monkeypatch, thrown, calls, params)
    try:
        with anchor.perturbed(grads=make_grads(params)):
            entered = True
    except BaseException as error:
        assert error is thrown and same(params, before)
    else:
        pytest.fail("the exception was swallowed")
    assert entered == (calls[0] > 2)
    writes.calls.clear()
    assert_usable(anchor)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_copy_may_fail_half_way(params, anchor, monkeypatch, threads):
    """Into scratch, into the gradients' memory, into the weights: also on threads of their own."""
    anchor_of_all = GeometricAnchor([*params, nn.Parameter(torch.randn(900_000).bfloat16())], rho=0.1)
    before, theta = bits(anchor_of_all.params), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        writes = FailingWrites(monkeypatch, ValueError("a copy"), [])

        def use():
            objective = sum((p.double() ** 2).sum() for p in anchor_of_all.params)
            with anchor_of_all.perturbed(objective):
                assert not same(anchor_of_all.params, before)

        use()
        copies = writes.count
        assert copies > 20 and same(anchor_of_all.params, before)
        for call in range(copies):
            writes.count, writes.calls = 0, {call}
            with pytest.raises(ValueError, match="a copy"):
                use()
            writes.calls = set()
            assert same(anchor_of_all.params, before), call
    finally:
        torch.set_num_threads(theta)


def test_a_failure_while_restoring_keeps_the_bodys_exception_as_its_context(params, anchor, monkeypatch, one_thread):
    before = bits(params)
    FailingWrites(monkeypatch, KeyboardInterrupt(), [4], params)
    with pytest.raises(KeyboardInterrupt) as caught, anchor.perturbed(grads=make_grads(params)):
        raise ValueError("the body's")
    assert "the body's" in str(caught.value.__context__) and same(params, before)


def test_a_weight_that_cannot_be_put_back_says_so_and_the_others_are(params, anchor, monkeypatch, one_thread):
    before = bits(params)
    writes = FailingWrites(monkeypatch, RuntimeError("device lost"), [], params)
    with pytest.raises(RuntimeError, match="device lost"), anchor.perturbed(grads=make_grads(params)):
        first = writes.count  # every attempt at the first that is put back; after the first attempt it is alone
        writes.calls.update([first, first + 3, first + 4])
    assert [same([p], [b]) for p, b in zip(params, before)] == [False, True, True]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_move_nothing(params, anchor, poison, monkeypatch):
    before, grads = bits(params), make_grads(params)
    grads[2][1, 3] = poison
    writes = FailingWrites(monkeypatch, RuntimeError("a write"), range(9), params)
    with pytest.raises(FloatingPointError, match="the weights were left where they are. Look for NaN or inf"):
        with anchor.perturbed(grads=grads):
            pytest.fail("entered")
    assert writes.count == 0 and same(params, before)
    writes.calls.clear()
    assert_usable(anchor)


def test_out_of_memory_while_copying(params, anchor, monkeypatch):
    """The gradients that are passed in are only read: the originals need memory of their own."""
    before, taken, empty_like = bits(params), [], torch.empty_like

    def limited(tensor, **options):
        if options:
            return empty_like(tensor, **options)
        taken.append(tensor)
        if len(taken) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return empty_like(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", limited)
        with pytest.raises(torch.OutOfMemoryError), anchor.perturbed(grads=make_grads(params)):
            pytest.fail("entered")
    assert same(params, before)
    assert_usable(anchor)


def test_perturbed_inside_perturbed(params, anchor):
    before = bits(params)
    with anchor.perturbed(grads=make_grads(params)):
        inside = bits(params)
        with pytest.raises(RuntimeError, match=r"perturbed\(\) inside perturbed\(\): the weights are at an anchor"):
            with anchor.perturbed(grads=make_grads(params, seed=2)):
                pytest.fail("entered")
        assert same(params, inside) and not same(params, before)
    assert same(params, before)
    assert_usable(anchor)


def test_perturbed_inside_that_of_other_parameters_in_the_same_memory(params, anchor):
    before, others = bits(params), [nn.Parameter(param.data) for param in params]
    with anchor.perturbed(grads=make_grads(params)):
        with pytest.raises(RuntimeError, match="the weights are at an anchor"):
            with GeometricAnchor(others, rho=0.3).perturbed(grads=make_grads(params, seed=2)):
                pytest.fail("entered")
    assert same(params, before)


@pytest.mark.parametrize("part", [slice(2, 8), slice(0, 8, 2)])
def test_perturbed_inside_that_of_parameters_that_begin_elsewhere_in_the_same_memory(part):
    memory = torch.randn(8, dtype=torch.float64)
    before, (one, other) = memory.clone(), (nn.Parameter(memory[1:6]), nn.Parameter(memory[part]))
    with GeometricAnchor([one], rho=0.3).perturbed(grads=[torch.ones_like(one)]):
        with pytest.raises(RuntimeError, match="the weights are at an anchor"):
            with GeometricAnchor([other], rho=0.3).perturbed(grads=[torch.ones_like(other)]):
                pytest.fail("entered")
    assert torch.equal(memory, before)


def test_perturbed_inside_that_of_parameters_that_lie_between():
    memory = torch.randn(4, 8, dtype=torch.float64)
    before, (one, other) = memory.clone(), (nn.Parameter(memory[:, :3]), nn.Parameter(memory[:, 3:]))
    with GeometricAnchor([one], rho=0.3).perturbed(grads=[torch.ones_like(one)]):
        with GeometricAnchor([other], rho=0.3).perturbed(grads=[torch.ones_like(other)]):
            assert not (memory == before).any()
    assert torch.equal(memory, before)


def test_weights_on_the_host_are_written_after_devices_have_read_them(params, anchor, monkeypatch):
    """FSDP2's offload queues copies of them; also where that is how one learns that the device has failed."""
    before, seen = bits(params), []

    def synchronize():
        seen.append(bits(params))
        if len(seen) > 1:
            raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match="illegal memory access"), anchor.perturbed(grads=make_grads(params)):
            inside = bits(params)
    assert all(map(torch.equal, seen[0], before)) and all(map(torch.equal, seen[1], inside))
    assert same(params, before) and not all(map(torch.equal, inside, before))


def test_perturbed_inside_that_of_another_anchor(params, anchor):
    before, other = bits(params), GeometricAnchor(params[:1], rho=0.3)
    with anchor.perturbed(grads=make_grads(params)):
        inside = bits(params)
        with pytest.raises(RuntimeError, match="the weights are at an anchor"):
            with other.perturbed(grads=make_grads(params[:1], seed=2)):
                pytest.fail("entered")
        assert same(params, inside)
    assert same(params, before)
    assert_usable(other)


def test_two_threads_whose_probes_run_side_by_side(params):
    """Both pass the check before the probe; only one may move the weights."""
    before, barrier, inside, failures = bits(params), threading.Barrier(2), [], []
    done = threading.Event()

    def work():
        anchor = GeometricAnchor(params, rho=0.1)
        gradients = anchor._gradients

        def both_at_once(*args):
            barrier.wait(30)
            return gradients(*args)

        anchor._gradients = both_at_once
        try:
            with anchor.perturbed(sum((p**2).sum() for p in params)):
                inside.append(1)
                done.wait(30)
        except RuntimeError as error:
            failures.append(str(error))
        finally:
            if failures:
                done.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(inside) <= 1 and failures and all("are at an anchor already" in failure for failure in failures)
    assert same(params, before)
    assert_usable(GeometricAnchor(params))


def test_two_anchors_left_in_the_order_of_their_entry(params):
    before, handler = bits(params), signal.getsignal(signal.SIGINT)
    one, other = (GeometricAnchor([param], rho=0.1) for param in params[::2])
    contexts = [anchor.perturbed(grads=make_grads(anchor.params)) for anchor in (one, other)]
    for context in contexts:
        context.__enter__()
    for context in contexts:
        context.__exit__(None, None, None)
    assert same(params, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_exception_kept_for_later_keeps_no_copy_of_the_weights(params, anchor, monkeypatch):
    empty_like, copies = torch.empty_like, []

    def counted(tensor, **options):
        copy = empty_like(tensor, **options)
        if not options:
            copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(torch, "empty_like", counted)
    with pytest.raises(torch.OutOfMemoryError) as kept, anchor.perturbed(grads=make_grads(params)):
        raise torch.OutOfMemoryError("out of memory")
    assert kept.tb is not None and len(copies) == 3 and not any(copy() is not None for copy in copies)


# ---- Ctrl-C ----


def test_a_ctrl_c_inside_waits_until_the_weights_are_back(params, anchor):
    before, handler, ended = bits(params), signal.getsignal(signal.SIGINT), False
    try:
        with anchor.perturbed(grads=make_grads(params)):
            signal.raise_signal(signal.SIGINT)
            ended = True
    except KeyboardInterrupt:
        assert ended and same(params, before)
    else:
        pytest.fail("the interrupt was swallowed")
    assert signal.getsignal(signal.SIGINT) is handler
    assert_usable(anchor)


def test_a_handler_is_told_where_the_signal_came(params, anchor):
    told = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: told.append(frame.f_code.co_name))
    try:
        with anchor.perturbed(grads=make_grads(params)):
            signal.raise_signal(signal.SIGINT)
            assert not told
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["test_a_handler_is_told_where_the_signal_came"]


def test_a_second_ctrl_c_does_not_wait(params, anchor):
    before = bits(params)
    try:
        with anchor.perturbed(grads=make_grads(params)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it waited")
    except KeyboardInterrupt:
        assert same(params, before)
    assert_usable(anchor)


def test_every_signal_that_waited_is_delivered(params, anchor, monkeypatch):
    """Also after one whose handler raised, and with the handlers that were in place."""
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(same(params, theta)))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    restore = displacement.Displacement.restore

    def with_a_signal(move):
        signal.raise_signal(signal.SIGTERM)
        restore(move)

    monkeypatch.setattr(displacement.Displacement, "restore", with_a_signal)
    try:
        theta = bits(params)
        with pytest.raises(KeyboardInterrupt), anchor.perturbed(grads=make_grads(params)):
            signal.raise_signal(signal.SIGINT)
        assert calls == [True]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ctrl_c_while_handlers_are_put_back_leaves_none_of_ours():
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.signal(number, lambda *_: None) for number in numbers[1:]]
    handlers = [signal.getsignal(number) for number in numbers]
    codes = interrupts.interrupt_held.__wrapped__.__code__, interrupts._put_back.__code__

    def leave(at):
        """The number of lines of leaving a block; SIGINT comes just before line number `at`."""
        lines = SignalAt(at, signal.SIGINT, lambda frame: frame.f_code in codes)
        try:
            with interrupts.interrupt_held():
                lines.start()
        finally:
            lines.stop()
        return lines.lines

    try:
        lines = leave(at=0)
        assert lines > 10
        for at in range(1, lines + 1):
            with pytest.raises(KeyboardInterrupt):
                leave(at)
            assert [signal.getsignal(number) for number in numbers] == handlers, f"line {at} of {lines}"
    finally:
        for number, handler in zip(numbers[1:], before):
            signal.signal(number, handler)


def test_where_only_entry_and_exit_are_held_no_ctrl_c_waits_in_the_body():
    with pytest.raises(KeyboardInterrupt):
        with interrupts.interrupt_held(in_body=False):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it waited")
    with pytest.raises(KeyboardInterrupt):
        with interrupts.interrupt_held(in_body=False), interrupts.interrupt_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("a second one waited")


def test_what_a_handler_raised_holds_no_frame_of_a_step():
    class Kept:
        pass

    def step():
        kept = Kept()
        with interrupts.interrupt_held():
            signal.raise_signal(signal.SIGINT)
        return kept

    def kept_by(objects):
        return [o for o in objects if type(o).__qualname__.endswith("Kept")]

    gc.collect()
    gc.disable()
    try:
        try:
            step()
        except KeyboardInterrupt:
            pass
        assert not kept_by(gc.get_objects())
    finally:
        gc.enable()


def test_a_block_that_another_thread_leaves_keeps_no_signal():
    """Its handlers cannot be put back there: they pass on what comes, until the next block ends."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("one"))
    try:
        handler, block = signal.getsignal(signal.SIGINT), interrupts.interrupt_held()
        block.__enter__()
        signal.raise_signal(signal.SIGINT)
        assert calls == []
        thread = threading.Thread(target=block.__exit__, args=(None, None, None))
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and calls == ["one"]
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert len(calls) == 3
        with interrupts.interrupt_held():
            pass
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_blocks_that_are_left_in_another_order_leave_no_handler():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocks = [interrupts.interrupt_held() for _ in range(3)]
    for block in blocks:
        block.__enter__()
    for block in blocks:
        block.__exit__(None, None, None)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers


def test_the_handler_in_place_gets_every_ctrl_c(params, anchor):
    calls, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: calls.append(same(params, theta)))
    try:
        theta = bits(params)
        with anchor.perturbed(grads=make_grads(params)):
            signal.raise_signal(signal.SIGINT)
            assert calls == []
            signal.raise_signal(signal.SIGINT)
        assert calls == [False, True]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=str)
def test_handlers_that_are_no_functions_stay(params, anchor, handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with anchor.perturbed(grads=make_grads(params)):
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_ctrl_c_to_hold(params, anchor):
    failures = []

    def work():
        try:
            assert_usable(anchor)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def of_a_use(frame):
    return any(file in frame.f_code.co_filename for file in (os.path.join("gapo_kernels", ""), "contextlib.py"))


@pytest.mark.parametrize("second", [False, True], ids=["the first", "a second"])
def test_a_ctrl_c_at_any_line_finds_the_weights_back(params, anchor, second):
    """Interrupts a use at every line of this library and of contextlib in turn: in the entry, the body and the exit; or,
    after a Ctrl-C in the body, in the exit."""
    grads, before, handler = make_grads(params), bits(params), signal.getsignal(signal.SIGINT)

    def use(at):
        """Number of lines that were passed; SIGINT comes just before line number `at`."""
        lines = SignalAt(at, signal.SIGINT, of_a_use)
        if not second:
            lines.start()
        try:
            with anchor.perturbed(grads=grads):
                if second:
                    signal.raise_signal(signal.SIGINT)
                    lines.start()
        except KeyboardInterrupt:
            if at or not second:
                raise
        finally:
            lines.stop()
        return lines.lines

    lines = use(at=0)
    assert lines > 60
    for at in range(1, lines + 1):
        try:
            use(at)
        except KeyboardInterrupt as error:  # kept alive: nothing is put back by its going
            assert same(params, before), f"line {at} of {lines}: {error!r}"
        else:
            pytest.fail(f"the interrupt at line {at} of {lines} was swallowed")
        assert torch.is_grad_enabled(), f"line {at} of {lines}"
        assert signal.getsignal(signal.SIGINT) is handler, f"line {at} of {lines}"
        assert_usable(anchor)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signal")
@pytest.mark.parametrize("name", ["SIGALRM", "SIGCHLD", "SIGPROF"])
def test_any_signal_at_any_line_finds_the_weights_back(params, anchor, name):
    """A timeout's, a DataLoader's for a worker that died: one whose handler raises. In the body it does not wait."""
    grads, before, signum = make_grads(params), bits(params), getattr(signal, name)

    def expire(signum, frame):
        raise TimeoutError

    def use(at):
        with SignalAt(at, signum, of_a_use) as lines, anchor.perturbed(grads=grads):
            if at is None:
                signal.raise_signal(signum)
                pytest.fail("it waited")
        return lines.lines

    handler = signal.signal(signum, expire)
    try:
        use(at=0)  # some lines run once in a process
        lines = use(at=0)
        for at in [None, *range(1, lines + 1)]:
            try:
                use(at)
            except TimeoutError as error:
                assert same(params, before), f"line {at} of {lines}: {error!r}"
            else:
                pytest.fail(f"the signal at line {at} of {lines} was swallowed")
            assert signal.getsignal(signum) is expire, f"line {at} of {lines}"
            assert_usable(anchor)
    finally:
        signal.signal(signum, handler)


# ---- What is refused ----


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(rho=-0.1), ValueError, "rho must be >= 0, got -0.1"),
        (dict(rho=math.nan), ValueError, "rho must be finite, got nan"),
        (dict(rho="0.1"), TypeError, "rho must be a number, got str"),
        (dict(geometry="l2"), ValueError, "geometry must be one of 'asam', 'sam', got 'l2'"),
        (dict(direction="up"), ValueError, "direction must be one of 'pessimistic', 'gaussian', got 'up'"),
        (dict(rounding="up"), ValueError, "rounding must be one of 'stochastic', 'nearest', got 'up'"),
        (dict(seed=0.5), TypeError, "seed must be an int, got float"),
        (dict(compute_dtype="bfloat16"), TypeError, "compute_dtype must be a torch.dtype or None, got str"),
        (dict(compute_dtype=torch.int32), ValueError, "compute_dtype must be .* or float64, got torch.int32"),
        (dict(compute_dtype=torch.float8_e4m3fn), ValueError, "compute_dtype must be .* or float64, got torch.float8"),
    ],
    ids=str,
)
def test_options_that_are_refused(params, options, error, message):
    with pytest.raises(error, match=message):
        GeometricAnchor(params, **options)


def test_parameters_that_are_refused(params):
    with pytest.raises(TypeError, match="parameters or .* pairs, got str"):
        GeometricAnchor(["weight"])
    with pytest.raises(ValueError, match="at least one parameter that requires grad, got none"):
        GeometricAnchor([])
    with pytest.raises(ValueError, match="at least one parameter that requires grad, got none"):
        GeometricAnchor([p.requires_grad_(False) for p in params])
    for params in (nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2)), None):
        with pytest.raises(TypeError, match=f"params must be an iterable .* got {type(params).__name__}; of a whole model"):
            GeometricAnchor(params)
    with pytest.raises(TypeError, match="parameter 0 must be real and floating-point to be moved, got torch.complex64"):
        GeometricAnchor([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("direction", ["pessimistic", "gaussian"])
def test_what_was_frozen_since_stays(params, direction):
    anchor = GeometricAnchor(params, direction=direction)
    params[1].requires_grad_(False)
    saved = bits(params)
    grads = None if direction == "gaussian" else make_grads(params)
    for probe in (dict(objective=None if grads is None else sum((p**2).sum() for p in params)), dict(grads=grads)):
        with anchor.perturbed(**probe):
            assert [torch.equal(p, s) for p, s in zip(bits(params), saved)] == [False, True, False]
        assert same(params, saved)
    for param in params:
        param.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the anchor has a gradient under the objective"):
        with anchor.perturbed(None if direction == "gaussian" else torch.ones((), requires_grad=True) * 2):
            pass


@pytest.mark.parametrize("state", [{}, {"step": 1}, {"step": torch.tensor(1), "seed": 0}, {"step": "1", "seed": 0}, None], ids=str)
def test_a_state_that_is_none_is_refused(anchor, state):
    with pytest.raises(ValueError, match="expected what state_dict.. returns"):
        anchor.load_state_dict(state)
    assert anchor.state_dict() == {"step": 0, "seed": 0}


def test_arguments_of_a_step_that_are_refused(params, anchor):
    with pytest.raises(TypeError, match="logps_fn must be a function without arguments, got GeometricAnchor"):
        gapo_step(anchor, lambda: params[0].sum(0))
    with pytest.raises(TypeError, match="anchor must be a GeometricAnchor or None, got Linear"):
        gapo_step(lambda: params[0].sum(0), nn.Linear(2, 2))


def test_probes_of_noise_that_are_refused(params):
    with pytest.raises(TypeError, match="the objective must be a tensor, got float"), gaussian(params).perturbed(3.0):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="expected no grads"), gaussian(params).perturbed(grads=make_grads(params)):
        pytest.fail("entered")


def test_probes_that_are_refused(params, anchor):
    used = params[0].sum()
    with pytest.raises(ValueError, match="an objective or its grads, got neither"), anchor.perturbed():
        pass
    with pytest.raises(ValueError, match="an objective or its grads, got both"):
        with anchor.perturbed(used, grads=make_grads(params)):
            pass
    with pytest.raises(ValueError, match="one entry for each of the 3 parameters, got 2"):
        with anchor.perturbed(grads=make_grads(params)[:2]):
            pass
    with pytest.raises(ValueError, match="one entry for each of the 3 parameters, got a torch.float32 tensor"):
        with anchor.perturbed(grads=torch.ones(3)):
            pass
    with pytest.raises(ValueError, match="grads must be a sequence with one entry for .*, got int"):
        with anchor.perturbed(grads=3):
            pass
    for wrong, error, message in [
        (1.0, TypeError, "must be a floating-point tensor or None, got float"),
        (torch.ones(params[0].shape, dtype=torch.complex64), TypeError, "got a torch.complex64 tensor"),
        (torch.ones(params[0].shape, dtype=torch.int64), TypeError, "got a torch.int64 tensor"),
        (torch.ones(params[0].shape, device="meta"), ValueError, "must be on the device cpu, got meta"),
    ]:
        with pytest.raises(error, match=f"the gradient of parameter 0 {message if 'must' in message else 'must .*' + message}"):
            with anchor.perturbed(grads=[wrong, *make_grads(params)[1:]]):
                pass
    with pytest.raises(TypeError, match="objective must be a tensor, got float"):
        with anchor.perturbed(3.0):
            pass
    with pytest.raises(ValueError, match=r"gradient of parameter 1 must have shape \(6,\), got \(3, 4\)"):
        with anchor.perturbed(grads=[make_grads(params)[0]] * 3):
            pass
    for nothing in (dict(grads=[None] * 3), dict(objective=torch.ones((), requires_grad=True) * 2)):
        with pytest.raises(ValueError, match="no parameter of the anchor has a gradient under the objective"):
            with anchor.perturbed(**nothing):
                pass
    with (
        pytest.raises(ValueError, match="objective must have a graph, got a constant"),
        anchor.perturbed(torch.ones(())),
    ):
        pass
    with pytest.raises(ValueError, match=r"objective must be a scalar, got shape \(3, 4\)"):
        with anchor.perturbed(params[0] * 2):
            pass
    assert_usable(anchor)


# ---- Sharded parameters (what works on several ranks: test_distributed.py) ----


@pytest.fixture
def one_rank_group():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_sharded_parameters_that_are_refused(one_rank_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = fully_shard(nn.Linear(4, 4), mesh=mesh)
    with pytest.raises(ValueError, match=r"weight is a DTensor \(FSDP2\): use GeometricAnchor.from_model"):
        GeometricAnchor(model.named_parameters())
    lone = nn.Module()
    lone.weight = nn.Parameter(distribute_tensor(torch.randn(3), mesh, [Replicate()]))
    with pytest.raises(NotImplementedError, match="weight is a DTensor that fully_shard does not manage"):
        GeometricAnchor.from_model(lone, scope="all")
    for mark, what in (
        ("_fsdp_flattened", "FSDP's first version.*fully_shard"),
        ("ds_id", r"DeepSpeed ZeRO-3, which is not supported; use fully_shard \(FSDP2\) or DDP instead$"),
    ):
        params = make_params()
        before = GeometricAnchor(params)
        setattr(params[1], mark, mark != "ds_id" or 0)
        with pytest.raises(NotImplementedError, match=f"parameter 1 is .*{what}"):
            GeometricAnchor(params)
        with pytest.raises(NotImplementedError, match=f"parameter 1 is .*{what}"), before.perturbed(params[0].sum()):
            pass


def test_the_first_version_of_fsdp_is_refused(one_rank_group):
    """By default it leaves no Parameter of the model's own that could tell."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(NotImplementedError, match="the model is sharded by FSDP's first version.*fully_shard"):
            GeometricAnchor.from_model(model, scope="all")


def test_one_rank_alone_averages_nothing(one_rank_group, params, anchor):
    assert_usable(anchor)
    assert_usable(GeometricAnchor(params, process_group=one_rank_group))


@pytest.fixture
def sharded(one_rank_group):
    """Two layers under fully_shard, the lower one frozen, and an anchor over them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, GeometricAnchor.from_model(model, scope="all", rho=0.5)


def test_the_sharded_probe_leaves_alone_what_was_unfrozen_later(sharded):
    model, anchor = sharded
    model[0].requires_grad_(True)
    objective = model(torch.randn(3, 4)).square().sum()
    with anchor.perturbed(objective):
        pass
    assert all(p.grad is None for p in model.parameters())
    objective.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_sharded_probe_is_complete_before_it_is_read(sharded):
    """Also where set_is_last_backward(False) lets a micro-batch's reductions go on after its backward."""
    model, anchor = sharded
    context, seen = model._get_fsdp_state()._state_ctx, []
    output = model(torch.randn(3, 4))
    output.register_hook(lambda _: seen.append(context.is_last_backward))
    model.set_is_last_backward(False)
    with anchor.perturbed(output.square().sum()):
        pass
    assert seen == [True] and context.is_last_backward is False


def test_a_ctrl_c_at_any_line_of_the_sharded_probe_loses_no_gradient(sharded):
    model, anchor = sharded
    objective = model(torch.randn(3, 4)).square().sum()
    objective.backward(retain_graph=True)
    kept = [p.grad for p in model.parameters()]
    assert any(grad is not None for grad in kept)

    def use(at):
        in_gradients = SignalAt(at, signal.SIGINT, lambda frame: frame.f_code.co_name == "gradients")
        with in_gradients as lines, anchor.perturbed(objective):
            pass
        return lines.lines

    lines = use(at=0)
    assert lines > 15
    for at in range(1, lines + 1):
        with pytest.raises(KeyboardInterrupt):
            use(at)
        assert all(p.grad is grad for p, grad in zip(model.parameters(), kept)), f"line {at} of {lines}"
