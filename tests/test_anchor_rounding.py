"""The anchor on 16-bit grids, where the originals wait, and the passes as the anchor uses them on every back end."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from grids import moved_on_grid
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps, sequence_logps
from gapo_kernels import host_memory, ownership, perturbation

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def make(dtype, device="cpu", shapes=((300, 40), (17,), (5, 3, 2)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device)) for shape in shapes]


def gradients(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]


def deltas(params, grads, rho):
    """asam's delta in float64."""
    scaled = [(p.detach().double(), g.double()) for p, g in zip(params, grads)]
    norm = torch.cat([(t * g).flatten() for t, g in scaled]).norm()
    return [rho * t**2 * g / norm for t, g in scaled]


@pytest.mark.parametrize(
    "dtype, grid", [(BF16, None), (F16, None), (F32, BF16), (F32, F16), (F64, BF16), (BF16, F32)], ids=str
)
def test_the_mean_of_what_the_forward_computes_with_is_cast_theta_plus_delta(passes, device, interpreted, dtype, grid):
    params = make(dtype, device)
    grads, grid_or_own = gradients(params), dtype if grid in (None, F32) else grid  # the coarser of the two
    before = [p.detach().clone() for p in params]
    wanted = deltas(params, grads, rho=1.0)
    uses = 8 if interpreted else 60
    anchor = GeometricAnchor(params, rho=1.0, compute_dtype=grid, seed=5)
    total = [torch.zeros_like(p, dtype=F64) for p in params]
    for _ in range(uses):
        with anchor.perturbed(grads=grads):
            if grid not in (None, F32):
                assert moved_on_grid(*(torch.cat([p.detach().flatten() for p in each]) for each in (before, params)), grid)
            for p, summed in zip(params, total):
                summed += p.detach().to(grid_or_own).double()
        assert all(torch.equal(p, b) for p, b in zip(params, before))
    bases = [b.to(grid_or_own).double() for b in before]
    error = torch.cat([(t / uses - b - d).flatten() for t, b, d in zip(total, bases, wanted)])
    spacing = torch.cat([b.abs().flatten() for b in bases]) * torch.finfo(grid_or_own).eps
    # Each rounding's standard deviation is at most half of the spacing; the mean of all weights' z-scores is unbiased.
    z = error / (0.5 * spacing / uses**0.5)
    assert z.abs().max() < 8 and abs(z.mean()) < 0.05
    delta = torch.cat([d.flatten() for d in wanted])
    along = (error @ delta / (delta @ delta)).item()  # what is missing of delta, or too much, as a share
    noise = (0.5 * spacing / uses**0.5 * delta).norm() / (delta @ delta)
    assert abs(along) < 5 * noise + 1e-3


def test_a_grid_that_the_parameters_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match="parameter 0 is torch.bfloat16 and cannot hold .* compute_dtype torch.float16"
    ):
        GeometricAnchor(make(BF16), compute_dtype=F16)


def test_seed_and_step_decide_the_bits(passes, device):
    params = make(BF16, device)
    grads = gradients(params)

    def moved(anchor):
        with anchor.perturbed(grads=grads):
            return torch.cat([p.detach().flatten() for p in params])

    first = GeometricAnchor(params, rho=1.0, seed=2**40 + 1)
    one, two = moved(first), moved(first)
    again = GeometricAnchor(params, rho=1.0, seed=2**40 + 1)
    assert torch.equal(moved(again), one) and not torch.equal(one, two)
    resumed = GeometricAnchor(params, rho=1.0)
    resumed.load_state_dict({"step": 1, "seed": 2**40 + 1})
    assert torch.equal(moved(resumed), two)
    assert not torch.equal(moved(GeometricAnchor(params, rho=1.0, seed=1)), one)


def test_stats_and_gradients_of_mixed_dtypes(passes, device):
    params = [*make(F32, device), *make(BF16, device, seed=3), *make(F64, device, seed=4)]
    grads = gradients(params)
    grads[0], grads[4], grads[6] = grads[0].to(BF16), grads[4].double(), grads[6].float()
    kept = [g.clone() for g in grads]
    wanted = torch.cat([d.flatten() for d in deltas(params, grads, rho=0.3)])
    before = [p.detach().clone() for p in params]
    anchor = GeometricAnchor(params, rho=0.3, rounding="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with anchor.perturbed(grads=grads):
            applied = torch.cat([(p.detach().double() - b.double()).flatten() for p, b in zip(params, before)])
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    assert all(torch.equal(g, k) for g, k in zip(grads, kept))
    assert anchor.stats.intended_norm == pytest.approx(wanted.norm().item(), rel=1e-5)
    assert anchor.stats.applied_norm == pytest.approx(applied.norm().item(), rel=1e-5)
    assert anchor.stats.changed_fraction == pytest.approx((applied != 0).double().mean().item(), abs=1e-12)
    assert (applied - wanted).abs().max() < 0.01


def test_the_loss_of_the_perturbation_is_warned_of_once():
    params = make(BF16)
    anchor = GeometricAnchor(params, rho=0.01, rounding="nearest")
    with pytest.warns(UserWarning, match="mostly lost. Use rounding='stochastic'") as caught:
        for _ in range(3):
            with anchor.perturbed(grads=gradients(params)):
                pass
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with GeometricAnchor(params, rho=0.01).perturbed(grads=gradients(params)):
            pass
        nothing = GeometricAnchor(params, rho=1e-9)  # too little for any weight to change, whatever the rounding
        with nothing.perturbed(grads=gradients(params)):
            assert nothing.stats.applied_norm < 0.5 * nothing.stats.intended_norm
    params = make(F32)  # which lots are not drawn for
    with pytest.warns(UserWarning, match="mostly lost"), GeometricAnchor(params, rho=1e-9).perturbed(grads=gradients(params)):
        pass


@pytest.mark.parametrize("share, warned", [(0.01, True), (0.49, True), (0.51, False), (0.99, False)])
def test_the_warning_comes_below_half_of_the_norm(share, warned):
    """Of two weights one goes to its neighbour on the grid, and the other's delta is lost."""
    param, spacing = nn.Parameter(torch.tensor([1.0, 4096.0])), 2.0**-7
    grad = spacing * torch.tensor([1.0, (share**-2 - 1) ** 0.5])
    anchor = GeometricAnchor([param], rho=spacing / share, geometry="sam", rounding="nearest", compute_dtype=BF16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with anchor.perturbed(grads=[grad]):
            assert param.tolist() == [1 + spacing, 4096.0]
    assert anchor.stats.applied_norm == pytest.approx(share * anchor.stats.intended_norm, rel=1e-5)
    assert ["mostly lost" in str(warning.message) for warning in caught] == [True] * warned


def test_the_warning_waits_for_the_next_use_where_reading_would_wait(monkeypatch):
    monkeypatch.setattr(GeometricAnchor, "_warn_at_once", lambda *_: None)
    params = make(BF16)
    anchor = GeometricAnchor(params, rho=0.01, rounding="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with anchor.perturbed(grads=gradients(params)):
            pass
    with pytest.warns(UserWarning, match="mostly lost"), anchor.perturbed(grads=gradients(params)):
        pass
    anchor = GeometricAnchor(params, rho=0.01, rounding="nearest")  # there may be no next use: who reads is told
    with anchor.perturbed(grads=gradients(params)):
        with pytest.warns(UserWarning, match="mostly lost"):
            assert anchor.stats.applied_norm < anchor.stats.intended_norm / 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            repr(anchor.stats)


# ---- Where the originals wait ----


class Keeps(torch.autograd.Function):
    """Its backward returns what the graph keeps for the next backward, as a fused loss may."""

    @staticmethod
    def forward(ctx, x, weight, saved):
        if saved:
            ctx.save_for_backward(weight.detach() * 2)
        else:
            ctx.gradient = weight.detach() * 2
        return (x * weight).sum()

    @staticmethod
    def backward(ctx, upstream):
        kept = ctx.saved_tensors[0] if ctx.saved_tensors else ctx.gradient
        return None, kept, None


@pytest.mark.parametrize("saved", [True, False])
def test_gradients_that_the_graph_keeps_are_not_overwritten(passes, device, saved):
    param = nn.Parameter(torch.randn(50, 40).to(device))
    loss = Keeps.apply(torch.ones(40, device=device), param, saved)
    expected = param.detach() * 2
    with GeometricAnchor([param], rho=0.5).perturbed(loss, retain_graph=True):
        assert not torch.equal(param * 2, expected)
    assert torch.equal(torch.autograd.grad(loss, param)[0], expected)


def test_gradients_that_are_one_tensor_or_looked_at_are_not_overwritten(passes, device):
    params = [nn.Parameter(torch.randn(50, 40).to(device)) for _ in range(3)]
    seen = []
    params[2].register_hook(seen.append)
    factor = torch.randn(50, 40).to(device)
    objective = ((params[0] + params[1]) * factor).sum() + (params[2] ** 2 * factor).sum()
    before = [p.detach().clone() for p in params]
    anchor = GeometricAnchor(params, rho=0.5)
    with anchor.perturbed(objective):
        for p, b, delta in zip(
            params, before, deltas(before_params(before), [factor, factor, 2 * before[2] * factor], 0.5)
        ):
            torch.testing.assert_close(p.detach().double() - b.double(), delta, atol=1e-6, rtol=0)
    assert all(torch.equal(p, b) for p, b in zip(params, before))
    torch.testing.assert_close(seen[0], 2 * before[2] * factor)


def before_params(tensors):
    return [nn.Parameter(t) for t in tensors]


def test_an_ordinary_gradient_is_ours():
    param = nn.Parameter(torch.randn(50, 40))
    gradients = list(torch.autograd.grad((param @ torch.randn(40, 3)).square().sum(), [param]))
    assert ownership.exclusive(gradients) == [True]
    other = gradients[0]
    assert ownership.exclusive(gradients) == [False]
    del other
    view = gradients[0][:1]
    assert ownership.exclusive(gradients) == [False]
    del view
    assert ownership.exclusive(gradients) == [True]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("head", ["linear", "logits", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_leaves_all_originals_in_the_gradients_memory(tied, head, share, monkeypatch):
    """A head's gradient is large enough for kept memory, and a tied one's is a sum."""
    found, begin = [], perturbation.Perturbation.__init__

    def recording(self, moves, *rest):
        found.extend(move.original.data_ptr() == move.direction.data_ptr() for move in moves)
        begin(self, moves, *rest)

    monkeypatch.setattr(perturbation.Perturbation, "__init__", recording)
    torch.manual_seed(0)
    body, out = nn.Embedding(4096, 160), nn.Linear(160, 4096, bias=False)
    assert out.weight.nbytes > host_memory.HUGE_PAGE
    if tied:
        out.weight = body.weight
    ids = torch.randint(4096, (4, 16))

    def logps():
        hidden = body(ids).tanh()
        if head == "linear":
            return linear_sequence_logps(hidden, out.weight, ids)
        if head == "logits":
            return sequence_logps(out(hidden), ids)
        return out(hidden)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)

    anchor = GeometricAnchor([body.weight, *([] if tied else [out.weight])], rho=0.1)
    gapo_step(logps, anchor, share_backward=share).loss.backward()
    assert found and all(found)


def test_memory_that_torch_did_not_allocate_is_not_ours():
    gradients = [torch.from_numpy(np.zeros(4, np.float32)), torch.zeros(4)]
    assert ownership.exclusive(gradients) == [False, True]
    shape = (host_memory.HUGE_PAGE, 1)  # but that of a head's gradient on a CPU is
    gradients = [host_memory.uninitialized(shape, F32, torch.device("cpu"), host_memory.WEIGHT)]
    assert ownership.exclusive(gradients) == [True]
    seen = gradients[0].numpy()
    gradients[0] = torch.from_numpy(seen)  # another storage over that memory
    assert ownership.exclusive(gradients) == [False]


def test_a_backward_that_hands_out_its_scratch():
    class Scale(torch.autograd.Function):
        scratch = np.zeros(6, np.float32)

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            Scale.scratch[:] = -1
            return x * weight

        @staticmethod
        def backward(ctx, upstream):
            x, weight = ctx.saved_tensors
            np.copyto(Scale.scratch, (upstream * x).sum(0).numpy())
            return upstream * weight, torch.from_numpy(Scale.scratch)

    weight, x = nn.Parameter(torch.randn(6)), torch.randn(4, 6)
    before = weight.detach().clone()
    out = gapo_step(lambda: Scale.apply(x, weight).sum(1), GeometricAnchor([weight], rho=0.1))
    assert torch.equal(weight, before) and (out.gap > 0).any()


def test_a_linear_layers_gradients_are_views_and_ours():
    layer = nn.Linear(40, 30)
    gradients = list(torch.autograd.grad(layer(torch.randn(2, 5, 40)).square().sum(), list(layer.parameters())))
    assert gradients[0]._base is not None
    assert ownership.exclusive(gradients) == [True, True]
    base = gradients[0]._base  # somebody else's view of the same memory, or its owner
    assert ownership.exclusive(gradients) == [False, True]
    del base
    assert ownership.exclusive(gradients) == [True, True]


def test_parts_of_one_buffer_are_ours_if_all_of_them_are():
    parts = [*torch.zeros(30).split(10), None, torch.zeros(4)]
    assert ownership.exclusive(parts) == [True, True, True, False, True]
    other = parts[1]
    assert ownership.exclusive(parts) == [True, False, True, False, True]
    other = parts[1][:1]
    assert ownership.exclusive(parts) == [False, False, False, False, True]
    del other
    buffer = parts[0]._base
    assert ownership.exclusive(parts) == [False, False, False, False, True]
    parts[:3] = [buffer[:10], buffer[10:20], buffer[19:]]
    del buffer
    assert ownership.exclusive(parts) == [False, False, False, False, True]
    parts[2] = None  # the rest lie apart again
    assert ownership.exclusive(parts) == [True, True, False, False, True]
    parts[2] = parts[1].detach()
    assert ownership.exclusive(parts) == [False, False, False, False, True]


def test_expanded_and_sparse_gradients():
    table, bias = nn.Embedding(30, 8, sparse=True), nn.Parameter(torch.randn(8))
    anchor = GeometricAnchor([table.weight, bias], rho=0.5)
    before = [p.detach().clone() for p in anchor.params]
    objective = table(torch.tensor([3, 3, 4])).sum() + bias.sum()
    with anchor.perturbed(objective):
        moved = (table.weight.detach() != before[0]).any(1)
        assert moved.nonzero().flatten().tolist() == [3, 4] and (bias != before[1]).all()
    assert all(torch.equal(p, b) for p, b in zip(anchor.params, before))


PEAKS = """
import json, sys
from pathlib import Path
import torch
from gapo_kernels import GeometricAnchor

PRODUCTS = {
    "matmul": torch.matmul,
    "linear": torch.nn.functional.linear,
    "einsum": lambda f, p: torch.einsum("bi,oi->bo", f, p),  # the gradient is a transpose
    "experts": lambda f, p: torch.bmm(f.expand(len(p), *f.shape), p.transpose(1, 2)),
}

def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))

def beyond_the_gradients(dtype, grid, product, direction, threads):
    torch.set_num_threads(threads)
    shape, count = dict(experts=((24, 1024, 1024), 4), einsum=((6144, 4096), 4)).get(product, ((2048, 2048), 20))
    dtype, grid = getattr(torch, dtype), grid and getattr(torch, grid)
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for _ in range(count)]
    factors = [torch.full((2, shape[-1]), 0.1 + i, dtype=dtype) for i in range(count)]
    options = dict(rho=10.0, compute_dtype=grid, direction=direction)
    anchor, objective = GeometricAnchor(params, **options), None
    if direction == "pessimistic":
        objective = sum(PRODUCTS[product](f, p).sum() for p, f in zip(params, factors))
    with GeometricAnchor(params[:1], **options).perturbed(None if objective is None else params[0].sum()):
        pass  # threads and their scratch exist
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    with anchor.perturbed(objective):
        assert (params[3] != 0.5).any()
    return (status("VmHWM") - before) / 1024 - sum(p.nbytes for p in params) / 2**20

for case in json.loads(sys.argv[1]):
    print(beyond_the_gradients(*case))
"""
PEAK_CASES = [  # dtype, grid, product, direction, threads
    ("float32", None, "matmul", "pessimistic", 2),
    ("float32", None, "linear", "pessimistic", 2),
    ("float32", "bfloat16", "matmul", "pessimistic", 2),
    ("float32", "bfloat16", "linear", "pessimistic", 2),
    ("float32", None, "experts", "pessimistic", 2),  # their gradients' elements lie in another order
    ("float32", None, "einsum", "pessimistic", 2),
    ("bfloat16", None, "linear", "pessimistic", 2),
    ("bfloat16", None, "linear", "pessimistic", 32),
    ("bfloat16", None, "linear", "gaussian", 2),
]


@pytest.fixture(scope="module")
def peaks():
    """MiB of each case, in a process in which a large tensor that is freed leaves no room for the next."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", PEAKS, json.dumps(PEAK_CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if "PermissionError" in done.stderr:
        pytest.skip("the kernel does not let the peak be reset")
    assert done.returncode == 0, done.stderr
    return dict(zip(PEAK_CASES, map(float, done.stdout.split()), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", PEAK_CASES, ids=str)
def test_peak_memory_is_the_gradients_and_at_most_64_mib(peaks, case):
    """Of noise, which is there in the place of gradients, as well."""
    assert -64 < peaks[case] <= 64


def test_large_parameters_are_the_same_on_any_number_of_threads():
    param = nn.Parameter(torch.randn(3 * perturbation.ROUNDED_CHUNK + 77).bfloat16())
    grads, found = gradients([param]), []
    before, threads = param.detach().clone(), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            anchor = GeometricAnchor([param], rho=5.0)
            with anchor.perturbed(grads=grads):
                found.append((param.detach().clone(), anchor.stats.intended_norm))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(param, before)
    assert all(torch.equal(f[0], found[0][0]) and f[1] == found[0][1] for f in found)
